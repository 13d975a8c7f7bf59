"""What the compilers are asked to compile, and what is asked of the result.

A case is a jitted function of abstract arguments, so that nothing needs memory or the
hardware. Each is what a user would run: one update, or a whole step whose parameters
and state are donated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gradsmooth_optax as gs
from benchmarks.cost.operators import operators
from benchmarks.models.gpt import GPT

# The least and the most that a measure may be.
Bar = tuple[float, float]


class Bars(NamedTuple):
    """What is asked of each compiler: measure -> least and most."""

    tpu: Mapping[str, Bar] = {}
    gpu: Mapping[str, Bar] = {}


class Case(NamedTuple):
    """Something to compile.

    Attributes:
      name: what it is.
      function: jitted.
      arguments: abstract, with shardings.
      unit: bytes of updates on one device, which other bytes are measured in.
      bars: what is asked.
      base: name of an earlier case whose measures this one's are also divided by.
    """

    name: str
    function: Any
    arguments: tuple
    unit: int
    bars: Bars = Bars()
    base: str | None = None

    @property
    def num_devices(self) -> int:
        """Over how many devices its arguments lie."""
        leaves = jax.tree.leaves(self.arguments)
        return max(len(leaf.sharding.device_set) for leaf in leaves)


class Sizes(NamedTuple):
    """How large the cases are, which results depend on.

    What fits the memory on a TPU's chip costs nothing in its main memory, and GPUs fuse
    small arrays otherwise than large ones.

    Attributes:
      layers: of every stack; where the layer axis is sharded, each device has a
        fourth of it.
      width: of a stacked leaf, `(layers, width, width)`, and twice that of the
        transformer in the steps.
      small: layers and width of a small transformer, which GPUs fuse otherwise.
      unrolled: layers of the cases with one leaf per layer.
      gpt: of the whole training step, arguments of `GPT`.
      batch: its sequences.
    """

    layers: int
    width: int
    small: tuple[int, int]
    unrolled: int
    gpt: Mapping[str, Any]
    batch: int


# Leaves too large for the memory on a TPU's chip. A v5e still keeps a halo there.
FULL = Sizes(
    layers=48,
    width=2048,
    small=(12, 256),
    unrolled=24,
    # 2.44B parameters.
    gpt={
        **{"layers": 30, "width": 2560, "heads": 20},
        **{"vocabulary": 32768, "context": 1024},
    },
    batch=16,
)

STACKED = gs.scanned("blocks/")

_NO_BARS = Bars()
_NOTHING: Bar = (0, 0)
_NO_TEMPORARIES: Bar = (0, 0.005)
# One read and one write; of the GPU compiler 1.05 of them.
_WINDOW = Bars(
    tpu={"bytes": (0, 2.05), "temporaries": _NO_TEMPORARIES, "collectives": _NOTHING},
    gpu={
        "traffic": (0, 2.1),
        "temporaries": _NO_TEMPORARIES,
        "kernels": (1, 1),
        "collectives": _NOTHING,
        "custom calls": _NOTHING,
    },
)
# 7 reads and writes without smoothing; a materialized update needs 2 more.
_ONE_UPDATE = Bars(
    tpu={"bytes": (0, 9.2), "temporaries": (0, 0.7)},
    gpu={"traffic / base": (0, 1.32), "custom calls": _NOTHING},
)

# To the compilers a layer by itself is not more than the whole leaf.
_SAME_AS_BASE = Bars(
    tpu={"bytes / base": (0, 1.01), "temporaries": _NO_TEMPORARIES},
    gpu={"custom calls": _NOTHING},
)


def cases(devices: Sequence[Any], sizes: Sizes = FULL) -> list[Case]:
    """Returns every case, for these devices."""
    return [
        *updates(devices, sizes),
        *sharded(devices, sizes),
        *steps(devices, sizes),
        *each_layer(devices, sizes),
        *training(devices, sizes),
    ]


def updates(devices: Sequence[Any], sizes: Sizes) -> list[Case]:
    """Returns one update on one device, by layout, dtype, variant and operator."""
    on_one = _replicated(devices[:1])

    def stacked(axis: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
        shape = [sizes.width, sizes.width]
        shape.insert(axis, sizes.layers)
        return {"blocks": {"w": jax.ShapeDtypeStruct(shape, dtype, sharding=on_one)}}

    usual, dtypes = stacked(), (jnp.float32, jnp.bfloat16)
    limit = _jitted(lambda u: jax.tree.map(lambda x: 0.9 * x, u), usual)
    found = [Case("limit: 0.9 u", limit, (usual,), _bytes_per_device(usual))]
    for dtype in dtypes:
        for axis in (0, 1, 2):
            tx = gs.smooth_over_depth(gs.scanned("blocks/", axis=axis), 0.2)
            name = f"window, axis {axis}, {jnp.dtype(dtype).name}"
            found.append(_update(name, tx, stacked(axis, dtype), _WINDOW))
    found.append(
        _update(
            f"window, one leaf per layer, {sizes.unrolled} × 6",
            gs.smooth_over_depth(gs.unrolled(), 0.2),
            _transformer(sizes, on_one, stacked=False),
            Bars(gpu={**_WINDOW.gpu, "kernels": (1, 6)}),
        )
    )
    preserving = Bars(gpu={"traffic": (0, 4.2), "custom calls": _NOTHING})
    variants: dict[Any, Bars] = {"norm_preserving": preserving, "directional": _NO_BARS}
    for variant, bars in variants.items():
        tx = gs.smooth_over_depth(STACKED, 0.2, variant=variant)
        for dtype in dtypes:
            name = f"{variant}, {jnp.dtype(dtype).name}"
            found.append(_update(name, tx, stacked(0, dtype), bars))
    for name, operator in operators().items():
        found.append(_update(name, gs.smooth_over_depth(STACKED, operator), usual))
    return found


def sharded(devices: Sequence[Any], sizes: Sizes) -> list[Case]:
    """Returns one update whose layer axis lies over all devices, and over none."""
    mesh = Mesh(np.array(devices), ("stage",))
    layers = max(2, sizes.layers // 4) * len(devices)

    def leaf(*spec: str | None) -> dict[str, Any]:
        shape = (layers, sizes.width, sizes.width)
        sharding = NamedSharding(mesh, P(*spec))
        one = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
        return {"blocks": {"w": one}}

    on_layers, inside = leaf("stage"), leaf(None, "stage")

    def in_stages(name: str, operator: Any, bars: Bars = _NO_BARS) -> Case:
        tx = gs.smooth_over_depth(STACKED, operator, axis_name="stage")
        each = jax.shard_map(
            lambda u: tx.update(u, tx.init(u))[0],
            **{"mesh": mesh, "in_specs": P("stage"), "out_specs": P("stage")},
        )
        function, unit = _jitted(each, on_layers), _bytes_per_device(on_layers)
        return Case(f"{name}, shard_map", function, (on_layers,), unit, bars)

    two: dict[str, Bar] = {"collective-permute": (2, 2), "collectives": (2, 2)}
    on_gpu: dict[str, Bar] = {**two, "custom calls": _NOTHING}
    in_place: dict[str, Bar] = {**two, "bytes": (0, 3.8), "temporaries": (0, 0.15)}
    permutes: dict[str, Bar] = {"collective-permute": (2, 2)}
    window = gs.smooth_over_depth(STACKED, 0.2)
    preserving = gs.smooth_over_depth(STACKED, 0.2, variant="norm_preserving")
    similarity = gs.similarity_window(0.2)
    of_similarity = gs.smooth_over_depth(STACKED, similarity)
    matched = gs.controls.norm_matched(gs.window(0.2))
    return [
        _update("window, inner axis sharded", window, inside, _WINDOW),
        _update("window, layers sharded", window, on_layers, Bars(two, on_gpu)),
        in_stages("window, layers sharded", 0.2, Bars(in_place, on_gpu)),
        _update(
            *("norm_preserving, layers sharded", preserving, on_layers),
            Bars(permutes, permutes),
        ),
        _update("similarity_window, layers sharded", of_similarity, on_layers),
        in_stages("similarity_window, layers sharded", similarity),
        in_stages("norm_matched window, layers sharded", matched),
    ]


def steps(devices: Sequence[Any], sizes: Sizes) -> list[Case]:
    """Returns steps of optimizers on one device, without smoothing and with it."""
    on_one = _replicated(devices[:1])
    stacked = _transformer(sizes, on_one)
    bfloat16 = _transformer(sizes, on_one, dtype=jnp.bfloat16)
    few, narrow = sizes.small
    small = _transformer(sizes._replace(layers=few, width=2 * narrow), on_one)
    unrolled = _transformer(sizes, on_one, stacked=False)
    one_leaf = {"blocks": {"w": _leaf(sizes, on_one)}}

    smooth = gs.smooth_over_depth(STACKED, 0.2)
    of_leaves = gs.smooth_over_depth(gs.unrolled(), 0.2)
    preserving = gs.smooth_over_depth(STACKED, 0.2, variant="norm_preserving")
    found: list[Case] = []

    def pair(
        name: str, base: Any, smoothed: Any, params: Any, bars: Bars = _NO_BARS
    ) -> None:
        of_base = f"step, {name}: base"
        found.append(_step(of_base, base, params))
        found.append(_step(f"step, {name}", smoothed, params, bars, of_base))

    def adam(*parts: Any) -> Any:
        rate = optax.scale_by_learning_rate(1e-3)
        return optax.chain(optax.scale_by_adam(), *parts, rate)

    def at_most(cycles: float, traffic: float) -> Bars:
        """Figures of two digits, as what was found with a barrier."""
        return Bars(
            tpu={"cycles / base": (0, cycles + 0.005)},
            gpu={"traffic / base": (0, traffic + 0.005)},
        )

    def on_both(name: str, base: Any, smoothed: Any, bars: Bars) -> None:
        # The ratio of cycles depends on the tree. Its bar is that of one leaf.
        pair(name, base, smoothed, stacked, Bars(gpu=bars.gpu))
        pair(f"{name}, one leaf", base, smoothed, one_leaf, bars)

    gpu_alone = Bars(gpu=_ONE_UPDATE.gpu)
    pair("Adam", adam(), adam(smooth), stacked, _ONE_UPDATE)
    # In bfloat16 the TPU's base is not 7.
    in_bfloat16 = _ONE_UPDATE._replace(tpu={"temporaries": (0, 0.7)})
    pair("Adam, bfloat16", adam(), adam(smooth), bfloat16, in_bfloat16)
    pair("Adam, small", adam(), adam(smooth), small, gpu_alone)
    pair("Adam, one leaf per layer", adam(), adam(of_leaves), unrolled, gpu_alone)
    ours = gs.adamw(1e-3, smooth, weight_decay=1e-4)
    pair("gs.adamw", optax.adamw(1e-3), ours, stacked, _ONE_UPDATE)
    pair("Adam, norm-preserving", adam(), adam(preserving), stacked)
    twice, bars = adam(smooth, smooth), at_most(2.10, 1.57)
    on_both("Adam, smoothed twice", adam(), twice, bars)
    pair("Adam, smoothed twice, small", adam(), twice, small, Bars(gpu=bars.gpu))
    for name, base, bars in (
        ("adamw", optax.adamw(1e-3), at_most(1.68, 1.43)),
        ("lion", optax.lion(1e-3), at_most(1.96, 1.60)),
        ("rmsprop", optax.rmsprop(1e-3), at_most(1.77, 1.40)),
    ):
        on_both(f"{name}(), then smoothed", base, optax.chain(base, smooth), bars)

    permuted = "step, Adam, results in another order"
    of_base = _step(f"{permuted}: base", adam(), stacked, in_order=False)
    other = _step(permuted, adam(smooth), stacked, base=of_base.name, in_order=False)
    return [*found, of_base, other]


def each_layer(devices: Sequence[Any], sizes: Sizes) -> list[Case]:
    """Returns steps that treat every layer by itself, beside the whole leaf's."""
    on_one, rate = _replicated(devices[:1]), optax.scale_by_learning_rate(1e-3)
    found = []
    for axis, name, inner in (
        (0, "scale_by_adam", optax.scale_by_adam()),
        (1, "scale_by_adam", optax.scale_by_adam()),
        (0, "scale_by_trust_ratio", optax.scale_by_trust_ratio()),
        (0, "clip_by_block_rms", optax.clip_by_block_rms(1.0)),
        (0, "scale_by_factored_rms", optax.scale_by_factored_rms()),
        (0, "adaptive_grad_clip", optax.adaptive_grad_clip(0.1)),
    ):
        params = {"blocks": {"w": _leaf(sizes, on_one, axis)}}
        layered = gs.per_layer(inner, gs.scanned("blocks/", axis=axis))
        base = _step(
            f"step, {name}, axis {axis}: base", optax.chain(inner, rate), params
        )
        each = f"step, per_layer({name}), axis {axis}"
        layered = optax.chain(layered, rate)
        found += [base, _step(each, layered, params, _SAME_AS_BASE, base.name)]
    decay = gs.scale_over_depth(STACKED, gs.layer_wise_decay(0.75))
    leaf = {"blocks": {"w": _leaf(sizes, on_one)}}
    return [*found, _update("scale_over_depth", decay, leaf)]


