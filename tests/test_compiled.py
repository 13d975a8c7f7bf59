"""What the compiler makes of it: memory traffic, layouts, sharding."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
import test_operators
from jax import export

import gradsmooth_optax as gs

pytestmark = pytest.mark.core


def _compiled(tx, tree):
    return jax.jit(lambda u: tx.update(u, tx.init(u))[0]).lower(tree).compile()


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_stacked_leaf_is_read_once_and_written_once(axis, dtype):
    shape = [64, 96]
    shape.insert(axis, 12)
    tree = {"blocks": {"w": jax.ShapeDtypeStruct(tuple(shape), dtype)}}
    tx = gs.smooth_over_depth(gs.scanned("blocks/", axis=axis), 0.2)
    compiled = _compiled(tx, tree)
    assert compiled.memory_analysis().temp_size_in_bytes == 0
    size = tree["blocks"]["w"].size * jnp.dtype(dtype).itemsize
    cost = compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    assert cost["bytes accessed"] <= 2.05 * size


def test_unrolled_leaves_are_never_stacked():
    layers = [jax.ShapeDtypeStruct((8, 4), jnp.float32) for _ in range(12)]
    tx = gs.smooth_over_depth(gs.unrolled(), 0.2)
    jaxpr = jax.make_jaxpr(lambda u: tx.update(u, tx.init(u))[0])(layers)
    primitives = {equation.primitive.name for equation in jaxpr.jaxpr.eqns}
    assert primitives <= {"sub", "mul", "add"}


@pytest.mark.parametrize("variant", ["standard", "norm_preserving", "directional"])
def test_it_lowers_for_every_platform_without_custom_calls(variant):
    tree = {
        "blocks": {"w": jax.ShapeDtypeStruct((12, 8, 4), jnp.bfloat16)},
        "layers": [jax.ShapeDtypeStruct((8, 4), jnp.float32) for _ in range(3)],
    }
    depth = gs.first_match(gs.scanned("blocks/"), gs.unrolled(r"layers/(\d+)"))
    tx = gs.smooth_over_depth(depth, 0.2, variant=variant, norm_scope="block")
    update = jax.jit(lambda u: tx.update(u, tx.init(u))[0])
    exported = export.export(update, platforms=["cpu", "cuda", "tpu"])(tree)
    assert "stablehlo.custom_call" not in exported.mlir_module()


@pytest.mark.parametrize("name", test_operators.EVERY)
def test_every_operator_lowers_for_accelerators_without_custom_calls(name):
    tree = {
        "blocks": {"w": jax.ShapeDtypeStruct((12, 8, 4), jnp.bfloat16)},
        "layers": [jax.ShapeDtypeStruct((8, 4), jnp.float32) for _ in range(6)],
    }
    depth = gs.first_match(gs.scanned("blocks/"), gs.unrolled(r"layers/(\d+)"))

    def update(updates, strength):
        for given in (test_operators.STRENGTH, strength):
            operator = test_operators.make(name, given)
            tx = gs.smooth_over_depth(depth, operator, variant="directional")
            updates, _ = tx.update(updates, tx.init(updates))
        return updates

    strength = jax.ShapeDtypeStruct((), jnp.float32)
    exported = export.export(jax.jit(update), platforms=["cuda", "tpu"])(tree, strength)
    text = exported.mlir_module()
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


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import gradsmooth_optax as gs

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("depth", "model"))
sharding = NamedSharding(mesh, P("depth", None, "model"))
x = jax.random.normal(jax.random.key(0), (8, 6, 4))
updates = {"blocks": {"w": jax.device_put(x, sharding)}}
for variant in ("standard", "norm_preserving", "directional"):
    tx = gs.smooth_over_depth(gs.scanned("blocks/"), 0.3, variant=variant)
    step = jax.jit(lambda u: tx.update(u, tx.init(u))[0])
    out = step(updates)["blocks"]["w"]
    assert out.sharding.is_equivalent_to(sharding, 3), out.sharding
    alone = step({"blocks": {"w": x}})["blocks"]["w"]
    np.testing.assert_allclose(out, alone, rtol=2e-6, atol=1e-7)
    text = step.lower(updates).compile().as_text()
    assert "all-gather" not in text
    if variant == "standard":
        assert text.count(" collective-permute(") == 2, text
print("sharded depth is fine")
"""


_SPLIT_APART = """
import itertools
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
import gradsmooth_optax as gs

mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
specs = {"one": P("a"), "two": P(("a", "b")), "other": P(None, "b"), "none": P()}
leaves = {
    name: jax.random.normal(jax.random.key(i), (16, 4, 2))
    for i, name in enumerate(specs)
}
transformations = {
    "norm_preserving": gs.smooth_over_depth(
        gs.scanned("blocks/"), 0.3, variant="norm_preserving", norm_scope="block"
    ),
    "similarity": gs.smooth_over_depth(
        gs.scanned("blocks/"), gs.similarity_window(0.3)
    ),
    "window": gs.smooth_over_depth(gs.scanned("blocks/"), 0.3),
    "tikhonov": gs.smooth_over_depth(gs.scanned("blocks/"), gs.tikhonov(1.0)),
}

def split(names, specs):
    return {n: jax.device_put(leaves[n], NamedSharding(mesh, specs[n])) for n in names}

for name, tx in transformations.items():
    step = lambda u: tx.update({"blocks": u}, tx.init({"blocks": u}))[0]["blocks"]
    for names in itertools.combinations(specs, 2):
        alone = step({n: leaves[n] for n in names})
        out = jax.jit(step)(split(names, specs))
        for n in names:
            np.testing.assert_allclose(out[n], alone[n], rtol=1e-5, atol=1e-6)
            wanted = NamedSharding(mesh, specs[n])
            assert out[n].sharding.is_equivalent_to(wanted, 3), (name, names, n)
    # Updates that are everywhere, for parameters that are split.
    alone = step({"none": leaves["none"]})["none"]
    for spec in (P("a"), P(("a", "b"))):
        shardings = {"none": NamedSharding(mesh, spec)}
        out = jax.jit(step, out_shardings=shardings)(split(["none"], specs))
        np.testing.assert_allclose(out["none"], alone, rtol=1e-5, atol=1e-6)

# Several stacked leaves in one matmul.
cycle = {f"layers_{i}": {"w": leaves[n]} for i, n in enumerate(["one", "two"])}
for spec in (P("a"), P("a", "b")):
    shardings = jax.tree.map(lambda _: NamedSharding(mesh, spec), cycle)
    depth = gs.scanned(r"layers_(\\d+)/", stride=2, stack="all")
    tx = gs.smooth_over_depth(depth, gs.tikhonov(1.0))
    step = lambda u: tx.update(u, tx.init(u))[0]
    alone, out = step(cycle), jax.jit(step)(jax.device_put(cycle, shardings))
    for name in cycle:
        found, wanted = out[name]["w"], alone[name]["w"]
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
        assert found.sharding.is_equivalent_to(shardings[name]["w"], 3), spec
print("split apart is fine")
"""


def _on_eight_devices(script):
    # The number of devices is fixed when jax starts, hence a process of its own.
    flags = "--xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_sharded_layer_axis_keeps_its_sharding_and_moves_only_a_halo():
    run = _on_eight_devices(_SHARDED)
    assert "sharded depth is fine" in run.stdout, run.stderr


def test_leaves_of_one_block_may_be_split_each_in_its_own_way():
    # The partitioner computes wrong numbers for the negative padding of an array that
    # is on all devices where the result is split.
    run = _on_eight_devices(_SPLIT_APART)
    assert "split apart is fine" in run.stdout, run.stderr
