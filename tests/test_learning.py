"""`learn_alpha` and `learn_operator`: the gradients themselves teach the coupling."""

import pickle

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
SIGNALS = ("coupling", "full")


def learned_of(state):
    """α or the weights, of the only stack."""
    field = "alpha" if hasattr(state, "alpha") else "weights"
    (value,) = getattr(state, field).values()
    return value


def memory_of(state):
    return state.change if hasattr(state, "change") else state.update


def run(tx, steps, params=None):
    """All updates and states over a sequence of gradients, in one compilation."""
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *steps)

    def body(state, gradients):
        updates, state = tx.update(gradients, state, params)
        return state, (updates, state)

    state = tx.init(steps[0] if params is None else params)
    _, (updates, states) = jax.jit(lambda s, g: jax.lax.scan(body, s, g))(
        state, stacked
    )
    return [
        jax.tree.map(lambda x, i=i: x[i], (updates, states)) for i in range(len(steps))
    ]


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


def check_against_twin(tx, twin, layout, steps, value_of):
    _, tree_of, _ = LAYOUTS[layout]
    trees = [jax.tree.map(jnp.asarray, tree_of(blocks)) for blocks in steps]
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
            for field, want in (("value", twin.value), ("signal", twin.mean)):
                got = value_of(state, field, unit)
                assert got == pytest.approx(want[unit], abs=2e-6)
    values = list(twin.value.values())
    assert max(values) - min(values) > 1e-3 or len(values) == 1


@pytest.mark.parametrize(
    ("layout", "per", "signal"),
    [
        *(("scanned", per, "coupling") for per in ("stack", "role", "layer")),
        *(("two runs", per, "coupling") for per in ("stack", "role", "layer")),
        ("unrolled", "layer", "coupling"),
        ("unrolled", "stack", "full"),
        ("scanned", "role", "full"),
        ("scanned", "layer", "full"),
    ],
)
def test_learn_alpha_is_its_twin_of_plain_loops(layout, per, signal):
    settings = {"learning_rate": 0.3, "decay": 0.6}
    depth, _, strict = LAYOUTS[layout]
    steps = steps_of() if strict else without(steps_of(), (0, "bias"), (2, "kernel"))
    tx = gs.contrib.learn_alpha(
        optax.identity(),
        depth,
        0.2,
        per=per,
        signal=signal,
        strict=strict,
        alpha_max=0.4,
        **settings,
    )
    twin = AlphaTwin(per, 0.2, signal=signal, highest=0.4, **settings)
    stack = "blocks" if layout == "scanned" else "layers"

    def value_of(state, field, unit):
        values = state.alpha if field == "value" else state.signal
        name = f"{stack}/{unit}" if per == "role" else stack
        value = values[name]
        assert value.dtype == jnp.float32
        return float(value[unit] if per == "layer" else value)

    check_against_twin(tx, twin, layout, steps, value_of)


@pytest.mark.parametrize(
    ("layout", "signal"),
    [*((layout, "coupling") for layout in LAYOUTS), ("scanned", "full")],
)
def test_learn_operator_is_its_twin_of_plain_loops(layout, signal):
    settings = {"learning_rate": 0.3, "decay": 0.6, "signal": signal}
    depth, _, strict = LAYOUTS[layout]
    steps = steps_of() if strict else without(steps_of(), (0, "bias"), (2, "kernel"))
    tx = gs.contrib.learn_operator(
        optax.identity(), depth, 0.2, radius=2, strict=strict, alpha_max=0.4, **settings
    )
    # Learning rate and bound are those of α = 2 · radius · w.
    settings["learning_rate"] /= 4
    twin = OperatorTwin(2, 0.2, highest=0.1, **settings)

    def value_of(state, field, pair):
        (values,) = (state.weights if field == "value" else state.signal).values()
        first, second = pair
        return float(values[second - first - 1, first])

    check_against_twin(tx, twin, layout, steps, value_of)


# What the states are.


