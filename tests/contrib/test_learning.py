"""`learn_alpha` and `learn_operator`: the gradients themselves teach the coupling.

How they behave as any other transformation does, under `jit`, in chains, as saved
states, is in `tests/transforms`.
"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest

import gradsmooth_optax as gs

SCANNED = gs.scanned("blocks/")
UNROLLED = gs.unrolled(r"layers_(\d+)/")
LEARNERS = {
    "learn_alpha": gs.contrib.learn_alpha,
    "learn_operator": gs.contrib.learn_operator,
}
both_learners = pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)


def learned_of(state):
    """α or the weights, of the only stack."""
    (value,) = (state.alpha if hasattr(state, "alpha") else state.weights).values()
    return value


def stack(num_layers=4, seed=0, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=(num_layers, 3))
    return {"blocks": {"w": jnp.asarray(values, dtype)}}


def several(number, **kwargs):
    return [stack(seed=seed, **kwargs) for seed in range(number)]


def run(tx, steps, state=None):
    """All updates and states over a sequence of gradients, in one compilation."""
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *steps)

    def body(state, gradients):
        updates, state = tx.update(gradients, state)
        return state, (updates, state)

    @jax.jit
    def scan(state, stacked):
        return jax.lax.scan(body, state, stacked)[1]

    found = jax.device_get(scan(tx.init(steps[0]) if state is None else state, stacked))
    return [jax.tree.map(lambda x, i=i: x[i], found) for i in range(len(steps))]


# The same in plain loops, from the equations of the docstrings.


class Twin:
    """Both learners in float64; updates are lists of {role: array}, `inner` is none.

    A parameter is a key (layer, role), a unit a set of parameters with one number.
    """

    def __init__(self, signal, learning_rate, decay, highest):
        self.signal, self.learning_rate = signal, learning_rate
        self.decay, self.highest = decay, highest
        self.value, self.mean, self.change = {}, {}, {}

    def follow(self, unit, gradients, keys):
        """A step along the cosine of the gradient and the change of the last update."""
        g, v = (flat(blocks, keys) for blocks in (gradients, self.change[unit]))
        norms = np.linalg.norm(g) * np.linalg.norm(v)
        if norms == 0 or not np.isfinite(norms):
            return
        self.mean[unit] = self.decay * self.mean[unit]
        self.mean[unit] += (1 - self.decay) * (g @ v) / norms
        new = self.value[unit] + self.learning_rate * self.mean[unit]
        self.value[unit] = min(max(new, 0.0), self.highest)

    def keep(self, unit, v, y, keys):
        """v, or the part of it that is orthogonal to y."""
        if self.signal == "coupling":
            flat_v, flat_y = flat(v, keys), flat(y, keys)
            share = flat_v @ flat_y / (flat_y @ flat_y)
            v = {key: v[key] - share * y[key] for key in keys}
        self.change[unit] = v


class AlphaTwin(Twin):
    def __init__(self, per, alpha, **kwargs):
        super().__init__(**kwargs)
        self.per, self.alpha = per, alpha

    def update(self, blocks):
        u = parameters(blocks)
        smoothed = parameters(oracle.window(blocks, 1.0))
        v = {key: smoothed[key] - u[key] for key in u}
        units = {}
        for role in sorted({role for _, role in u}):
            for layers in oracle.runs_of(blocks, role):
                for layer in layers:
                    name = {"stack": 0, "role": role, "layer": layer}[self.per]
                    units.setdefault(name, []).append((layer, role))
        y = dict(u)
        for unit, keys in units.items():
            if unit not in self.value:
                self.value[unit], self.mean[unit] = self.alpha, 0.0
                self.change[unit] = {key: 0 * u[key] for key in keys}
            self.follow(unit, u, keys)
            for key in keys:
                y[key] = u[key] + self.value[unit] * v[key]
            self.keep(unit, {key: v[key] for key in keys}, y, keys)
        return y


class OperatorTwin(Twin):
    def __init__(self, radius, alpha, **kwargs):
        super().__init__(**kwargs)
        self.radius, self.weight = radius, alpha / (2 * radius)

    def update(self, blocks):
        u = parameters(blocks)
        matrix_of = {}
        pairs = {}
        for role in sorted({role for _, role in u}):
            for layers in oracle.runs_of(blocks, role):
                for i, first in enumerate(layers):
                    for second in layers[i + 1 : i + 1 + self.radius]:
                        pairs.setdefault((first, second), []).append(role)
        y = dict(u)
        for pair, roles in pairs.items():
            keys = [(layer, role) for layer in pair for role in roles]
            if pair not in self.value:
                self.value[pair], self.mean[pair] = self.weight, 0.0
                self.change[pair] = {key: 0 * u[key] for key in keys}
            self.follow(pair, u, keys)
            for role in roles:
                for here, there in (pair, pair[::-1]):
                    matrix_of[here, there, role] = self.value[pair]
        for (here, there, role), weight in matrix_of.items():
            y[here, role] = y[here, role] + weight * (u[there, role] - u[here, role])
        for pair, roles in pairs.items():
            v = {
                (here, role): u[there, role] - u[here, role]
                for role in roles
                for here, there in (pair, pair[::-1])
            }
            self.keep(pair, v, y, list(v))
        return y


def parameters(blocks):
    return {
        (layer, role): np.asarray(x, np.float64)
        for layer, block in enumerate(blocks)
        for role, x in block.items()
    }


def flat(values, keys):
    return np.concatenate([np.ravel(values[key]) for key in keys])


def steps_of(num_steps=4, num_layers=5):
    """Blocks of gradients with a signal that layers share, and noise."""
    shared = oracle.random_blocks(1, seed=99)[0]
    return [
        [
            {role: (x + 0.7 * shared[role]).astype(np.float32) for role, x in b.items()}
            for b in oracle.random_blocks(num_layers, seed=seed)
        ]
        for seed in range(num_steps)
    ]


def without(steps, *holes):
    """The steps without some (layer, role)."""
    return [
        [
            {role: x for role, x in block.items() if (layer, role) not in holes}
            for layer, block in enumerate(blocks)
        ]
        for blocks in steps
    ]


LAYOUTS = {
    "scanned": (SCANNED, lambda blocks: {"blocks": oracle.stacked_tree(blocks)}, True),
    "unrolled": (UNROLLED, oracle.unrolled_tree, True),
    "two runs": (UNROLLED, oracle.unrolled_tree, False),
}
SETTINGS = {"learning_rate": 0.3, "decay": 0.6}


def assert_twins(learn, twin, layout, value_of, **settings):
    """Four steps of a learner are its twin's, in all that it returns and keeps."""
    depth, tree_of, strict = LAYOUTS[layout]
    steps = steps_of() if strict else without(steps_of(), (0, "bias"), (2, "kernel"))
    trees = [jax.tree.map(jnp.asarray, tree_of(blocks)) for blocks in steps]
    settings |= {"strict": strict, "alpha_max": 0.4, **SETTINGS}
    tx = learn(optax.identity(), depth, 0.2, **settings)
    for (updates, state), blocks in zip(run(tx, trees), steps, strict=True):
        expected = twin.update(blocks)
        if layout == "scanned":
            out = parameters(oracle.unstacked(updates["blocks"]))
        else:
            out = parameters([updates[f"layers_{i}"] for i in range(len(blocks))])
        assert out.keys() == expected.keys()
        for key, want in expected.items():
            np.testing.assert_allclose(out[key], want, atol=2e-6)
        for unit in twin.value:
            for values, want in (
                (getattr(state, "alpha", None) or state.weights, twin.value),
                (state.signal, twin.mean),
            ):
                assert values[next(iter(values))].dtype == np.float32
                got = value_of(values, unit)
                assert got == pytest.approx(want[unit], abs=2e-6)
    values = list(twin.value.values())
    assert max(values) - min(values) > 1e-3 or len(values) == 1