def training(devices: Sequence[Any], sizes: Sizes) -> list[Case]:
    """Returns a whole training step of a GPT, its parameters over all devices."""
    mesh = Mesh(np.array(devices), ("data",))
    model = GPT(**sizes.gpt, remat=True, dtype=jnp.bfloat16)
    tokens = jax.ShapeDtypeStruct(
        (sizes.batch, sizes.gpt["context"]),
        jnp.int32,
        sharding=NamedSharding(mesh, P("data")),
    )

    def laid_out(leaf: Any) -> Any:
        """The last axis of every matrix over all devices, which is never the layers."""
        spec = P(*[None] * (leaf.ndim - 1), "data") if leaf.ndim > 1 else P()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), "i4"))
    )
    params = jax.tree.map(laid_out, shapes["params"])

    def loss_of(params: Any, tokens: jax.Array) -> jax.Array:
        logits: Any = model.apply({"params": params}, tokens)
        return optax.softmax_cross_entropy_with_integer_labels(
            logits[:, :-1], tokens[:, 1:]
        ).mean()

    def case(
        name: str, tx: Any, bars: Bars = _NO_BARS, base: str | None = None
    ) -> Case:
        state = jax.tree.map(laid_out, jax.eval_shape(tx.init, params))

        def step(params: Any, state: Any, tokens: jax.Array) -> tuple:
            loss, gradients = jax.value_and_grad(loss_of)(params, tokens)
            updates, state = tx.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, loss

        shardings = jax.tree.map(lambda x: x.sharding, (params, state))
        function = jax.jit(
            step,
            donate_argnums=(0, 1),
            out_shardings=(*shardings, NamedSharding(mesh, P())),
        )
        unit = _bytes_per_device(params)
        return Case(name, function, (params, state, tokens), unit, bars, base)

    smoothed = gs.adamw(1e-3, gs.smooth_over_depth(STACKED, 0.2))
    base = case("training step of a GPT: base", optax.adamw(1e-3))
    same = Bars(*[{"collectives / base": (1.0, 1.0)}] * 2)
    return [base, case("training step of a GPT", smoothed, same, base.name)]


