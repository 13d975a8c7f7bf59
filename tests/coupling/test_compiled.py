"""What the compiler makes of it: memory traffic, layouts, other platforms."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax import export
from operator_table import EVERY, STRENGTH, make

import gradsmooth_optax as gs

pytestmark = pytest.mark.core


def update_of(tx):
    return jax.jit(lambda u: tx.update(u, tx.init(u))[0])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_stacked_leaf_is_read_once_and_written_once(axis, dtype):
    shape = [64, 96]
    shape.insert(axis, 12)
    tree = {"blocks": {"w": jax.ShapeDtypeStruct(tuple(shape), dtype)}}
    tx = gs.smooth_over_depth(gs.scanned("blocks/", axis=axis), 0.2)
    compiled = update_of(tx).lower(tree).compile()
    assert compiled.memory_analysis().temp_size_in_bytes == 0
    size = tree["blocks"]["w"].size * jnp.dtype(dtype).itemsize
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    assert cost["bytes accessed"] <= 2.05 * size


def primitives_of(operator, depth, tree):
    tx = gs.smooth_over_depth(depth, operator)
    jaxpr = jax.make_jaxpr(lambda u: tx.update(u, tx.init(u))[0])(tree)
    return [equation.primitive.name for equation in jaxpr.jaxpr.eqns]


def test_unrolled_leaves_are_stacked_for_wide_operators_only():
    layers = [jax.ShapeDtypeStruct((8, 4), jnp.float32) for _ in range(12)]
    narrow = primitives_of(gs.window(0.2), gs.unrolled(), layers)
    assert set(narrow) <= {"sub", "mul", "add"}
    for radius, num_products in ((6, 0), (7, 1)):
        for operator in (gs.window(0.2, radius), gs.gaussian(2.0, radius)):
            found = primitives_of(operator, gs.unrolled(), layers)
            assert found.count("dot_general") == num_products


def test_a_stack_is_shifted_for_a_narrow_band_and_multiplied_for_a_wide_one():
    tree = {"blocks": jax.ShapeDtypeStruct((12, 8, 4), jnp.float32)}
    for radius, num_products in ((3, 0), (4, 1)):
        for operator in (gs.window(0.2, radius), gs.gaussian(2.0, radius)):
            found = primitives_of(operator, gs.scanned("blocks"), tree)
            assert found.count("dot_general") == num_products
            assert ("pad" in found) == (num_products == 0)
    # One-sided: by the layers before alone.
    found = primitives_of(gs.dense(jnp.eye(12, k=-1)), gs.scanned("blocks"), tree)
    assert found.count("pad") == 1


def test_every_operator_lowers_for_every_platform_without_custom_calls():
    tree = {
        "blocks": {"w": jax.ShapeDtypeStruct((12, 8), jnp.bfloat16)},
        "layers": [jax.ShapeDtypeStruct((8,), jnp.float32) for _ in range(5)],
    }
    depth = gs.first_match(gs.scanned("blocks/"), gs.unrolled(r"layers/(\d+)"))
    variants = ("standard", "norm_preserving", "directional")

    def update(updates, strength):
        for i, name in enumerate(EVERY):
            given = STRENGTH if i % 2 else strength
            is_linear = make(name).has_matrix
            tx = gs.smooth_over_depth(
                depth,
                make(name, given),
                variant=variants[i % 3] if name == "window" else "standard",
                norm_scope="block" if is_linear else "param",
            )
            updates, _ = tx.update(updates, tx.init(updates))
        for variant in variants:
            tx = gs.smooth_over_depth(depth, 0.2, variant=variant, norm_scope="block")
            updates, _ = tx.update(updates, tx.init(updates))
        return updates

    strength = jax.ShapeDtypeStruct((), jnp.float32)
    exported = export.export(jax.jit(update), platforms=["cpu", "cuda", "tpu"])
    text = exported(tree, strength).mlir_module()
    calls = [line for line in text.splitlines() if "stablehlo.custom_call" in line]
    assert calls == []


@pytest.mark.skipif(
    jax.__version_info__ < (0, 12),
    reason="XLA for CPU of jax 0.10 removes optimization barriers before it fuses",
)
def test_an_update_is_computed_once_on_cpu_and_not_for_each_shifted_copy():
    # Else rmsprop before smoothing takes several times as long: docs/guides/cost.md.
    tx = optax.chain(
        optax.rmsprop(1e-3), gs.smooth_over_depth(gs.scanned("blocks/"), 0.2)
    )
    tree = {"blocks": {"w": jax.ShapeDtypeStruct((12, 64, 64), jnp.float32)}}
    state = jax.eval_shape(tx.init, tree)
    text = jax.jit(tx.update).lower(tree, state, tree).compile().as_text()
    kernels = [part for part in text.split("\n\n") if " rsqrt(" in part]
    assert kernels
    assert not [kernel for kernel in kernels if " pad(" in kernel]