@pytest.mark.parametrize(
    ("layout", "per", "signal"),
    [
        ("scanned", "stack", "coupling"),
        ("scanned", "role", "full"),
        ("scanned", "layer", "coupling"),
        ("two runs", "role", "coupling"),
        ("two runs", "layer", "full"),
        ("unrolled", "stack", "full"),
    ],
)
def test_learn_alpha_is_its_twin_of_plain_loops(layout, per, signal):
    twin = AlphaTwin(per, 0.2, signal=signal, highest=0.4, **SETTINGS)
    stack = "blocks" if layout == "scanned" else "layers"

    def value_of(values, unit):
        value = values[f"{stack}/{unit}" if per == "role" else stack]
        return float(value[unit] if per == "layer" else value)

    learn = gs.contrib.learn_alpha
    assert_twins(learn, twin, layout, value_of, per=per, signal=signal)


@pytest.mark.parametrize(
    ("layout", "signal"),
    [("scanned", "coupling"), ("two runs", "coupling"), ("scanned", "full")],
)
def test_learn_operator_is_its_twin_of_plain_loops(layout, signal):
    # Learning rate and bound are those of α = 2 · radius · w.
    of_weight = SETTINGS | {"learning_rate": SETTINGS["learning_rate"] / 4}
    twin = OperatorTwin(2, 0.2, signal=signal, highest=0.1, **of_weight)

    def value_of(values, pair):
        (weights,), (first, second) = values.values(), pair
        return float(weights[second - first - 1, first])

    learn = gs.contrib.learn_operator
    assert_twins(learn, twin, layout, value_of, radius=2, signal=signal)


