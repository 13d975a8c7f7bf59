r"""Depth specs for common JAX training stacks.

Each function returns a spec for the argument `depth`, made of `unrolled`, `scanned` and
`first_match`. The patterns end paths, so that prefixes such as `params/` do not matter.
Its name does as well, as in a configuration file: `depth="maxtext(cycle=6)"`. A preset
is a start, not a proof: look at `describe(depth, params)` once, which also shows what
the preset stands for.

>>> import gradsmooth_optax as gs
>>> gs.layouts.maxtext(cycle=6)
gs.layouts.maxtext(cycle=6)

- `flax_linen`: numbered modules, or `nn.scan` over one
- `flax_nnx`: a list of modules, or `nnx.vmap` and `nnx.scan` over one; tunix, EasyDeL
- `equinox`: a list of modules, or `eqx.filter_vmap` over one
- `haiku`: a loop of modules, the first without a number, or `hk.layer_stack`
- `hf_flax`: Hugging Face's Flax models, EasyLM
- `maxtext`: MaxText's decoder, unrolled or scanned, with cycles of layers
- `maxtext_gemma2`, `maxtext_gemma4`, `maxtext_deepseek`: MaxText's special stacks
- `maxtext_pipeline`: MaxText's repeats, stages and layers per stage
- `t5x`: T5X and flaxformer
- `big_vision`: ViT, SigLIP, PaliGemma and others of big_vision
- `gemma`: google-deepmind/gemma
- `levanter`: levanter and haliax
- `penzai`: penzai's `block_3`, or a `LayerStack`
- `uvit`: the paper's U-ViT
"""

from __future__ import annotations

import re
from typing import Any

from gradsmooth_optax._depth.depth import Depth
from gradsmooth_optax._depth.paths import Path, show_path
from gradsmooth_optax._depth.preset_registry import preset
from gradsmooth_optax._depth.specs import (
    DepthSpec,
    depth_fn,
    first_match,
    ranked,
    scanned,
    unrolled,
)


@preset({})
def flax_linen(
    block: str = r"\w*(?:[Bb]lock|[Ll]ayer)s?",
    *,
    scan_axis: int | tuple[int, ...] | None = None,
    num_layers: int | None = None,
) -> DepthSpec:
    r"""Flax Linen: a loop of numbered modules, or `nn.scan` over one.

    Such as `encoderdecoderblock_3` of Flax's own examples, `Block_3`, `layers_3`; or,
    stacked, `ScanBlock_0`, `blocks`. Numbers inside a block (`Dense_1`) are roles.

    Args:
      block: regular expression for the name of the block, without its number.
      scan_axis: None for one leaf per layer, else the axis that `nn.scan` stacks
        parameters on (its `variable_axes={"params": scan_axis}`), or the axes, such as
        `(0, 1)` for `nn.remat_scan` with two lengths.
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> block = {"Dense_0": {"kernel": jnp.ones((2, 2))}}
      >>> params = {"encoder": {"encoderblock_0": block, "encoderblock_1": block}}
      >>> group, = gs.describe(gs.layouts.flax_linen(), params).groups
      >>> group.stack, group.role, group.layers
      ('encoder/encoderblock', 'Dense_0/kernel', (0, 1))
    """
    if scan_axis is None:
        return unrolled(rf"(?:^|/){block}[/_]?(\d+)/")
    return scanned(rf"(?:^|/){block}(?:_\d+)?/", axis=scan_axis)


@preset({})
def flax_nnx(
    layers: str = "layers",
    *,
    scan_axis: int | None = None,
    num_layers: int | None = None,
) -> DepthSpec:
    r"""Flax NNX: a list of modules, or `nnx.vmap` and `nnx.scan` over one.

    Also for tunix, bonsai and EasyDeL, which keep their layers in such a list. Close
    the gaps of an `nnx.Sequential` with `ranked(flax_nnx())`.

    Args:
      layers: regular expression for the name of the attribute with the layers.
      scan_axis: None for a list, else the axis that `nnx.vmap` stacks parameters on.
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {"layers": {"fc": {"kernel": jnp.ones((3, 2, 2))}}}  # three layers
      >>> group, = gs.describe(gs.layouts.flax_nnx(scan_axis=0), params).groups
      >>> group.stack, group.role, group.layers
      ('layers', 'fc/kernel', (0, 1, 2))
    """
    if scan_axis is None:
        return unrolled(rf"(?:^|/){layers}/(\d+)/")
    return scanned(rf"(?:^|/){layers}/", axis=scan_axis)


