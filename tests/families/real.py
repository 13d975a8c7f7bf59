"""The real models behind some of the trees: built by their packages, as shapes."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# -- Hugging Face's Flax models, transformers 4.57 -------------------------------------

BERT = {
    "vocab_size": 7,
    "hidden_size": 4,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 6,
    "max_position_embeddings": 8,
}
LLAMA = {**BERT, "num_key_value_heads": 2, "head_dim": 2, "pad_token_id": 0}
T5 = {
    "vocab_size": 7,
    "d_model": 4,
    "d_kv": 2,
    "d_ff": 6,
    "num_layers": 4,
    "num_decoder_layers": 3,
    "num_heads": 2,
    "relative_attention_num_buckets": 5,
}
BART = {
    "vocab_size": 7,
    "d_model": 4,
    "encoder_layers": 4,
    "decoder_layers": 3,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 6,
    "decoder_ffn_dim": 6,
    "max_position_embeddings": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
VIT = {
    **{key: BERT[key] for key in list(BERT)[1:5]},
    "image_size": 4,
    "patch_size": 2,
    "num_channels": 3,
}
GPT2 = {
    "vocab_size": 7,
    "n_embd": 4,
    "n_layer": 4,
    "n_head": 2,
    "n_inner": 6,
    "n_positions": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CLIP_TEXT = {**BERT, "projection_dim": 5, "bos_token_id": 1, "eos_token_id": 2}
STAGES = {"embedding_size": 4, "hidden_sizes": [4, 6, 6], "depths": [3, 2, 2]}
CONV = {
    "conv_dim": (4, 4, 4),
    "conv_stride": (2, 2, 2),
    "conv_kernel": (3, 2, 2),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "feat_extract_norm": "layer",
    "do_stable_layer_norm": True,
}
WHISPER = {
    **BART,
    "num_mel_bins": 3,
    "max_source_positions": 8,
    "max_target_positions": 8,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}

# name: class of the model, of the configuration, its arguments.
HF: dict[str, tuple[str, str, dict[str, Any]]] = {
    "hf-albert": (
        "FlaxAlbertForMaskedLM",
        "AlbertConfig",
        {**BERT, "embedding_size": 4, "num_hidden_groups": 1, "inner_group_num": 3},
    ),
    "hf-albert-groups": (
        "FlaxAlbertModel",
        "AlbertConfig",
        {**BERT, "embedding_size": 4, "num_hidden_groups": 4, "inner_group_num": 1},
    ),
    "hf-albert-shared": (
        "FlaxAlbertModel",
        "AlbertConfig",
        {**BERT, "embedding_size": 4},
    ),
    "hf-bart": ("FlaxBartForConditionalGeneration", "BartConfig", BART),
    "hf-beit": (
        "FlaxBeitForImageClassification",
        "BeitConfig",
        {**VIT, "use_relative_position_bias": True},
    ),
    "hf-bert-mlm": ("FlaxBertForMaskedLM", "BertConfig", BERT),
    "hf-bert-pooled": ("FlaxBertModel", "BertConfig", BERT),
    "hf-big-bird": (
        "FlaxBigBirdForMaskedLM",
        "BigBirdConfig",
        {**BERT, "block_size": 2, "attention_type": "original_full"},
    ),
    "hf-blenderbot": (
        "FlaxBlenderbotForConditionalGeneration",
        "BlenderbotConfig",
        BART,
    ),
    "hf-bloom": (
        "FlaxBloomForCausalLM",
        "BloomConfig",
        {"vocab_size": 7, "hidden_size": 4, "n_layer": 4, "n_head": 2},
    ),
    "hf-clip": (
        "FlaxCLIPModel",
        "CLIPConfig",
        {
            "text_config": CLIP_TEXT,
            "vision_config": {**VIT, "projection_dim": 5},
            "projection_dim": 5,
        },
    ),
    "hf-dinov2": ("FlaxDinov2ForImageClassification", "Dinov2Config", VIT),
    "hf-distilbert": (
        "FlaxDistilBertForMaskedLM",
        "DistilBertConfig",
        {
            "vocab_size": 7,
            "dim": 4,
            "n_layers": 4,
            "n_heads": 2,
            "hidden_dim": 6,
            "max_position_embeddings": 8,
        },
    ),
    "hf-electra": (
        "FlaxElectraForPreTraining",
        "ElectraConfig",
        {**BERT, "embedding_size": 3},
    ),
    "hf-gemma": ("FlaxGemmaForCausalLM", "GemmaConfig", LLAMA),
    "hf-gpt2-lm": ("FlaxGPT2LMHeadModel", "GPT2Config", GPT2),
    "hf-gpt2-cross": (
        "FlaxGPT2LMHeadModel",
        "GPT2Config",
        {**GPT2, "add_cross_attention": True},
    ),
    "hf-gpt-neo": (
        "FlaxGPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": 7,
            "hidden_size": 4,
            "num_layers": 4,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 2]],
            "intermediate_size": 6,
            "max_position_embeddings": 8,
        },
    ),
    "hf-gptj": ("FlaxGPTJForCausalLM", "GPTJConfig", {**GPT2, "rotary_dim": 2}),
    "hf-llama-lm": ("FlaxLlamaForCausalLM", "LlamaConfig", LLAMA),
    "hf-longt5": (
        "FlaxLongT5ForConditionalGeneration",
        "LongT5Config",
        {**T5, "encoder_attention_type": "local"},
    ),
    "hf-marian": ("FlaxMarianMTModel", "MarianConfig", BART),
    "hf-mbart": ("FlaxMBartForConditionalGeneration", "MBartConfig", BART),
    "hf-mistral": ("FlaxMistralForCausalLM", "MistralConfig", LLAMA),
    "hf-mt5-gated": (
        "FlaxMT5ForConditionalGeneration",
        "MT5Config",
        {**T5, "feed_forward_proj": "gated-gelu"},
    ),
    "hf-opt": (
        "FlaxOPTForCausalLM",
        "OPTConfig",
        {**BERT, "ffn_dim": 6, "word_embed_proj_dim": 4},
    ),
    "hf-pegasus": ("FlaxPegasusForConditionalGeneration", "PegasusConfig", BART),
    "hf-regnet": (
        "FlaxRegNetForImageClassification",
        "RegNetConfig",
        {**STAGES, "groups_width": 2, "layer_type": "y"},
    ),
    "hf-resnet": (
        "FlaxResNetForImageClassification",
        "ResNetConfig",
        {**STAGES, "layer_type": "basic"},
    ),
    "hf-roberta": ("FlaxRobertaForMaskedLM", "RobertaConfig", BERT),
    "hf-roberta-prelayernorm": (
        "FlaxRobertaPreLayerNormModel",
        "RobertaPreLayerNormConfig",
        BERT,
    ),
    "hf-roformer": (
        "FlaxRoFormerForMaskedLM",
        "RoFormerConfig",
        {**BERT, "embedding_size": 4},
    ),
    "hf-t5": ("FlaxT5ForConditionalGeneration", "T5Config", T5),
    "hf-t5-encoder": ("FlaxT5EncoderModel", "T5Config", T5),
    "hf-vit": ("FlaxViTForImageClassification", "ViTConfig", VIT),
    "hf-wav2vec2": (
        "FlaxWav2Vec2ForCTC",
        "Wav2Vec2Config",
        {**BERT, **CONV},
    ),
    "hf-whisper": ("FlaxWhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "hf-xglm": (
        "FlaxXGLMForCausalLM",
        "XGLMConfig",
        {
            "vocab_size": 7,
            "d_model": 4,
            "ffn_dim": 6,
            "num_layers": 4,
            "attention_heads": 2,
            "max_position_embeddings": 8,
        },
    ),
    "hf-xlm-roberta": ("FlaxXLMRobertaForMaskedLM", "XLMRobertaConfig", BERT),
}
# Two configurations in one model.
PAIRS = {
    "hf-encoder-decoder": (
        "FlaxEncoderDecoderModel",
        "EncoderDecoderConfig",
        ("BertConfig", BERT),
        ("GPT2Config", {**GPT2, "add_cross_attention": True, "is_decoder": True}),
    ),
    "hf-speech-encoder-decoder": (
        "FlaxSpeechEncoderDecoderModel",
        "SpeechEncoderDecoderConfig",
        (
            "Wav2Vec2Config",
            {
                **BERT,
                **CONV,
                "feat_extract_norm": "layer",
                "do_stable_layer_norm": True,
            },
        ),
        ("BartConfig", {**BART, "is_decoder": True}),
    ),
    "hf-vision-encoder-decoder": (
        "FlaxVisionEncoderDecoderModel",
        "VisionEncoderDecoderConfig",
        ("ViTConfig", VIT),
        ("GPT2Config", {**GPT2, "add_cross_attention": True, "is_decoder": True}),
    ),
    "hf-vision-text-dual-encoder": (
        "FlaxVisionTextDualEncoderModel",
        "VisionTextDualEncoderConfig",
        ("ViTConfig", VIT),
        ("BertConfig", BERT),
    ),
}


def hugging_face(name):
    import transformers

    if name in PAIRS:
        model, config, *parts = PAIRS[name]
        made = [getattr(transformers, of)(**kwargs) for of, kwargs in parts]
        make = getattr(transformers, config)
        if "dual" in name:
            settings = make.from_vision_text_configs(*made, projection_dim=5)
        else:
            settings = make.from_encoder_decoder_configs(*made)
    else:
        model, config, kwargs = HF[name]
        settings = getattr(transformers, config)(**kwargs)
    kwargs = {}
    if "vision-encoder" in name or name == "hf-speech-encoder-decoder":
        kwargs["input_shape"] = (
            ((1, 4, 4, 3), (1, 1)) if "vision" in name else ((1, 64), (1, 1))
        )
    # The composed models have no other way than to make their parameters.
    kwargs["_do_init"] = name in PAIRS
    with _old_clip():
        built = getattr(transformers, model)(settings, **kwargs)
    shapes = built.params if name in PAIRS else built.params_shape_tree
    shapes = shapes.get("params", shapes)  # beside the statistics of a ResNet
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), dict(shapes))


@contextlib.contextmanager
def _old_clip():
    """T5 calls `jnp.clip` by a name that jax has no more."""
    clip = jnp.clip

    def renamed(x, *args, a_min=None, a_max=None):
        return clip(x, *args) if args else clip(x, min=a_min, max=a_max)

    jnp.clip = renamed
    try:
        yield
    finally:
        jnp.clip = clip


# -- penzai 0.2 ------------------------------------------------------------------------


def penzai_model(num_blocks, **kwargs):
    from penzai.models.transformer.variants import llamalike_common as common

    config = common.LlamalikeTransformerConfig(
        num_kv_heads=2,
        query_head_multiplier=2,
        embedding_dim=4,
        projection_dim=3,
        mlp_hidden_dim=6,
        num_decoder_blocks=num_blocks,
        vocab_size=7,
        mlp_variant="swiglu",
        tie_embedder_and_logits=False,
        **kwargs,
    )
    make = common.build_llamalike_transformer
    return make(config, init_base_rng=jax.random.key(0))


def penzai_parameters(*args, **kwargs):
    """The tuple that penzai's own trainer gives to an optimizer."""
    from penzai import pz

    return pz.freeze_params(pz.unbind_params(penzai_model(*args, **kwargs))[1])