def _update(name: str, tx: Any, updates: Any, bars: Bars = _NO_BARS) -> Case:
    """The case of one update by a transformation."""

    def update(updates: Any) -> Any:
        return tx.update(updates, tx.init(updates))[0]

    unit = _bytes_per_device(updates)
    return Case(name, _jitted(update, updates), (updates,), unit, bars)


def _step(
    name: str,
    tx: Any,
    params: Any,
    bars: Bars = _NO_BARS,
    base: str | None = None,
    *,
    in_order: bool = True,
) -> Case:
    """The case of an optimizer's step, with the parameters and the state donated.

    With `in_order` the results come in the order of the arguments that they overwrite.
    Else each takes the memory of another one of its shape, which may still be needed:
    the compilers then copy.
    """
    (sharding,) = {leaf.sharding for leaf in jax.tree.leaves(params)}
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(tx.init, params),
    )

    def step(params: Any, state: Any, gradients: Any) -> tuple:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    def permuted(gradients: Any, state: Any, params: Any) -> tuple:
        return step(params, state, gradients)

    chosen, donated = (step, (0, 1)) if in_order else (permuted, (1, 2))
    function = jax.jit(chosen, donate_argnums=donated, out_shardings=sharding)
    unit = _bytes_per_device(params)
    return Case(name, function, (params, state, params), unit, bars, base)