@preset({})
def equinox(
    layers: str = "layers",
    *,
    scan_axis: int | None = None,
    num_layers: int | None = None,
) -> DepthSpec:
    r"""Equinox: a list of modules, or `eqx.filter_vmap` over their construction.

    Args:
      layers: regular expression for the name of the field with the layers.
      scan_axis: None for a list, else the axis of the stacked layers (0 as
        `eqx.filter_vmap` makes it).
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {"layers": [{"weight": jnp.ones((2, 2))} for _ in range(3)]}
      >>> group, = gs.describe(gs.layouts.equinox(), params).groups
      >>> group.stack, group.role, group.layers
      ('layers', 'weight', (0, 1, 2))
    """
    return flax_nnx(layers, scan_axis=scan_axis)


@preset({})
def haiku(
    block: str = "block", *, layer_stack: bool = False, num_layers: int | None = None
) -> DepthSpec:
    r"""Haiku: a loop of modules, the first without a number, or `hk.layer_stack`.

    Args:
      block: regular expression for the name of the block, without its number.
      layer_stack: whether the layers are stacked by `hk.layer_stack`.
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> names = ["net/block/linear", "net/block_1/linear", "net/block_2/linear"]
      >>> params = {name: {"w": jnp.ones((2, 2))} for name in names}
      >>> group, = gs.describe(gs.layouts.haiku(), params).groups
      >>> group.stack, group.role, group.layers
      ('net/block', 'linear/w', (0, 1, 2))
    """
    if layer_stack:
        # A number at its end counts stacks, not layers.
        return scanned(r"__layer_stack_(?:no|with)_per_layer(?:_\d+)?/")
    return unrolled(rf"(?:^|/){block}(?:_(\d+))?/")


@preset({})
def hf_flax(*, num_layers: int | None = None) -> DepthSpec:
    r"""Hugging Face's Flax models, and EasyLM: digits as keys, `h/3`, `layers/3`.

    Takes the outer number of T5 (`block/3/layer/1`), whose inner ones are sublayers.

    Args:
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> layer = {"ln_1": {"scale": jnp.ones(2)}}
      >>> params = {"transformer": {"h": {"0": layer, "1": layer}, "ln_f": jnp.ones(2)}}
      >>> group, = gs.describe(gs.layouts.hf_flax(), params).groups
      >>> group.stack, group.role, group.layers
      ('transformer/h', 'ln_1/scale', (0, 1))
    """
    return unrolled(r"(?:^|/)(?:h|layers?|block|albert_layers)/(\d+)/")


@preset({})
def big_vision(*, num_layers: int | None = None) -> DepthSpec:
    r"""big_vision: ViT, SigLIP, CapPa, GIVT, PaliGemma, Gemma, unrolled or scanned.

    Encoder blocks are stacked on axis 0, CapPa's and GIVT's decoder blocks on axis 1.

    Args:
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {
      ...     "encoder": {"encoderblock": {"bias": jnp.ones((12, 4))}},
      ...     "decoder": {"EncDecBlock": {"bias": jnp.ones((4, 6))}},
      ... }
      >>> groups = gs.describe(gs.layouts.big_vision(), params).groups
      >>> [(group.stack, group.num_layers) for group in groups]
      [('decoder/EncDecBlock', 6), ('encoder/encoderblock', 12)]
    """
    return first_match(
        unrolled(r"(?:encoderblock_|EncDecBlock|(?:^|/)layers/)(\d+)/"),
        scanned(r"(?:encoderblock|(?:^|/)layers)/"),
        scanned("EncDecBlock/", axis=1),
    )


@preset({})
def gemma(*, interleaved: bool = False, num_layers: int | None = None) -> DepthSpec:
    r"""google-deepmind/gemma: `layer_3` at the root.

    Args:
      interleaved: whether layers of two kinds alternate whose attention differs in
        shape, as in Gemma 4. Each kind is then coupled over the other (`ranked`).
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> layer = {"attn": {"q_einsum": {"w": jnp.ones((2, 4, 2))}}}
      >>> params = {"embedder": jnp.ones((8, 4)), "layer_0": layer, "layer_1": layer}
      >>> group, = gs.describe(gs.layouts.gemma(), params).groups
      >>> group.stack, group.role, group.layers
      ('layer', 'attn/q_einsum/w', (0, 1))
    """
    layers = unrolled(r"(?:^|/)layer_(\d+)/")
    return ranked(layers) if interleaved else layers