def stack(num_layers=4, seed=0, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=(num_layers, 3))
    return {"blocks": {"w": jnp.asarray(values, dtype)}}


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_a_learning_rate_of_zero_is_plain_smoothing_of_the_inner_update(learn):
    trees = [{**stack(seed=seed), "head": jnp.ones(2)} for seed in range(3)]
    learner = learn(optax.scale_by_adam(), SCANNED, 0.3, learning_rate=0.0)
    smoothing = gs.smooth_over_depth(SCANNED, 0.3)
    plain = gs.with_depth_smoothing(optax.scale_by_adam(), smoothing)
    for (got, state), (want, inner) in zip(
        run(learner, trees), run(plain, trees), strict=True
    ):
        chex.assert_trees_all_close(got, want, rtol=2e-6)
        chex.assert_trees_all_close(state.inner_state, inner, rtol=1e-6)


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_the_state_holds_one_copy_of_the_coupled_updates_in_a_chosen_dtype(learn):
    params = {**stack(dtype=jnp.bfloat16), "head": jnp.ones(2), "alone": None}
    for dtype, kept in ((None, jnp.bfloat16), (jnp.float32, jnp.float32)):
        tx = learn(optax.scale_by_adam(), SCANNED, dtype=dtype)
        state = tx.init(params)
        (memory,) = jax.tree.leaves(memory_of(state))
        assert memory.dtype == kept
        assert memory.shape == params["blocks"]["w"].shape
        assert isinstance(memory_of(state)["head"], optax.MaskedNode)
        updates, new = jax.eval_shape(tx.update, params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_what_is_not_coupled_comes_back_as_the_same_object(learn):
    def apply(params):
        tx = learn(optax.identity(), SCANNED)
        updates, _ = tx.update(params, tx.init(params))
        assert updates["head"] is params["head"]
        assert updates["blocks"]["w"] is not params["blocks"]["w"]
        return updates

    jax.eval_shape(apply, {**stack(), "head": jnp.ones(2)})


def test_a_smaller_dtype_of_the_copy_changes_alpha_by_its_rounding_only():
    trees = [stack(seed=seed) for seed in range(3)]
    settings = {"learning_rate": 0.3, "decay": 0.6}
    full, half = (
        run(
            gs.contrib.learn_alpha(optax.identity(), SCANNED, dtype=dtype, **settings),
            trees,
        )
        for dtype in (None, jnp.bfloat16)
    )
    alpha, rounded = learned_of(full[-1][1]), learned_of(half[-1][1])
    assert 0 < abs(alpha - rounded) < 2e-3


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_the_copy_of_a_complex_update_stays_complex(learn):
    params = jax.tree.map(lambda x: x.astype(jnp.complex64), stack())
    for dtype in (None, jnp.bfloat16, jnp.float32):
        tx = learn(optax.identity(), SCANNED, dtype=dtype)
        (memory,) = jax.tree.leaves(memory_of(jax.eval_shape(tx.init, params)))
        assert memory.dtype == jnp.complex64


def test_the_first_step_is_at_the_given_alpha_and_teaches_nothing():
    ((updates, state),) = run(
        gs.contrib.learn_alpha(optax.identity(), SCANNED, 0.3), [stack()]
    )
    assert state.alpha == {"blocks": jnp.float32(0.3)}
    assert state.signal == {"blocks": jnp.float32(0)}
    ((expected, _),) = run(gs.smooth_over_depth(SCANNED, 0.3), [stack()])
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_alpha_can_leave_zero_and_stays_within_its_bounds():
    shared = {"blocks": {"w": jnp.array([[1.0, 1.0], [1.0, -1.0]])}}
    # The gradient that follows points where more coupling would have gone.
    coupled = {"blocks": {"w": shared["blocks"]["w"][::-1]}}
    for sign, bound in ((1, 0.25), (-1, 0.0)):
        tx = gs.contrib.learn_alpha(
            optax.identity(), SCANNED, 0.0, learning_rate=9.0, alpha_max=0.25
        )
        _, state = tx.update(shared, tx.init(shared))
        _, state = tx.update(jax.tree.map(lambda x, s=sign: s * x, coupled), state)
        assert float(learned_of(state)) == bound


@pytest.mark.parametrize(
    ("learn", "kwargs"),
    [
        (gs.contrib.learn_alpha, {}),
        (gs.contrib.learn_alpha, {"per": "layer"}),
        (gs.contrib.learn_operator, {}),
    ],
)
def test_updates_that_are_zero_or_not_finite_teach_nothing(learn, kwargs):
    tx = learn(optax.identity(), SCANNED, 0.2, learning_rate=0.3, decay=0.5, **kwargs)
    good = [stack(seed=seed) for seed in range(4)]
    state = run(tx, good[:2])[-1][1]
    update = jax.jit(tx.update)
    for value in (0.0, jnp.nan, jnp.inf):
        bad = jax.tree.map(lambda x, value=value: jnp.full_like(x, value), good[0])
        _, after = update(bad, state)
        _, then = update(good[2], after)  # Nor does the step after it.
        for new in (after, then):
            chex.assert_trees_all_equal(learned_of(new), learned_of(state))
            chex.assert_trees_all_equal(new.signal, state.signal)
        _, recovered = update(good[3], then)
        assert np.isfinite(learned_of(recovered)).all()
        assert np.any(learned_of(recovered) != learned_of(state))


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
    u = {"blocks": {"w": jnp.eye(6)}}
    tx = gs.contrib.learn_operator(
        optax.identity(), SCANNED, 0.3, radius=3, learning_rate=5.0, decay=0.1
    )
    state = tx.init(u)
    window = gs.window(0.3, radius=3).matrix(6)
    np.testing.assert_allclose(state.matrix("blocks"), window, atol=1e-7)
    update = jax.jit(tx.update)
    for seed in range(5):
        noise = np.random.default_rng(seed).normal(size=(6, 6))
        _, state = update({"blocks": {"w": jnp.asarray(noise, jnp.float32)}}, state)
    still = state._replace(update=jax.tree.map(jnp.zeros_like, state.update))
    applied, after = update(u, still)
    matrix = after.matrix("blocks")
    np.testing.assert_allclose(applied["blocks"]["w"], matrix, atol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix.sum(1), 1.0, rtol=1e-6)
    assert (matrix >= 0).all()
    weights = np.asarray(after.weights["blocks"])
    assert weights.shape == (3, 6)
    assert weights.min() == 0.0
    assert weights.max() == pytest.approx(0.5 / 6)


# What it learns.


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


@pytest.mark.parametrize(
    ("inner", "per"), [(optax.identity, "stack"), (optax.scale_by_adam, "layer")]
)
def test_alpha_rises_for_a_shared_signal_in_noise_and_falls_for_different_ones(
    inner, per
):
    learner = gs.contrib.learn_alpha(inner(), SCANNED, alpha=0.2, per=per)
    state = train(
        optax.chain(learner, optax.scale(-0.003)), [(SHARED, 3.0), (APART, 0.3)]
    )
    rise, fall = learned_of(state[0])
    assert rise.shape == ((3,) if per == "stack" else (3, 8))
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


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_both_directions_learn_the_same_on_the_same_problem(learn):
    before = optax.chain(learn(optax.scale_by_adam(), SCANNED, 0.2), optax.scale(-0.01))
    whole = learn(optax.adam(0.01), SCANNED, 0.2, direction="descent")
    problems = [(APART, 1.0)]
    ascended = learned_of(train(before, problems, steps=30)[0])
    descended = learned_of(train(whole, problems, steps=30))
    np.testing.assert_allclose(ascended, descended, atol=1e-4)
    assert np.ptp(ascended) > 1e-3


# In a training loop.


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_a_state_that_was_saved_goes_on_where_it_was(learn):
    trees = [stack(seed=seed) for seed in range(4)]
    tx = learn(optax.scale_by_adam(), SCANNED, 0.2, learning_rate=0.3)
    update = jax.jit(tx.update)
    states = [tx.init(trees[0])]
    for tree in trees:
        states.append(update(tree, states[-1])[1])
    saved = pickle.dumps(jax.tree.map(np.asarray, jax.tree.leaves(states[2])))
    structure = jax.tree.structure(tx.init(trees[0]))
    state = jax.tree.unflatten(structure, pickle.loads(saved))
    for tree, expected in zip(trees[2:], states[3:], strict=True):
        _, state = update(tree, state)
        chex.assert_trees_all_equal(state, expected)


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_updates_are_traced_once_and_states_can_be_donated(learn):
    chex.clear_trace_counter()  # it takes the learners' common function for one
    tx = learn(optax.scale_by_adam(), SCANNED, 0.2)
    update = jax.jit(chex.assert_max_traces(tx.update, n=1), donate_argnums=1)
    state = tx.init(stack())
    for seed in range(3):
        _, state = update(stack(seed=seed), state)


def test_inside_multi_steps_it_learns_from_the_means_of_the_micro_batches():
    trees = [stack(seed=seed) for seed in range(6)]
    tx = gs.contrib.learn_alpha(optax.identity(), SCANNED, 0.2, learning_rate=0.3)
    multi = optax.MultiSteps(tx, every_k_schedule=2)
    chained = optax.GradientTransformation(multi.init, multi.update)
    _, state = run(chained, trees, params=trees[0])[-1]
    means = [
        jax.tree.map(lambda a, b: (a + b) / 2, *pair)
        for pair in zip(trees[::2], trees[1::2], strict=True)
    ]
    _, expected = run(tx, means)[-1]
    found = learned_of(state.inner_opt_state)
    np.testing.assert_allclose(found, learned_of(expected), atol=1e-6)
    assert abs(found - 0.2) > 1e-3


def test_alpha_is_found_in_nested_states_for_logging():
    params = {**stack(), "head": jnp.ones(2)}
    learner = gs.contrib.learn_alpha(optax.scale_by_adam(), SCANNED, 0.2)
    labels = {"blocks": "trained", "head": "frozen"}
    nested = {
        "chain": optax.chain(optax.clip(1.0), learner, optax.scale(-1.0)),
        "masked": optax.masked(learner, {"blocks": True, "head": False}),
        "partition": optax.partition(
            {"trained": learner, "frozen": optax.set_to_zero()}, labels
        ),
        "finite": optax.apply_if_finite(learner, 3),
    }
    for name, tx in nested.items():
        state = tx.init(params)
        _, after = jax.eval_shape(tx.update, params, state, params)
        assert set(optax.tree_utils.tree_get(after, "alpha")) == {"blocks"}, name
        found = optax.tree_utils.tree_get(state, "alpha")
        assert set(found) == {"blocks"}, name
        assert float(found["blocks"]) == pytest.approx(0.2)


def test_the_learned_matrix_is_found_in_the_state_of_a_chain():
    tx = optax.chain(
        gs.contrib.learn_operator(optax.identity(), SCANNED, 0.2), optax.scale(-1)
    )
    found = optax.tree_utils.tree_get(tx.init(stack()), "LearnOperatorState")
    window = gs.window(0.2).matrix(4)
    np.testing.assert_allclose(found.matrix("blocks"), window, atol=1e-7)


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_shapes_alone_are_enough_for_init(learn):
    tx = learn(optax.scale_by_adam(), SCANNED)
    shapes = jax.eval_shape(lambda: stack())
    chex.assert_trees_all_equal(tx.init(shapes), tx.init(stack()))


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_tree_map_params_finds_the_moments(learn):
    tx = learn(optax.scale_by_adam(), SCANNED)
    state = tx.init(stack())
    marked = optax.tree_map_params(tx, lambda x: "moment", state)
    assert marked.inner_state.mu["blocks"]["w"] == "moment"
    assert isinstance(learned_of(marked), jax.Array)


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_its_numbers_can_be_injected(learn):
    numbers = {"alpha": 0.2, "learning_rate": 0.3, "decay": 0.5, "alpha_max": 0.4}
    static = ("radius",) if learn is gs.contrib.learn_operator else ()
    make = optax.inject_hyperparams(learn, static_args=static)
    trees = [stack(seed=seed) for seed in range(3)]
    _, injected = run(make(optax.identity(), SCANNED, **numbers), trees)[-1]
    _, plain = run(learn(optax.identity(), SCANNED, **numbers), trees)[-1]
    chex.assert_trees_all_close(injected.inner_state, plain, rtol=1e-5)


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
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
        for signal in SIGNALS:
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


# What is refused.


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize(
    ("wrong", "error"),
    [
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
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_an_argument_out_of_range_is_refused_at_construction(learn, wrong, error):
    (name,) = wrong
    with pytest.raises(error, match=f"`{name}`"):
        learn(optax.identity(), SCANNED, **wrong)


def test_arguments_of_one_learner_are_refused_as_well():
    with pytest.raises(ValueError, match=r"`per`.*'stack', 'role', 'layer'"):
        gs.contrib.learn_alpha(optax.identity(), SCANNED, per="parameter")
    with pytest.raises(ValueError, match="`radius`"):
        gs.contrib.learn_operator(optax.identity(), SCANNED, radius=0)
    for name, learn in LEARNERS.items():
        with pytest.raises(TypeError, match=rf"`inner`.*{name}\("):
            learn(SCANNED, optax.identity())


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_the_structure_is_checked_as_by_the_plain_transformations(learn):
    tx = learn(optax.identity(), gs.scanned("layers/"))
    with pytest.raises(ValueError, match="blocks/w"):
        tx.init(stack())
    loose = learn(optax.identity(), gs.scanned("layers/"), strict=False)
    updates, state = loose.update(stack(), loose.init(stack()))
    chex.assert_trees_all_equal(updates, stack())
    assert not jax.tree.leaves(state)
    fitting = learn(optax.identity(), SCANNED)
    more = {"blocks": {**stack()["blocks"], "b": jnp.ones((4, 2))}}
    with pytest.raises(ValueError, match=r"holds 1 leaves.*2 leaves are coupled"):
        fitting.update(more, fitting.init(stack()))


# What a review found.


def test_a_change_along_the_update_teaches_nothing():
    # A role of scalars: what is left of v after the projection is rounding.
    depth = gs.scanned("blocks/")
    tx = gs.contrib.learn_alpha(optax.identity(), depth, per="layer", decay=0.0)
    rng = np.random.default_rng(0)

    def draw():
        return {"blocks": {"rezero": jnp.asarray(rng.normal(size=4), jnp.float32)}}

    state = tx.init(draw())
    for _ in range(3):
        _, state = tx.update(draw(), state)
    np.testing.assert_array_equal(state.signal["blocks"], np.zeros(4))
    np.testing.assert_array_equal(state.alpha["blocks"], np.full(4, 0.1, np.float32))


def test_two_units_of_one_name_are_refused():
    depths = {"x": gs.Depth("a", "b/c", axis=0), "y": gs.Depth("a/b", "c", axis=0)}
    tree = {name: jnp.ones((3, 2)) for name in depths}

    def depth(path, leaf):
        return depths[path[0]]

    tx = gs.contrib.learn_alpha(optax.identity(), depth, per="role")
    with pytest.raises(ValueError, match=r"two units that read 'a/b/c'"):
        tx.init(tree)


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_a_state_of_other_settings_is_refused(learn):
    tree = {"blocks": {"w": jnp.ones((3, 2))}, "other": {"w": jnp.ones((4, 2))}}
    one, both = gs.scanned("blocks/"), gs.scanned("(?:blocks|other)/")
    state = learn(optax.identity(), one).init(tree)
    with pytest.raises(ValueError, match=r"learned for .*init\(params\)"):
        learn(optax.identity(), both).update(tree, state)


def test_the_kept_update_is_not_the_buffer_of_the_inner_state():
    tree = {"blocks": {"w": jnp.ones((3, 2))}}
    tx = gs.contrib.learn_operator(optax.trace(0.9), gs.scanned("blocks/"))
    _, state = tx.update(tree, tx.init(tree))
    jax.jit(tx.update, donate_argnums=1)(tree, state)


def test_float64_updates_of_any_size_teach_the_same(enable_x64):
    with enable_x64():
        rng = np.random.default_rng(0)
        draws = [{"blocks": {"w": jnp.asarray(rng.normal(size=(4, 6)))}} for _ in "123"]

        def signal(scale):
            tx = gs.contrib.learn_alpha(optax.identity(), gs.scanned("blocks/"))
            state = tx.init(draws[0])
            for draw in draws:
                scaled = jax.tree.map(lambda x: x * scale, draw)
                _, state = tx.update(scaled, state)
            return float(state.signal["blocks"])

        assert signal(1.0) != 0
        np.testing.assert_allclose(signal(1e-25), signal(1.0), rtol=1e-6)
        np.testing.assert_allclose(signal(1e25), signal(1.0), rtol=1e-6)


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_flags_and_dtypes_are_checked_at_construction(learn):
    for wrong in ({"strict": "no"}, {"dtype": jnp.int8}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            learn(optax.identity(), gs.scanned("blocks/"), **wrong)


# Layers in several dtypes, which `inner` may bring to one.


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


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize(
    ("params", "gradients"),
    [(HALVES, HALVES), (HALVES, SINGLE), (SINGLE, IN_TURN), (SINGLE, HALVES)],
    ids=["halves", "halves of parameters", "gradients in turn", "halves of gradients"],
)
def test_layers_that_inner_brings_to_one_dtype_learn_as_if_they_had_it(
    learn, params, gradients
):
    settings = {"strict": False, "alpha": 0.2, "learning_rate": 0.1}
    mixed = learn(cast_to(jnp.float32), UNROLLED, **settings)
    plain = learn(optax.identity(), UNROLLED, **settings)
    state = mixed.init(in_dtypes(params))
    expected_state = plain.init(in_dtypes(SINGLE))
    for seed in range(3):
        updates, state = mixed.update(in_dtypes(gradients, seed), state)
        expected, expected_state = plain.update(in_dtypes(SINGLE, seed), expected_state)
        # The kept update is in the dtype of the parameters.
        close = {"rtol": 1e-2 if params == HALVES else 1e-5, "atol": 1e-5}
        chex.assert_trees_all_close(updates, expected, **close)
        got, want = learned_of(state), learned_of(expected_state)
        np.testing.assert_allclose(got, want, **close)
    assert not np.allclose(want, learned_of(plain.init(in_dtypes(SINGLE))))


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize(
    ("params", "inner"),
    [
        (IN_TURN, cast_to(jnp.float32)),
        (SINGLE, cast_to(*IN_TURN)),
        ((jnp.bfloat16, *SINGLE[1:]), cast_to(jnp.float32)),
    ],
    ids=["to one", "to two", "one layer"],
)
def test_an_inner_whose_dtypes_couple_other_layers_than_the_parameters_is_told(
    learn, params, inner
):
    tx = learn(inner, UNROLLED, strict=False)
    tree = in_dtypes(params)
    with pytest.raises(ValueError, match=r"dtype") as info:
        tx.update(tree, tx.init(tree))
    assert "`inner`" in str(info.value)


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
@pytest.mark.parametrize(
    "change",
    [
        lambda tree: {**tree, "layers_4": {"w": jnp.ones(3)}},
        lambda tree: {k: x for k, x in tree.items() if k != "layers_3"},
        lambda tree: {k: {"v": x["w"]} for k, x in tree.items()},
        lambda tree: {k: {"w": x["w"][:2]} for k, x in tree.items()},
    ],
    ids=["one more", "one less", "other names", "other shapes"],
)
def test_an_inner_that_returns_another_tree_is_told(learn, change):
    tree = in_dtypes(SINGLE)
    inner = optax.stateless(lambda updates, params: change(updates))
    tx = learn(inner, UNROLLED, strict=False)
    with pytest.raises(ValueError, match="`inner`"):
        tx.update(tree, tx.init(tree))


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_layers_of_two_dtypes_are_coupled_within_each(learn):
    tree = in_dtypes(HALVES)
    tx = learn(optax.identity(), UNROLLED, alpha=0.2, strict=False)
    updates, state = tx.update(tree, tx.init(tree))
    smooth = gs.smooth_over_depth(UNROLLED, 0.2, strict=False)
    expected, _ = smooth.update(tree, smooth.init(tree))
    chex.assert_trees_all_close(updates, expected, rtol=1e-2)
    tx.update(tree, state)


@pytest.mark.parametrize("learn", LEARNERS.values(), ids=LEARNERS)
def test_gradients_may_be_in_boxes(learn):
    class Box:
        """Like `nn.Partitioned`."""

        def __init__(self, value):
            self.value, self.names = value, ("layers", None)

    jax.tree_util.register_pytree_with_keys(
        Box,
        lambda box: ([(jax.tree_util.GetAttrKey("value"), box.value)], None),
        lambda _, children: Box(*children),
    )
    plain = {"blocks": {"w": jnp.arange(6.0).reshape(3, 2)}}
    boxed = jax.tree.map(Box, plain)
    tx = learn(optax.identity(), SCANNED, alpha=0.2)
    expected, _ = tx.update(plain, tx.init(plain))
    found, _ = tx.update(boxed, tx.init(boxed))
    chex.assert_trees_all_equal(found["blocks"]["w"].value, expected["blocks"]["w"])