# -- What the states are ---------------------------------------------------------------


def test_a_learning_rate_of_zero_is_plain_smoothing_of_the_inner_update():
    trees = [{**tree, "head": jnp.ones(2)} for tree in several(2)]
    adam = optax.scale_by_adam()
    learner = gs.contrib.learn_operator(adam, SCANNED, 0.3, learning_rate=0.0)
    plain = gs.with_depth_smoothing(adam, gs.smooth_over_depth(SCANNED, 0.3))
    for (got, state), (want, inner) in zip(
        run(learner, trees), run(plain, trees), strict=True
    ):
        chex.assert_trees_all_close(got, want, rtol=2e-6)
        chex.assert_trees_all_close(state.inner_state, inner, rtol=1e-6)


@both_learners
def test_the_state_holds_one_copy_of_the_coupled_updates_in_a_chosen_dtype(learn):
    params = {**stack(dtype=jnp.bfloat16), "head": jnp.ones(2), "alone": None}
    for dtype, kept in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
        tx = learn(optax.scale_by_adam(), SCANNED, dtype=dtype)
        state = jax.eval_shape(tx.init, params)
        (memory,) = jax.tree.leaves(state.update)
        assert memory.dtype == kept
        assert memory.shape == params["blocks"]["w"].shape
        assert isinstance(state.update["head"], optax.MaskedNode)
        updates, new = jax.eval_shape(tx.update, params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@both_learners
def test_what_is_not_coupled_comes_back_as_the_same_object(learn):
    def apply(params):
        tx = learn(optax.identity(), SCANNED)
        updates, _ = tx.update(params, tx.init(params))
        assert updates["head"] is params["head"]
        assert updates["blocks"]["w"] is not params["blocks"]["w"]
        return updates

    jax.eval_shape(apply, {**stack(), "head": jnp.ones(2)})


@both_learners
def test_the_copy_of_a_complex_update_stays_complex(learn):
    params = jax.tree.map(lambda x: x.astype(jnp.complex64), stack())
    for dtype in (None, jnp.bfloat16, jnp.float32):
        tx = learn(optax.identity(), SCANNED, dtype=dtype)
        (memory,) = jax.tree.leaves(jax.eval_shape(tx.init, params).update)
        assert memory.dtype == jnp.complex64


def test_a_smaller_dtype_of_the_copy_changes_alpha_by_its_rounding_only():
    learn = gs.contrib.learn_alpha
    full, half = (
        run(learn(optax.identity(), SCANNED, dtype=dtype, **SETTINGS), several(3))
        for dtype in (None, jnp.bfloat16)
    )
    difference = np.abs(learned_of(full[-1][1]) - learned_of(half[-1][1])).max()
    assert 0 < difference < 2e-3


@both_learners
def test_placeholders_of_optax_find_the_moments_and_shapes_are_enough(learn):
    tx = learn(optax.scale_by_adam(), SCANNED)
    state = tx.init(stack())
    marked = optax.tree_map_params(tx, lambda x: "moment", state)
    assert marked.inner_state.mu["blocks"]["w"] == "moment"
    assert isinstance(learned_of(marked), jax.Array)
    chex.assert_trees_all_equal(tx.init(jax.eval_shape(stack)), state)


def test_alpha_is_found_in_nested_states_for_logging():
    params = {**stack(), "head": jnp.ones(2)}
    learner = gs.contrib.learn_alpha(optax.scale_by_adam(), SCANNED, 0.2)
    for tx in (
        optax.chain(optax.clip(1.0), learner, optax.scale(-1.0)),
        optax.masked(learner, {"blocks": True, "head": False}),
        optax.apply_if_finite(learner, 3),
    ):
        state = tx.init(params)
        _, after = jax.eval_shape(tx.update, params, state, params)
        assert set(optax.tree_utils.tree_get(after, "alpha")) == {"blocks"}
        found = optax.tree_utils.tree_get(state, "alpha")
        assert float(found["blocks"]) == pytest.approx(0.2)


def test_the_kept_update_is_not_the_buffer_of_the_inner_state():
    tx = gs.contrib.learn_alpha(optax.trace(0.9), SCANNED)
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(stack(), tx.init(stack()))
    kept, trace = state.update["blocks"]["w"], state.inner_state.trace["blocks"]["w"]
    assert kept.unsafe_buffer_pointer() != trace.unsafe_buffer_pointer()
    update(stack(), state)  # Donated twice, a buffer would be an error.


# -- What teaches, and what does not ---------------------------------------------------


def test_alpha_can_leave_zero_and_stays_within_its_bounds():
    shared = jnp.array([[1.0, 1.0], [1.0, -1.0]])
    tx = gs.contrib.learn_alpha(
        optax.identity(), SCANNED, 0.0, learning_rate=9.0, alpha_max=0.25
    )
    # Gradients that point where more coupling would have gone, and then away.
    steps = [{"blocks": {"w": x}} for x in (shared, shared[::-1], shared, shared[::-1])]
    alphas = [float(learned_of(state)) for _, state in run(tx, steps)]
    assert alphas[:2] == [0.0, 0.25]
    away = [steps[0], {"blocks": {"w": -shared[::-1]}}]
    assert float(learned_of(run(tx, away)[-1][1])) == 0.0


@pytest.mark.parametrize(
    ("learn", "options"),
    [(gs.contrib.learn_alpha, {"per": "layer"}), (gs.contrib.learn_operator, {})],
    ids=LEARNERS,
)
def test_updates_that_are_zero_or_not_finite_teach_nothing(learn, options):
    tx = learn(optax.identity(), SCANNED, 0.2, learning_rate=0.3, decay=0.5, **options)
    first, second, third, last = several(4)
    bad = [
        jax.tree.map(lambda x, value=value: jnp.full_like(x, value), first)
        for value in (0.0, jnp.nan, jnp.inf)
    ]
    # Nor does the step after it.
    steps = [first, second, *itertools.chain(*((b, third) for b in bad)), last]
    (_, good), *after, (_, recovered) = run(tx, steps)[1:]
    for _, state in after:
        np.testing.assert_array_equal(learned_of(state), learned_of(good))
        chex.assert_trees_all_equal(state.signal, good.signal)
    assert np.isfinite(learned_of(recovered)).all()
    assert np.any(learned_of(recovered) != learned_of(good))


def test_a_change_along_the_update_teaches_nothing():
    # A role of scalars: what is left of v after the projection is rounding.
    tx = gs.contrib.learn_alpha(optax.identity(), SCANNED, per="layer", decay=0.0)
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(4, 4)).astype("float32")
    _, state = run(tx, [{"blocks": {"rezero": draw}} for draw in draws])[-1]
    np.testing.assert_array_equal(state.signal["blocks"], np.zeros(4))
    np.testing.assert_array_equal(state.alpha["blocks"], np.full(4, 0.1, np.float32))