@preset({})
def levanter(*, num_layers: int | None = None) -> DepthSpec:
    r"""levanter and haliax: `Stacked` layers on axis 0, or a `BlockSeq` of them.

    Args:
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> layers = {"stacked": {"mlp": {"weight": jnp.ones((3, 2, 2))}}}
      >>> params = {"transformer": {"layers": layers}}
      >>> group, = gs.describe(gs.layouts.levanter(), params).groups
      >>> group.stack, group.role, group.layers
      ('transformer/layers/stacked', 'mlp/weight', (0, 1, 2))
    """
    return first_match(scanned("(?:^|/)stacked/"), unrolled(r"(?:^|/)blocks/(\d+)/"))


@preset({}, {"layer_stack": True})
def penzai(*, layer_stack: bool = False, num_layers: int | None = None) -> DepthSpec:
    r"""penzai: `block_3` in the labels of its parameters, or a `LayerStack`.

    The tree is `{parameter.label: parameter.value}`; a bare tuple of parameters does
    not tell its layers.

    Args:
      layer_stack: whether the blocks are stacked (`use_layer_stack=True`).
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {
      ...     f"net/block_{i}/mlp/out.weights": jnp.ones((2, 2)) for i in range(3)
      ... }
      >>> group, = gs.describe(gs.layouts.penzai(), params).groups
      >>> group.stack, group.role, group.layers
      ('net/block', 'mlp/out/weights', (0, 1, 2))
    """
    if layer_stack:
        return scanned("(?:^|/)blocks/")
    return unrolled(r"(?:^|/)block_(\d+)/")


@preset({})
def t5x(*, scan_axis: int = 1, num_layers: int | None = None) -> DepthSpec:
    r"""T5X and flaxformer: `layers_3` in encoder and decoder, or scanned in both.

    Args:
      scan_axis: axis of the scanned layers.
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {"encoder": {
      ...     "encoder": {"mlp": {"wo": {"kernel": jnp.ones((8, 3, 4))}}},
      ...     "encoder_norm": {"scale": jnp.ones(4)},
      ... }}
      >>> group, = gs.describe(gs.layouts.t5x(), params).groups
      >>> group.stack, group.role, group.layers
      ('encoder/encoder', 'mlp/wo/kernel', (0, 1, 2))
    """
    return first_match(
        unrolled(r"(?:^|/)layers_(\d+)/"),
        scanned("(?:encoder/encoder|decoder/decoder)/", axis=scan_axis),
    )


@preset()
def uvit(*, join_at: int | None = None, num_layers: int | None = None) -> DepthSpec:
    r"""U-ViT, the paper's: `in_blocks` and `out_blocks`, and `mid_block` alone.

    Args:
      join_at: None for two stacks, `in_blocks` and `out_blocks`; else the number of
        `in_blocks`, whose last is then coupled with the first of `out_blocks` in the
        roles that both have.
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> names = ["in_blocks_0", "in_blocks_1", "mid_block", "out_blocks_0"]
      >>> params = {name: {"qkv": {"kernel": jnp.ones((2, 6))}} for name in names}
      >>> group, = gs.describe(gs.layouts.uvit(join_at=2), params).groups
      >>> group.stack, group.role, group.layers
      ('blocks', 'qkv/kernel', (0, 1, 2))
    """
    if join_at is None:
        return unrolled(r"(?:^|/)(?:in|out)_blocks[_/](\d+)/")
    return first_match(
        unrolled(r"(?:^|/)in_blocks[_/](\d+)/", stack="blocks"),
        unrolled(r"(?:^|/)out_blocks[_/](\d+)/", start=join_at, stack="blocks"),
    )


