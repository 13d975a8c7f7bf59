"""Pictures of what smoothing does. Needs matplotlib: the extra "plots".

Every function draws into one `matplotlib.axes.Axes`, a new figure's or `ax`, and
returns it, so that anything can be added or changed; none shows or saves a figure.
Colors are told apart by color-blind readers, and lines, markers and hatches by readers
of a black-and-white print.

- `operator_matrix`: what every layer receives, by an operator
- `cosine_matrix`: how alike the updates of every two layers are
- `depth_signal`: is there anything to couple?
- `roughness_over_training`: of the updates, before and after smoothing
- `cosines_over_training`: of neighbors' updates, before and after smoothing
- `layer_norms`: of every layer's update, before and after smoothing
- `paired_differences`: between runs and a base, seed by seed
"""

# Layers against layers.
from gradsmooth_optax.plots._layers import operator_matrix as operator_matrix
from gradsmooth_optax.plots._layers import cosine_matrix as cosine_matrix

# Is there anything to couple?
from gradsmooth_optax.plots._signal import depth_signal as depth_signal

# Before and after smoothing.
from gradsmooth_optax.plots._records import (
    roughness_over_training as roughness_over_training,
)
from gradsmooth_optax.plots._records import (
    cosines_over_training as cosines_over_training,
)
from gradsmooth_optax.plots._records import layer_norms as layer_norms

# Does it help?
from gradsmooth_optax.plots._differences import paired_differences as paired_differences