def test_float64_updates_of_any_size_teach_the_same(enable_x64):
    with enable_x64():
        rng = np.random.default_rng(0)
        draws = jnp.asarray(rng.normal(size=(3, 4, 6)))
        tx = gs.contrib.learn_alpha(optax.identity(), SCANNED)

        @jax.jit
        @jax.vmap
        def signal(scale):
            state = tx.init({"blocks": {"w": draws[0]}})
            for draw in draws:
                _, state = tx.update({"blocks": {"w": draw * scale}}, state)
            return state.signal["blocks"]

        one, small, large = signal(jnp.array([1.0, 1e-25, 1e25]))
        assert one != 0
        np.testing.assert_allclose([small, large], [one, one], rtol=1e-6)


def test_stacks_learn_apart():
    def trees(other):
        return [
            {"a": stack(seed=seed), "b": stack(seed=other * seed + 9)}
            for seed in range(3)
        ]

    tx = gs.contrib.learn_alpha(
        optax.identity(), gs.scanned(r"\w/blocks/"), learning_rate=0.3
    )
    (*_, (_, one)), (*_, (_, two)) = run(tx, trees(1)), run(tx, trees(2))
    assert set(one.alpha) == {"a/blocks", "b/blocks"}
    assert one.alpha["a/blocks"] == two.alpha["a/blocks"]
    assert one.alpha["b/blocks"] != two.alpha["b/blocks"]


