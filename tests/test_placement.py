"""What a chain adds to the parameters, by where the smoothing stands in it."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

RNG = np.random.default_rng(0)
GRADIENT, PARAMS = RNG.normal(size=(2, 4, 3)).astype("float32")
ETA, DECAY, CLIP, EPS = 0.1, 0.3, 0.7, 0.2
FACTORS = [1.0, 0.0, 2.0, 0.5]
DEPTH = gs.scanned("blocks/")
ADAM = optax.scale_by_adam(eps=EPS)
SMOOTH = gs.smooth_over_depth(DEPTH, 0.4)
RATES = gs.scale_over_depth(DEPTH, FACTORS)
DECAYED = optax.add_decayed_weights(DECAY)
CLIPPED = optax.clip_by_global_norm(CLIP)

S = gs.window(0.4).matrix(4)
H = np.diag(FACTORS)


def p(x):  # the first step of Adam
    return x / (np.abs(x) + EPS)


CASES = {
    "in its place": ((ADAM, SMOOTH, DECAYED), S @ p(GRADIENT) + DECAY * PARAMS),
    "before rates": ((ADAM, SMOOTH, RATES), H @ S @ p(GRADIENT)),
    "after rates": ((ADAM, RATES, SMOOTH), S @ H @ p(GRADIENT)),
    "before Adam": ((SMOOTH, ADAM), p(S @ GRADIENT)),
    "after decay": ((ADAM, DECAYED, SMOOTH), S @ (p(GRADIENT) + DECAY * PARAMS)),
    "after clipping": (
        (CLIPPED, ADAM, SMOOTH),
        S @ p(GRADIENT * min(1, CLIP / np.linalg.norm(GRADIENT))),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_chain_adds_what_its_formula_says(case):
    members, expected = CASES[case]
    tx = optax.chain(*members, optax.scale_by_learning_rate(ETA))
    params = {"blocks": {"w": jnp.asarray(PARAMS)}}
    updates, _ = tx.update(
        {"blocks": {"w": jnp.asarray(GRADIENT)}}, tx.init(params), params
    )
    np.testing.assert_allclose(
        updates["blocks"]["w"], -ETA * expected, rtol=1e-4, atol=1e-6
    )
