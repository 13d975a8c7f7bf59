"""What the names of numbered siblings say: layers, parts of one, or things beside."""

from __future__ import annotations

import functools
import re
from typing import Literal, TypeAlias

Meaning: TypeAlias = Literal["layers", "layers of parts", "parts", "beside", "other"]

# How real stacks name their repeated blocks: layers_3, encoderblock_3, ...
_LAYERS = re.compile(r"(?<!p)(?:layer|block)s?$|^stacked$")  # but for `player`

# What a scan makes a matrix of.
VECTORS = {"b", "beta", "bias", "gain", "gamma", "g", "offset", "scale"}

_PARTS = {
    *("dense", "linear", "lin", "conv", "conv1d", "conv2d", "norm", "ln", "embed"),
    *("embedding", "embedder", "dropout", "attention", "attn", "att", "mlp", "ff"),
    *("ffn", "gate", "kernel", "weight", "bias", "scale", "bn", "fc", "proj"),
    *("wi", "wo", "input", "output", "time", "layernorm", "rnn"),
    *("lstm", "gru", "pos", "position", "biase", "query", "key", "value"),
}
# Never one after the other, whatever they hold.
_BESIDE = {
    *("expert", "head", "tower", "branch", "branche", "codebook", "vmap", "view"),
    *("mtp", "replica", "fold", "sample", "camera", "speaker", "probe", "sensor"),
    *("language", "lang", "domain", "world", "annotator"),
}
# Things that hold layers. A list may be called as what it is in: `encoder/0`.
_WHOLES = {
    *("stage", "critic", "actor", "policy", "model", "ensemble", "member"),
    *("agent", "task", "client", "encoder", "decoder", "net", "network", "q", "qf"),
    *("vf", "per_layer", "player", "generator", "discriminator", "disc", "seed"),
    *("adapter", "quantizer", "modality", "stream", "subnet", "backbone", "trunk"),
    *("torso", "estimator", "period", "student", "teacher", "classifier"),
}
# Those of which a few are trained beside each other, by `vmap`.
_LEARNERS = {
    *("critic", "actor", "policy", "agent", "player", "discriminator", "q", "qf"),
    *("vf", "estimator", "member", "ensemble"),
}
_LISTS_OF_WHOLES = {f"{word}s" for word in _WHOLES} | {
    "policies",
    "ensemble",
    "modalities",
}


@functools.lru_cache(maxsize=4096)  # a tree has few names, and each many times
def meaning(name: str | int, is_list: bool = False) -> Meaning:
    """What numbered siblings of this name are, or the entries of a list of this name.

    "layers of parts", such as `attention_blocks`, are whole layers or parts of them.
    """
    words = _words(name)
    if not words:
        return "other"
    is_plural_first = words[0] == "layers" and words[-1] not in _PARTS
    if words[:2] == ["layer", "stack"] or is_plural_first:
        return "layers"  # Haiku's, and MaxText's layers_outside_pipeline
    singular = [word.removesuffix("s") for word in words]
    is_attention = {"attention", "attn"} & set(words)  # whose heads are in its arrays
    beside = _BESIDE - {"head"} if is_attention else _BESIDE
    if beside & set(singular) or words[-2:] == ["per", "layer"]:
        return "beside"
    is_whole = words[-1] in _LISTS_OF_WHOLES if is_list else singular[-1] in _WHOLES
    if is_whole:
        return "beside"
    if _LAYERS.search(words[-1]) or words in (["h"], ["l"]):
        is_of_parts = _PARTS & {*words[:-1], *singular[:-1]}
        return "layers of parts" if is_of_parts else "layers"
    is_part = _PARTS & {words[-1], singular[-1]} or words[0] in ("w", "b")
    return "parts" if is_part else "other"


def is_part(name: str | int) -> bool:
    """Whether what is in a node of this name is in a part of a layer or a head."""
    words = set(_words(name))
    is_called_so = meaning(name, True) == "parts" and not words <= {"b", "w"}
    return is_called_so or bool({"head", "heads"} & words)


def is_layer(name: str | int) -> bool:
    """Whether a node of this name is one layer: `h`, `block`; but not `moe_block`."""
    return len(_words(name)) == 1 and meaning(name) == "layers"


def is_apart(node: tuple[str | int, ...]) -> bool:
    """Whether a path is of things that stand side by side, such as experts."""
    return any(meaning(segment, True) == "beside" for segment in node)


def may_be_apart(node: tuple[str | int, ...]) -> bool:
    """The same, or of one learner that may be several, stacked: `critic`."""
    return is_apart(node) or any(_LEARNERS & {*_words(n)[-1:]} for n in node)


def is_stage(name: str | int) -> bool:
    """Whether it may hold layers, as the blocks of a U-Net do: `down_blocks`."""
    return bool({"down", "up", "mid"} & {*_words(name)[:-1]})


def _words(name: str | int) -> list[str]:
    """["encoder", "block"] of `encoder_block_3` and of `EncoderBlock`."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", str(name))
    parts = re.split(r"[^A-Za-z0-9]+", spaced)
    words = (part.rstrip("0123456789").lower() for part in parts)
    return [word for word in words if word]


def split_number(segment: str | int) -> tuple[str, int] | None:
    """("layers_", 3) of layers_3, ("", 3) of 3, None without a number at the end."""
    text = str(segment)
    stem = text.rstrip("0123456789")
    stem = "" if stem == "-" else stem
    digits = text[len(stem) :]
    # Longer ones are hashes.
    return (stem, int(digits)) if digits not in ("", "-") and len(digits) < 10 else None


_WEIGHT_NAME = re.compile(
    r"(?:^|_)(?:kernels?|weights?|w[a-z]{0,3}|lora_[ab]|einsum|linear)(?:_?\d+)?$",
    re.IGNORECASE,
)
_TABLE_NAME = re.compile(r"embed|position|^pos(?:_|$)|^w[tp]e$", re.IGNORECASE)


def is_linear_weight(path: tuple[str | int, ...], rank: int) -> bool:
    """Whether a path ends in the name of a projection, with so many axes."""
    if rank < 2 or not path or not _WEIGHT_NAME.search(str(path[-1])):
        return False
    return not any(_TABLE_NAME.search(str(segment)) for segment in path[-2:])
