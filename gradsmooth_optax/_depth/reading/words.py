"""Numbered path segments: whether their name says layer, part of one, or neither."""

from __future__ import annotations

import re

# How real stacks name their repeated blocks: layers_3, encoderblock_3, h/3, ...
_LAYER_NAME = re.compile(r"(?:layers?|blocks?)$|^h$", re.IGNORECASE)

# Blocks that stand side by side; Haiku's __layer_stack_no_per_layer_1 is a whole stack.
_NO_LAYER_NAME = re.compile(
    r"expert|head|gate|tower|branch|codebook|stage|input|output|time|proj|linear|dense"
    r"|mlp|att(?:entio)?n|embed|conv_?layer|per_layer$",
    re.IGNORECASE,
)

# How they name what is numbered inside a block: Dense_1, LayerNorm_0, experts/3, wi_0.
_PART_NAME = re.compile(
    r"(?:dense|linear|lin|conv(?:\d*d)?|norm|ln|embed(?:ding|der)?s?|dropout|attention"
    r"|attn|mlp|ffn?|gate|experts?|heads?|towers?|branch(?:es)?|kernel|weight|bias"
    r"|scale|(?<![a-z])(?:w[a-z]{0,2}|b|bn|fc|proj))$",
    re.IGNORECASE,
)


def split_number(segment: str | int) -> tuple[str, int] | None:
    """("layers_", 3) of layers_3, ("", 3) of 3, None without a number at the end."""
    match = re.fullmatch(r"(.*?)(\d+)", str(segment))
    return (match[1], int(match[2])) if match else None


def names_layers(name: str | int) -> bool:
    """Whether numbered siblings of this name are called layers or blocks."""
    word = _word(name)
    return bool(_LAYER_NAME.search(word)) and not _NO_LAYER_NAME.search(word)


def names_parts(name: str | int) -> bool:
    """Whether numbered siblings of this name are called parts of one layer."""
    word = _word(name)
    return bool(_PART_NAME.search(word) or _NO_LAYER_NAME.search(word))


def _word(name: str | int) -> str:
    return str(name).strip("/_.-0123456789")
