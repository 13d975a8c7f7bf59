"""`depth_signal` against gradients whose covariance along depth is known."""

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pytest

import gradsmooth_optax as gs
from gradsmooth_optax.diagnostics import depth_signal

L = 6
EYE, ONES = np.eye(L), np.ones((L, L))
# {what: (signal, noise)}, covariances along depth of every coordinate.
KNOWN = {
    "nothing shared": (EYE, 20 * EYE),
    "everything shared": (ONES, 20 * EYE),
    "signals alike, noise of its own": (0.5 * ONES + 0.5 * EYE, 20 * EYE),
    "noise alike, signals not": (EYE, 10 * ONES + 10 * EYE),
    "both alike": (ONES, 10 * ONES + 10 * EYE),
}


def batches_of(signal, noise, coordinates=2000, number=32, seed=0):
    """A mean and gradients of batches, (L, coordinates) each."""
    rng = np.random.default_rng(seed)

    def drawn(covariance):
        values, vectors = np.linalg.eigh(covariance)
        root = vectors * np.sqrt(np.maximum(values, 0))
        return root @ rng.normal(size=(L, coordinates))

    mean = drawn(signal)
    return mean, [(mean + drawn(noise)).astype(np.float32) for _ in range(number)]


def left_by(f, signal, noise):
    """The error that a filter leaves, by the closed form."""
    bias = (f - EYE) @ signal @ (f - EYE).T
    return np.trace(bias) + np.trace(f @ noise @ f.T)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("known", KNOWN)
def test_what_the_best_filter_leaves_is_right_within_its_interval(known, momentum):
    mean, batches = batches_of(*KNOWN[known])
    found = depth_signal(
        ({"h": batch} for batch in batches), gs.scanned("h"), momentum=momentum
    )
    kept = (1 - momentum) / (1 + momentum)
    signal, noise = mean @ mean.T, kept * mean.shape[1] * KNOWN[known][1]
    single = np.trace(signal) / np.trace(signal + noise) * EYE
    best = signal @ np.linalg.inv(signal + noise)
    true = left_by(best, signal, noise) / left_by(single, signal, noise)
    share = found.blocks["h"].left["best filter"]
    # Filters that are fitted to batches do not know what chance made alike.
    assert share.low - 0.005 <= true <= share.high + 0.005
    assert share.value == pytest.approx(true, abs=0.06)

    window = np.asarray(gs.window(0.5).matrix(L))
    gain, size = np.trace(window @ signal), np.trace(window @ (signal + noise) @ window)
    of_window = left_by(gain / size * window, signal, noise)
    of_window /= left_by(single, signal, noise)
    found_window = found.blocks["h"].left["window(0.5)"]
    assert found_window.value == pytest.approx(of_window, abs=0.06)
    assert found_window == pytest.approx(found.blocks["h"].left_by(0.5))


def test_cosines_and_noise_are_those_of_the_signal_though_batches_are_noisy():
    mean, batches = batches_of(*KNOWN["noise alike, signals not"], number=64)
    block = depth_signal([{"h": b} for b in batches], gs.scanned("h")).blocks["h"]
    gram = mean @ mean.T
    norms = np.sqrt(np.diagonal(gram))
    true = np.diagonal(gram, 1) / norms[1:] / norms[:-1]
    assert block.cosines == pytest.approx(true, abs=0.1)
    assert block.noise / 2000 == pytest.approx(10 * ONES + 10 * EYE, abs=1.0)
    assert np.linalg.eigvalsh(block.signal)[0] > -1e-3


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ("nothing shared", "nothing along depth to couple"),
        ("everything shared", "layers share something"),
        (None, "layers differ in their noise, but share nothing"),
    ],
)
def test_the_sentence_says_what_to_do(known, words):
    uneven = EYE, np.diag([1.0, 1.0, 1.0, 200.0, 200.0, 200.0])
    _, batches = batches_of(*KNOWN.get(known, uneven))
    found = depth_signal([{"h": b} for b in batches], gs.scanned("h"))
    assert words in found.sentence
    assert found.sentence in str(found)


