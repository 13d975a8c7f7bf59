"""What smoothing does, in numbers."""

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