def test_the_learned_operator_is_symmetric_and_keeps_constants():
    tx = gs.contrib.learn_operator(
        optax.identity(), SCANNED, 0.3, radius=3, learning_rate=5.0, decay=0.1
    )
    eye = {"blocks": {"w": np.eye(6, dtype="float32")}}
    noise = np.random.default_rng(0).normal(size=(5, 6, 6)).astype("float32")
    start = tx.init(eye)
    window = gs.window(0.3, radius=3).matrix(6)
    np.testing.assert_allclose(start.matrix("blocks"), window, atol=1e-7)
    with pytest.raises(KeyError, match="'blocks'"):
        start.matrix("block")
    zero = {"blocks": {"w": np.zeros((6, 6), "float32")}}
    steps = [*({"blocks": {"w": x}} for x in noise), zero, eye]
    applied, after = run(tx, steps)[-1]  # After zeros nothing is learned.
    matrix = after.matrix("blocks")
    np.testing.assert_allclose(applied["blocks"]["w"], matrix, atol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-6)
    assert (matrix >= 0).all()
    weights = after.weights["blocks"]
    assert weights.shape == (3, 6)
    assert weights.min() == 0.0
    assert weights.max() == pytest.approx(0.5 / 6)


def test_a_descent_direction_learns_the_same_as_the_gradient_that_it_descends():
    learn = gs.contrib.learn_alpha
    ascent = learn(optax.identity(), SCANNED, 0.2)
    descent = learn(optax.scale(-0.5), SCANNED, 0.2, direction="descent")
    up, down = (learned_of(run(tx, several(3))[-1][1]) for tx in (ascent, descent))
    np.testing.assert_allclose(up, down, atol=1e-5)
    assert np.abs(up - learned_of(ascent.init(stack()))).max() > 1e-3


# -- What it learns --------------------------------------------------------------------