def test_without_a_signal_it_asks_for_more_batches():
    _, batches = batches_of(0 * EYE, EYE, coordinates=20, number=16, seed=3)
    found = depth_signal([{"h": b} for b in batches], gs.scanned("h"))
    assert "take more of them" in found.sentence
    assert "unknown" in str(found)


def test_stacked_unrolled_and_on_another_axis_give_the_same():
    _, batches = batches_of(*KNOWN["signals alike, noise of its own"], number=16)
    stacked = depth_signal([{"h": b} for b in batches], gs.scanned("h"))
    last = depth_signal([{"h": b.T} for b in batches], gs.scanned("h", axis=1))
    unrolled = depth_signal(
        [{"h": [jnp.asarray(row) for row in b]} for b in batches], gs.unrolled()
    )
    left = stacked.blocks["h"].left
    for other in (last.blocks["h"], unrolled.blocks["h"]):
        for name in left:
            assert other.left[name] == pytest.approx(left[name], rel=1e-4)


def test_a_block_is_the_sum_of_its_roles_also_where_a_role_is_not_in_every_layer():
    rng = np.random.default_rng(0)
    batches = [
        {
            "h": {
                str(i): {
                    "w": rng.normal(size=40),
                    **({"b": rng.normal(size=9)} if i else {}),
                }
                for i in range(4)
            }
        }
        for _ in range(16)
    ]
    found = depth_signal(batches, gs.unrolled(r"h/(\d)/"))
    (roles,) = found.roles.values()
    (block,) = found.blocks.values()
    assert {name: len(of.noise) for name, of in roles.items()} == {"b": 3, "w": 4}
    total = np.diagonal(roles["w"].noise + roles["w"].signal).copy()
    total[1:] += np.diagonal(roles["b"].noise + roles["b"].signal)
    assert np.diagonal(block.noise + block.signal) == pytest.approx(total)


def test_gradients_stream_from_a_jitted_function_and_are_not_kept():
    gradient = jax.jit(lambda key: {"h": 1 + jax.random.normal(key, (4, 300))})
    alive = []

    def stream():
        for seed in range(20):
            tree = gradient(jax.random.key(seed))
            alive.append(tree["h"])
            yield tree
            if len(alive) > 1:
                alive[-2].delete()  # nobody may need it any more

    found = depth_signal(stream(), gs.scanned("h"))
    assert found.num_batches == 20
    assert found.blocks["h"].left["best filter"].value < 0.9


def test_the_picture_has_the_block_and_every_role():
    _, batches = batches_of(*KNOWN["nothing shared"], number=16)
    trees = [{"h": {"a": b, "b": 2 * b}} for b in batches]
    ax = gs.plots.depth_signal(depth_signal(trees, gs.scanned("h/")))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["whole block", "a", "b"]
    plt.close(ax.figure)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"gradients": {"h": jnp.ones((4, 3))}}, TypeError, "one for each batch"),
        ({"number": 5}, ValueError, "has 5 batches, fewer than `groups` \\(16\\)"),
        ({"groups": 3}, ValueError, "`groups` must be a whole number from 4"),
        (
            {"momentum": 1.0},
            ValueError,
            "`momentum` must be a number from 0 to below 1",
        ),
        ({"last": np.full((4, 3), np.nan)}, ValueError, "tree 16 .* is not finite"),
        ({"last": np.ones((4, 4))}, ValueError, "tree 16 .* other shapes"),
        ({"shape": (1, 3)}, ValueError, "couples no layers"),
    ],
)
def test_what_cannot_be_judged_is_an_error(arguments, error, words):
    rng = np.random.default_rng(0)
    shape, number = arguments.pop("shape", (4, 3)), arguments.pop("number", 16)
    gradients = [{"h": rng.normal(size=shape)} for _ in range(number)]
    if "last" in arguments:
        gradients.append({"h": arguments.pop("last")})
    gradients = arguments.pop("gradients", gradients)
    with pytest.raises(error, match=words):
        depth_signal(gradients, gs.scanned("h"), **arguments)