@preset({})
def maxtext(
    *,
    scan_axis: int | None = 1,
    cycle: int = 1,
    num_cycles: int | None = None,
    num_layers: int | None = None,
) -> DepthSpec:
    r"""MaxText: the decoder's layers.

    Llama, Mistral, Qwen, Gemma, Mixtral and others with `cycle=1`; Gemma 3 with
    `cycle=6`, gpt-oss with 2, Llama 4 and Qwen3-Next with 4, which scan over a cycle
    of layers `layers_0`, `layers_1`, …. Where layers of two kinds alternate, wrap it in
    `ranked` to couple each kind over the other. See `maxtext_gemma2`,
    `maxtext_gemma4`, `maxtext_deepseek`, `maxtext_pipeline` for other decoders.

    Args:
      scan_axis: the configuration's `param_scan_axis`; None for `scan_layers=false`.
      cycle: how many layers one step of the scan has.
      num_cycles: how many steps the scan has, where layers remain after it
        (`layers_remainder`), for them to go on at `cycle * num_cycles`. Without it
        they are a stack of their own.
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> def scale(*shape):
      ...     return {"norm": {"scale": jnp.ones(shape)}}
      >>> params = {"decoder": {  # two cycles of six layers, and one more
      ...     "layers": {f"layers_{i}": scale(4, 2) for i in range(6)},
      ...     "layers_remainder": {"layers_0": scale(4)},
      ... }}
      >>> spec = gs.layouts.maxtext(cycle=6, num_cycles=2)
      >>> group, = gs.describe(spec, params).groups
      >>> group.role, group.layers
      ('norm/scale', (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12))
    """
    if scan_axis is None:
        return unrolled(r"(?:^|/)layers(?:_outside_pipeline)?_(\d+)/")
    if cycle == 1:
        return scanned("decoder/layers/", axis=scan_axis)
    remainder = r"decoder/layers_remainder/layers_(\d+)/"
    return first_match(
        scanned(
            r"decoder/layers/layers?_(\d+)/",
            axis=scan_axis,
            stride=cycle,
            stack="decoder",
        ),
        unrolled(remainder)
        if num_cycles is None
        else unrolled(remainder, start=cycle * num_cycles, stack="decoder"),
    )


@preset({}, {"scan_axis": 0}, {"scan_axis": None})
def maxtext_gemma2(
    *, scan_axis: int | None = 1, num_layers: int | None = None
) -> DepthSpec:
    r"""MaxText's Gemma 2: pairs of a local and a global layer.

    Args:
      scan_axis: the configuration's `param_scan_axis`; None for `scan_layers=false`.
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> norm = {"scale": jnp.ones((4, 3))}
      >>> params = {"decoder": {
      ...     "layers": {"pre_ffw_norm_local": norm, "pre_ffw_norm_global": norm}
      ... }}
      >>> group, = gs.describe(gs.layouts.maxtext_gemma2(), params).groups
      >>> group.role, group.layers
      ('pre_ffw_norm/scale', (0, 1, 2, 3, 4, 5))
    """
    if scan_axis is None:
        return _gemma2_pairs
    return first_match(
        *(
            scanned(
                rf"decoder/layers/(?P<role>\w+)_{kind}/",
                axis=scan_axis,
                start=position,
                stride=2,
                stack="decoder",
            )
            for position, kind in enumerate(_GEMMA2_KINDS)
        )
    )


_GEMMA2_KINDS = ("local", "global")


@depth_fn
def _gemma2_pairs(path: Path, leaf: Any) -> Depth | None:
    found = re.search(
        r"decoder/layers_(\d+)/(\w+)_(local|global)/(.*)", show_path(path)
    )
    if found is None:
        return None
    pair, module, kind, rest = found.groups()
    layer = 2 * int(pair) + _GEMMA2_KINDS.index(kind)
    return Depth("decoder", f"{module}/{rest}", layer)


@preset({})
def maxtext_gemma4(
    *, scan_axis: int = 1, num_local: int = 5, num_layers: int | None = None
) -> DepthSpec:
    r"""MaxText's Gemma 4: scanned blocks of scanned local layers and a global one.

    Attention differs in shape between the two kinds, so each is coupled over the other
    (`ranked`); what has one shape in both is one chain.

    Args:
      scan_axis: the configuration's `param_scan_axis`.
      num_local: how many local layers come before the global one.
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {"decoder": {"scanned_blocks": {  # two blocks of 5 + 1 layers
      ...     "local_layers": {"norm": {"scale": jnp.ones((4, 2, 5))}},
      ...     "global_layer": {"norm": {"scale": jnp.ones((4, 2))}},
      ... }}}
      >>> group, = gs.describe(gs.layouts.maxtext_gemma4(), params).groups
      >>> group.role, group.layers
      ('norm/scale', (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11))
    """
    cycle = num_local + 1
    return ranked(
        first_match(
            scanned(
                "scanned_blocks/local_layers/",
                axis=(scan_axis, scan_axis + 1),
                stride=(cycle, 1),
                stack="decoder",
            ),
            scanned(
                "scanned_blocks/global_layer/",
                axis=scan_axis,
                start=num_local,
                stride=cycle,
                stack="decoder",
            ),
        )
    )