def train(tx, problems, steps=300):
    """States after descent on ½‖θ_l - target_l‖² for (targets, noise) of `problems`."""
    targets = jnp.asarray([targets for targets, _ in problems], jnp.float32)
    scales = jnp.asarray([scale for _, scale in problems], jnp.float32)
    noise = np.random.default_rng(5).normal(size=(steps, 3, *targets.shape[1:]))
    noise = jnp.asarray(noise, jnp.float32)

    def run(targets, scale, noise):
        def body(carry, noise):
            params, state = carry
            gradients = params["blocks"]["w"] - targets + scale * noise
            updates, state = tx.update({"blocks": {"w": gradients}}, state, params)
            return (optax.apply_updates(params, updates), state), None

        params = {"blocks": {"w": jnp.zeros_like(targets)}}
        (_, state), _ = jax.lax.scan(body, (params, tx.init(params)), noise)
        return state

    over_seeds = jax.vmap(run, in_axes=(None, None, 1))
    return jax.jit(jax.vmap(over_seeds, in_axes=(0, 0, None)))(targets, scales, noise)


SHARED = np.repeat(np.random.default_rng(0).normal(size=(1, 16)), 8, axis=0)
APART = np.random.default_rng(0).normal(size=(8, 16))


def test_alpha_rises_for_a_shared_signal_in_noise_and_falls_for_different_ones():
    learner = gs.contrib.learn_alpha(optax.scale_by_adam(), SCANNED, 0.2, per="layer")
    state = train(
        optax.chain(learner, optax.scale(-0.003)), [(SHARED, 3.0), (APART, 0.3)]
    )
    rise, fall = learned_of(state[0])
    assert rise.shape == (3, 8)
    assert np.mean(rise) > 0.35
    assert np.mean(fall) < 0.05


def test_weights_rise_between_layers_that_agree_and_fall_between_those_that_do_not():
    half_and_half = np.concatenate([SHARED[:4], 2 * APART[4:]])
    learner = gs.contrib.learn_operator(optax.identity(), SCANNED, 0.2)
    state = train(optax.chain(learner, optax.scale(-0.003)), [(half_and_half, 1.0)])
    weights = np.asarray(learned_of(state[0]))[0, :, 0]
    assert np.mean(weights[:, :3]) > 0.15  # It starts at 0.1; 0.25 is the most.
    assert np.mean(weights[:, 4:7]) < 0.05


def test_the_default_signal_does_not_couple_only_to_shrink():
    # Where the learning rate is too large, any damping helps.
    def final(signal):
        learner = gs.contrib.learn_alpha(optax.identity(), SCANNED, 0.2, signal=signal)
        tx = optax.chain(learner, optax.scale(-1.9))
        return float(np.mean(learned_of(train(tx, [(APART, 0.0)], steps=20)[0])))

    assert final("full") > final("coupling") + 0.1


# -- Dtypes ----------------------------------------------------------------------------


@both_learners
def test_what_is_learned_is_float32_whatever_the_dtypes_given(learn, enable_x64):
    numbers = {"alpha": 0.1, "learning_rate": 0.1, "decay": 0.5, "alpha_max": 0.4}
    with enable_x64():
        u = stack(dtype=jnp.float64)
        for wide in (np.float64, jnp.float64):
            given = {name: wide(number) for name, number in numbers.items()}
            tx = learn(optax.identity(), SCANNED, **given)
            _, state = jax.eval_shape(lambda u, tx=tx: tx.update(u, tx.init(u)), u)
            assert learned_of(state).dtype == np.float32
            assert next(iter(state.signal.values())).dtype == np.float32


def test_strict_promotion_is_respected():
    u = {"blocks": {"w": stack()["blocks"]["w"], "b": jnp.ones((4, 2), jnp.bfloat16)}}
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        for signal in ("coupling", "full"):
            for tx in (
                gs.contrib.learn_alpha(optax.identity(), SCANNED, signal=signal),
                gs.contrib.learn_alpha(
                    optax.identity(), SCANNED, signal=signal, per="layer"
                ),
                gs.contrib.learn_operator(
                    optax.identity(), SCANNED, radius=2, signal=signal
                ),
            ):
                jax.eval_shape(tx.update, u, tx.init(u))


