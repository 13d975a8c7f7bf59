"""Transformations that no evidence speaks for yet: their names may change.

- `learn_alpha`: smooths what `inner` produces, by an α that the gradients teach
- `LearnAlphaState`: its state
- `learn_operator`: the same by a whole operator
- `LearnOperatorState`: its state
"""

from gradsmooth_optax.contrib._learn_alpha import LearnAlphaState as LearnAlphaState
from gradsmooth_optax.contrib._learn_alpha import learn_alpha as learn_alpha
from gradsmooth_optax.contrib._learn_operator import (
    LearnOperatorState as LearnOperatorState,
)
from gradsmooth_optax.contrib._learn_operator import learn_operator as learn_operator