@preset(
    *({"num_dense": n} for n in range(1, 5)),
    *({"num_dense": n, "scan_axis": None} for n in range(1, 5)),
)
def maxtext_deepseek(
    num_dense: int,
    *,
    scan_axis: int | None = 1,
    num_outside: int | None = None,
    pipeline_axis: int | tuple[int, ...] = (0, 1),
    num_layers: int | None = None,
) -> DepthSpec:
    r"""MaxText's DeepSeek: dense layers, then layers with experts, as one stack.

    Args:
      num_dense: the configuration's `first_num_dense_layers`.
      scan_axis: the configuration's `param_scan_axis`; None for `scan_layers=false`.
      num_outside: how many layers with experts come before a pipeline of the others,
        for those to go on after them. Without it they are a stack of their own.
      pipeline_axis: the depth axes of the pipeline, as in `maxtext_pipeline`.
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> params = {"decoder": {
      ...     "dense_layers": {"norm": {"scale": jnp.ones((4, 1))}},
      ...     "moe_layers": {"norm": {"scale": jnp.ones((4, 3))}},
      ... }}
      >>> spec = gs.layouts.maxtext_deepseek(num_dense=1)
      >>> group, = gs.describe(spec, params).groups
      >>> group.role, group.layers
      ('norm/scale', (0, 1, 2, 3))
    """
    if scan_axis is None:
        return first_match(
            unrolled(r"decoder/dense_layers_(\d+)/", stack="decoder"),
            unrolled(r"decoder/moe_layers_(\d+)/", start=num_dense, stack="decoder"),
        )
    pipeline = maxtext_pipeline(pipeline_axis)
    if num_outside is not None:
        start = num_dense + num_outside
        pipeline = scanned(_PIPELINE, axis=pipeline_axis, start=start, stack="decoder")
    return first_match(
        scanned("decoder/dense_layers/", axis=scan_axis, stack="decoder"),
        scanned(
            "decoder/moe_layers/", axis=scan_axis, start=num_dense, stack="decoder"
        ),
        pipeline,
    )


_PIPELINE = "pipeline_module/layers/(?:scanned_layers/)?"


@preset({})
def maxtext_pipeline(
    axis: int | tuple[int, ...] = (0, 1),
    *,
    layers_per_stage: int = 1,
    num_stages: int | None = None,
    num_pipelined: int | None = None,
    scan_axis: int = 1,
    num_layers: int | None = None,
) -> DepthSpec:
    r"""MaxText with pipeline parallelism: repeats, stages, layers per stage.

    Also the layers outside of a pipeline over a part of them, and DeepSeek's before it.

    Args:
      axis: the depth axes in this order: `(0, 1)` for repeats and stages, `0` without
        repeats, `(0, 1, 3)` and `(0, 2)` with `scan_layers_per_stage` and the default
        `param_scan_axis` of 1.
      layers_per_stage: the configuration's `num_layers_per_pipeline_stage`, where they
        are not scanned but are `layers_0`, `layers_1`, … of a stage.
      num_stages: how many stages there are; needed for repeats and several layers per
        stage, where the next repeat goes on after all of them.
      num_pipelined: the configuration's `pipeline_parallel_layers`, for
        `layers_outside_pipeline` to go on after them. Without it those are a stack of
        their own. For DeepSeek see `maxtext_deepseek`.
      scan_axis: the configuration's `param_scan_axis`, of the layers outside.
      num_layers: how many layers each stack must have; another number is an error.

    Returns:
      A spec: see `DepthSpec`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax.numpy as jnp
      >>> layers = {"mlp": {"wo": {"kernel": jnp.ones((2, 4, 8, 4))}}}
      >>> params = {"decoder": {"pipeline_module": {"layers": layers}}}
      >>> group, = gs.describe(gs.layouts.maxtext_pipeline(), params).groups
      >>> group.role, group.num_layers
      ('mlp/wo/kernel', 8)
    """
    stack = None if num_pipelined is None else "decoder"
    start = num_pipelined or 0
    outside = (
        scanned("layers_outside_pipeline/", axis=scan_axis, start=start, stack=stack),
        unrolled(r"layers_outside_pipeline_(\d+)/", start=start, stack=stack),
        scanned(r"decoder/(?:dense|moe)_layers/", axis=scan_axis),
    )
    if layers_per_stage == 1:
        return first_match(scanned(_PIPELINE, axis=axis, stack=stack), *outside)
    if axis == 0:
        stride: int | tuple[int, ...] = layers_per_stage
    elif num_stages is None:
        raise ValueError(
            "`num_stages` of `maxtext_pipeline` is needed with repeats and several "
            "layers per stage: `maxtext_pipeline((0, 1), layers_per_stage=2, "
            "num_stages=4)`."
        )
    else:
        stride = (num_stages * layers_per_stage, layers_per_stage)
    positions = r"pipeline_module/layers/layers_(\d+)/"
    return first_match(
        scanned(positions, axis=axis, stride=stride, stack=stack), *outside
    )
