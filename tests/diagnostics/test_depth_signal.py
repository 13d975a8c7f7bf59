"""`depth_signal` against gradients whose covariance along depth is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gradsmooth_optax as gs
from gradsmooth_optax.diagnostics import Share, depth_signal

L = 6
EYE, ONES = np.eye(L), np.ones((L, L))
# {what: (signal, noise)}, covariances along depth of every coordinate.
KNOWN = {
    "nothing shared": (EYE, 20 * EYE),
    "everything shared": (ONES, 20 * EYE),
    "signals alike, noise of its own": (0.5 * ONES + 0.5 * EYE, 20 * EYE),
    "noise alike, signals not": (EYE, 10 * ONES + 10 * EYE),
    "both alike": (ONES, 10 * ONES + 10 * EYE),
    "noise uneven": (EYE, np.diag([1.0, 1.0, 1.0, 200.0, 200.0, 200.0])),
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


def signal_of(batches, **kwargs):
    return depth_signal([{"h": batch} for batch in batches], gs.scanned("h"), **kwargs)


def left_by(f, signal, noise):
    """The error that a filter leaves, by the closed form."""
    bias = (f - EYE) @ signal @ (f - EYE).T
    return np.trace(bias) + np.trace(f @ noise @ f.T)


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("known", [*KNOWN][:5])
def test_what_filters_leave_is_right_within_their_intervals(known, momentum):
    mean, batches = batches_of(*KNOWN[known])
    found = signal_of(batches, momentum=momentum).blocks["h"]
    kept = (1 - momentum) / (1 + momentum)
    signal, noise = mean @ mean.T, kept * mean.shape[1] * KNOWN[known][1]

    def share_of(matrix):
        """Times its best factor, of what the best single factor leaves."""
        single = np.trace(signal) / np.trace(signal + noise) * EYE
        gain = np.trace(matrix @ signal)
        size = np.trace(matrix @ (signal + noise) @ matrix.T)
        filtered = left_by(gain / size * matrix, signal, noise)
        return filtered / left_by(single, signal, noise)

    true = share_of(signal @ np.linalg.inv(signal + noise))
    share = found.left["best filter"]
    # Filters that are fitted to batches do not know what chance made alike.
    assert share.low - 0.005 <= true <= share.high + 0.005
    assert share.value == pytest.approx(true, abs=0.06)
    window = np.asarray(gs.window(0.5).matrix(L))
    assert found.left["window(0.5)"].value == pytest.approx(share_of(window), abs=0.06)
    assert found.left_by(0.5) == pytest.approx(found.left["window(0.5)"])
    assert found.left_by(gs.dense(EYE)).value == pytest.approx(1.0)


def test_raw_shares_are_those_without_momentum():
    _, batches = batches_of(*KNOWN["both alike"], coordinates=200, number=16)
    smoothed, raw = (signal_of(batches, momentum=m).blocks["h"] for m in (0.9, 0.0))
    assert smoothed.left_raw == raw.left == raw.left_raw
    assert smoothed.left != raw.left


def test_cosines_and_noise_are_those_of_the_signal_though_batches_are_noisy():
    mean, batches = batches_of(*KNOWN["noise alike, signals not"], number=64)
    block = signal_of(batches).blocks["h"]
    gram = mean @ mean.T
    norms = np.sqrt(np.diagonal(gram))
    true = np.diagonal(gram, 1) / norms[1:] / norms[:-1]
    assert block.cosines == pytest.approx(true, abs=0.1)
    assert block.noise / 2000 == pytest.approx(10 * ONES + 10 * EYE, abs=1.0)
    assert np.linalg.eigvalsh(block.signal)[0] > -1e-3


# {what: (signal and noise, other arguments, what the sentence says)}
SENTENCES = {
    "nothing shared": (KNOWN["nothing shared"], {}, "nothing along depth to couple"),
    "everything shared": (KNOWN["everything shared"], {}, "`gs.trial.compare` tells"),
    "signals that alternate": (
        (np.outer(np.cos(np.pi * np.arange(L)), np.cos(np.pi * np.arange(L))), EYE),
        {"momentum": 0.0},
        "a window destroys more signal than noise",
    ),
    "noise uneven": (
        KNOWN["noise uneven"],
        {},
        "layers differ in their noise, but share nothing",
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_the_sentence_says_what_to_do(name):
    known, arguments, words = SENTENCES[name]
    found = signal_of(batches_of(*known)[1], **arguments)
    assert words in found.sentence
    assert found.sentence in str(found)


def test_too_few_batches_and_gradients_of_zero_are_told_as_such():
    _, batches = batches_of(0 * EYE, EYE, coordinates=20, number=16, seed=3)
    found = signal_of(batches)
    assert "take more of them" in found.sentence
    assert "unknown" in str(found)
    found = depth_signal([{"h": jnp.zeros((4, 3))}] * 16, gs.scanned("h"))
    assert "all gradients are 0" in found.sentence


def test_stacked_unrolled_and_on_another_axis_give_the_same():
    _, batches = batches_of(*KNOWN["signals alike, noise of its own"], number=16)
    left = signal_of(batches).blocks["h"].left
    last = depth_signal([{"h": b.T} for b in batches], gs.scanned("h", axis=1))
    unrolled = depth_signal([{"h": list(b)} for b in batches], gs.unrolled())
    for other in (last.blocks["h"], unrolled.blocks["h"]):
        assert {*other.left} == {*left}
        for name, share in left.items():
            assert other.left[name] == pytest.approx(share, rel=1e-4)


def test_a_block_is_the_sum_of_its_roles_also_where_a_role_is_not_in_every_layer():
    rng = np.random.default_rng(0)

    def layer(i):
        bias = {"b": rng.normal(size=9)} if i else {}
        return {"w": rng.normal(size=40), **bias}

    batches = [{"h": {str(i): layer(i) for i in range(4)}} for _ in range(16)]
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


def test_a_share_is_shown_with_its_interval():
    assert str(Share(0.9312, 0.911, 0.952)) == "0.931 [0.911, 0.952]"


def trees(number=16, shape=(4, 3), last=None):
    rng = np.random.default_rng(0)
    found = [{"h": rng.normal(size=shape)} for _ in range(number)]
    return found if last is None else [*found, {"h": last}]


WRONG = {
    "one tree": (lambda: {"h": np.ones((4, 3))}, {}, ("one for each batch",)),
    "too few": (
        lambda: trees(5),
        {},
        ("has 5 batches, fewer than `groups` (16)", "groups=5"),
    ),
    "too few groups": (trees, {"groups": 3}, ("`groups` must be", "from 4")),
    "momentum": (trees, {"momentum": 1.0}, ("`momentum` must be", "below 1")),
    "a NaN": (
        lambda: trees(last=np.full((4, 3), np.nan)),
        {},
        ("tree 16", "is not finite"),
    ),
    "other shapes": (
        lambda: trees(last=np.ones((4, 4))),
        {},
        ("tree 16", "other shapes"),
    ),
    "one layer": (
        lambda: trees(shape=(1, 3)),
        {},
        ("couples no layers", "gs.describe"),
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_judged_is_an_error(name):
    gradients, arguments, fragments = WRONG[name]
    with pytest.raises((TypeError, ValueError)) as info:
        depth_signal(gradients(), gs.scanned("h"), **arguments)
    for fragment in fragments:
        assert fragment in str(info.value)