def in_dtypes(dtypes, seed=0):
    """Layers of small whole numbers, which every dtype holds."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(-8, 9, (len(dtypes), 3))
    return {
        f"layers_{i}": {"w": jnp.asarray(block, dtype)}
        for i, (block, dtype) in enumerate(zip(blocks, dtypes, strict=True))
    }


def cast_to(*dtypes):
    """To one dtype, or one of each layer."""

    def cast(updates, params):
        del params
        each = dict(zip(updates, dtypes * (len(updates) // len(dtypes)), strict=True))
        return {k: {"w": x["w"].astype(each[k])} for k, x in updates.items()}

    return optax.stateless(cast)


HALVES = (jnp.bfloat16, jnp.bfloat16, jnp.float32, jnp.float32)
IN_TURN = (jnp.float16, jnp.float32, jnp.float16, jnp.float32)
SINGLE = (jnp.float32,) * 4


@pytest.mark.parametrize(
    ("learn", "params", "gradients"),
    [
        (gs.contrib.learn_alpha, HALVES, HALVES),
        (gs.contrib.learn_operator, SINGLE, IN_TURN),
    ],
    ids=["parameters and gradients in halves", "gradients in turn"],
)
def test_layers_that_inner_brings_to_one_dtype_learn_as_if_they_had_it(
    learn, params, gradients
):
    settings = {"strict": False, "alpha": 0.2, "learning_rate": 0.1}
    mixed = learn(cast_to(jnp.float32), UNROLLED, **settings)
    plain = learn(optax.identity(), UNROLLED, **settings)
    given, single = (
        [in_dtypes(dtypes, seed) for seed in range(3)] for dtypes in (gradients, SINGLE)
    )
    # The kept update is in the dtype of the parameters.
    close = {"rtol": 1e-2 if params == HALVES else 1e-5, "atol": 1e-5}
    found = run(mixed, given, mixed.init(in_dtypes(params)))
    for (got, state), (want, expected) in zip(found, run(plain, single), strict=True):
        chex.assert_trees_all_close(got, want, **close)
        np.testing.assert_allclose(learned_of(state), learned_of(expected), **close)
    start = learned_of(plain.init(in_dtypes(SINGLE)))
    assert not np.allclose(learned_of(expected), start)


def test_layers_of_two_dtypes_are_coupled_within_each():
    tree = in_dtypes(HALVES)
    tx = gs.contrib.learn_alpha(optax.identity(), UNROLLED, alpha=0.2, strict=False)
    smooth = gs.smooth_over_depth(UNROLLED, 0.2, strict=False)
    ((expected, _),) = run(smooth, [tree])
    (updates, _), _ = run(tx, [tree, tree])
    chex.assert_trees_all_close(updates, expected, rtol=1e-2)


class Box:
    """Like `nn.Partitioned`."""

    def __init__(self, value):
        self.value, self.names = value, ("layers", None)


jax.tree_util.register_pytree_with_keys(
    Box,
    lambda box: ([(jax.tree_util.GetAttrKey("value"), box.value)], None),
    lambda _, children: Box(*children),
)


@both_learners
def test_gradients_may_be_in_boxes(learn):
    tx = learn(optax.identity(), SCANNED, alpha=0.2)
    plain = stack()
    boxed = jax.tree.map(Box, plain)
    programs = [str(jax.make_jaxpr(tx.update)(x, tx.init(x))) for x in (plain, boxed)]
    assert programs[0] == programs[1]
    updates, _ = jax.eval_shape(tx.update, boxed, tx.init(boxed))
    assert isinstance(updates["blocks"]["w"], Box)


# -- What is refused -------------------------------------------------------------------

ARGUMENTS = [
    ({"alpha": 0.6}, ValueError),
    ({"alpha": -0.1}, ValueError),
    ({"alpha": lambda count: 0.1}, TypeError),
    ({"alpha_max": 1.5}, ValueError),
    ({"learning_rate": -1.0}, ValueError),
    ({"learning_rate": lambda count: 0.1}, TypeError),
    ({"decay": 1.5}, ValueError),
    ({"decay": 1.0}, ValueError),
    ({"direction": "up"}, ValueError),
    ({"signal": "raw"}, ValueError),
    ({"strict": "no"}, TypeError),
    ({"dtype": jnp.int8}, TypeError),
]


@both_learners
def test_an_argument_out_of_range_is_refused_at_construction(learn):
    own = ({"per": "parameter"}, ValueError)
    if learn is gs.contrib.learn_operator:
        own = ({"radius": 0}, ValueError)
        learn(optax.identity(), SCANNED, radius=2**31 - 1)
        with pytest.raises(ValueError, match="`radius`"):
            learn(optax.identity(), SCANNED, radius=2**31)
    for wrong, error in [*ARGUMENTS, own]:
        (name,) = wrong
        with pytest.raises(error, match=f"`{name}`"):
            learn(optax.identity(), SCANNED, **wrong)
    with pytest.raises(TypeError, match=rf"`inner`.*{learn.__name__}\("):
        learn(SCANNED, optax.identity())


def changed(change):
    return optax.stateless(lambda updates, params: change(updates))


OTHER_TREES = {
    "one more": lambda tree: {**tree, "layers_4": {"w": jnp.ones(3)}},
    "one less": lambda tree: {k: x for k, x in tree.items() if k != "layers_3"},
    "other names": lambda tree: {k: {"v": x["w"]} for k, x in tree.items()},
    "other shapes": lambda tree: {k: {"w": x["w"][:2]} for k, x in tree.items()},
}
OTHER_DTYPES = {
    "to one": (IN_TURN, cast_to(jnp.float32)),
    "to two": (SINGLE, cast_to(*IN_TURN)),
    "one layer": ((jnp.bfloat16, *SINGLE[1:]), cast_to(jnp.float32)),
}


@both_learners
def test_an_inner_that_returns_another_tree_or_other_dtypes_is_told(learn):
    rows = [(SINGLE, changed(change), "`inner`") for change in OTHER_TREES.values()]
    rows += [(*row, "dtype") for row in OTHER_DTYPES.values()]
    for dtypes, inner, word in rows:
        tx, tree = learn(inner, UNROLLED, strict=False), in_dtypes(dtypes)
        with pytest.raises(ValueError, match=word) as info:
            jax.eval_shape(tx.update, tree, tx.init(tree))
        assert "`inner`" in str(info.value)


@both_learners
def test_a_tree_or_a_state_that_does_not_fit_is_told(learn):
    wrong = gs.scanned("layers/")
    with pytest.raises(ValueError, match="blocks/w"):
        learn(optax.identity(), wrong).init(stack())
    loose = learn(optax.identity(), wrong, strict=False)
    updates, state = loose.update(stack(), loose.init(stack()))
    chex.assert_trees_all_equal(updates, stack())
    assert not jax.tree.leaves(state)

    fitting = learn(optax.identity(), SCANNED)
    state = fitting.init(stack())
    more = {"blocks": {**stack()["blocks"], "b": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match=r"holds 1 leaves.*2 leaves are coupled"):
        fitting.update(more, state)
    tree = {**stack(), "other": {"w": jnp.ones((5, 2))}}
    both = learn(optax.identity(), gs.scanned("(?:blocks|other)/"))
    with pytest.raises(ValueError, match=r"learned for .*init\(params\)"):
        both.update(tree, fitting.init(tree))


def test_two_units_of_one_name_are_refused():
    depths = {"x": gs.Depth("a", "b/c", axis=0), "y": gs.Depth("a/b", "c", axis=0)}
    tree = {name: jnp.ones((3, 2)) for name in depths}

    def depth(path, leaf):
        return depths[path[0]]

    tx = gs.contrib.learn_alpha(optax.identity(), depth, per="role")
    with pytest.raises(ValueError, match=r"two units that read 'a/b/c'"):
        tx.init(tree)