def _transformer(
    sizes: Sizes, sharding: Any, *, stacked: bool = True, dtype: Any = jnp.float32
) -> dict[str, Any]:
    """The matrices of a transformer, stacked or with one leaf per layer."""
    d = sizes.width // 2
    roles = dict.fromkeys(("query", "key", "value", "out"), (d, d))
    roles |= {"mlp_in": (d, 4 * d), "mlp_out": (4 * d, d)}

    def leaves(*leading: int) -> dict[str, Any]:
        return {
            role: jax.ShapeDtypeStruct((*leading, *shape), dtype, sharding=sharding)
            for role, shape in roles.items()
        }

    if stacked:
        return {"blocks": leaves(sizes.layers)}
    return {f"layers_{i}": leaves() for i in range(sizes.unrolled)}


def _leaf(sizes: Sizes, sharding: Any, axis: int = 0) -> Any:
    """A matrix of each layer, stacked along an axis."""
    shape = [sizes.width // 4, sizes.width // 2]
    shape.insert(axis, sizes.layers)
    return jax.ShapeDtypeStruct(tuple(shape), jnp.float32, sharding=sharding)


def _jitted(function: Callable, updates: Any) -> Any:
    shardings = jax.tree.map(lambda x: x.sharding, updates)
    return jax.jit(function, out_shardings=shardings)


def _replicated(devices: Sequence[Any]) -> NamedSharding:
    return NamedSharding(Mesh(np.array(devices), ("data",)), P())


def _bytes_per_device(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