def penzai_labels(*args, **kwargs):
    return {p.label: p for p in penzai_parameters(*args, **kwargs)}


def penzai_frozen(*args):
    from penzai import pz

    return pz.freeze_params(penzai_model(*args))


# -- Equinox, Haiku --------------------------------------------------------------------


def equinox_mlp():
    import equinox as eqx

    model = eqx.nn.MLP(3, 2, 4, depth=5, key=jax.random.key(0))
    return eqx.filter(model, eqx.is_inexact_array)


def haiku_mlp():
    import haiku as hk

    net = hk.transform(lambda x: hk.nets.MLP([4, 4, 4, 2])(x))
    return jax.eval_shape(net.init, jax.random.PRNGKey(0), jnp.ones((1, 4)))


def haiku_transformer():
    """The modules of Haiku's example, made and called in its order."""
    import haiku as hk

    def norm(x):
        return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)

    class Transformer(hk.Module):
        def __call__(self, x):
            for _ in range(3):
                attend = hk.MultiHeadAttention(2, 2, model_size=4, w_init_scale=1.0)
                y = norm(x)
                x = x + attend(y, y, y)
                dense = hk.Sequential([hk.Linear(8), jax.nn.gelu, hk.Linear(4)])
                x = x + dense(norm(x))
            return norm(x)

    class LanguageModel(hk.Module):
        def __call__(self, tokens):
            positions = hk.get_parameter("positional_embeddings", [5, 4], init=jnp.ones)
            x = hk.Embed(7, 4)(tokens) + positions
            return hk.Linear(7)(Transformer(name="transformer")(x))

    net = hk.transform(lambda tokens: LanguageModel(name="language_model")(tokens))
    return jax.eval_shape(net.init, jax.random.PRNGKey(0), jnp.ones((1, 5), int))


# name: (the package to import, a function that builds the tree)
BUILDERS: dict[str, tuple[str, Callable[[], Any]]] = {
    name: ("transformers", functools.partial(hugging_face, name))
    for name in (*HF, *PAIRS)
} | {
    "pz-llamalike": ("penzai", lambda: penzai_labels(4)),
    "pz-llamalike-stack": ("penzai", lambda: penzai_labels(4, use_layer_stack=True)),
    "pz-frozen-model": ("penzai", lambda: penzai_frozen(3)),
    "pz-tuple": ("penzai", lambda: penzai_parameters(3)),
    "eqx-mlp": ("equinox", equinox_mlp),
    "haiku-mlp": ("haiku", haiku_mlp),
    "haiku-transformer-example": ("haiku", haiku_transformer),
}
