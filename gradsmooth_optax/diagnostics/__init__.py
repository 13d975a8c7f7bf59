"""What smoothing does, in numbers.

- `depth_statistics`: norms, cosines of neighbors and roughness of the updates
- `DepthStatistics`, `RoleStatistics`: what it returns for a stack, and for a role
- `monitor_depth`: the same before and after smoothing, kept in the optimizer's state
- `monitored`: the record out of that state
- `DepthRecord`, `MonitorDepthState`: the record, and the state
- `cosine_matrix`: cosines of all pairs of layers
- `gradient_noise`: the variance over micro-batches, per layer
- `GradientNoise`: what it returns
- `depth_signal`: is there anything to couple?
- `DepthSignal`, `LayerSignal`, `Share`: what it returns
- `line_shape_score`: how far the states' path through the layers is from a line
- `residual_alignment`: how alike is what neighboring blocks add to the states
- `contraction_factor`: how much an operator shrinks differences between layers
"""

# Of the updates along depth, once or while training.
from gradsmooth_optax.diagnostics._statistics import DepthStatistics as DepthStatistics
from gradsmooth_optax.diagnostics._statistics import RoleStatistics as RoleStatistics
from gradsmooth_optax.diagnostics._statistics import (
    depth_statistics as depth_statistics,
)
from gradsmooth_optax.diagnostics._cosine_matrix import cosine_matrix as cosine_matrix
from gradsmooth_optax.diagnostics._monitor import DepthRecord as DepthRecord
from gradsmooth_optax.diagnostics._monitor import MonitorDepthState as MonitorDepthState
from gradsmooth_optax.diagnostics._monitor import monitor_depth as monitor_depth
from gradsmooth_optax.diagnostics._monitor import monitored as monitored
from gradsmooth_optax.diagnostics._gradient_noise import GradientNoise as GradientNoise
from gradsmooth_optax.diagnostics._gradient_noise import (
    gradient_noise as gradient_noise,
)

from gradsmooth_optax.diagnostics._depth_signal import DepthSignal as DepthSignal
from gradsmooth_optax.diagnostics._depth_signal import LayerSignal as LayerSignal
from gradsmooth_optax.diagnostics._depth_signal import Share as Share
from gradsmooth_optax.diagnostics._depth_signal import depth_signal as depth_signal

# Of the states that the layers pass on.
from gradsmooth_optax.diagnostics._residual_stream import (
    line_shape_score as line_shape_score,
)
from gradsmooth_optax.diagnostics._residual_stream import (
    residual_alignment as residual_alignment,
)

# Of an operator.
from gradsmooth_optax.diagnostics._contraction import (
    contraction_factor as contraction_factor,
)
