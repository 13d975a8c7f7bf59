"""Gradient Smoothing for JAX: couple per-layer optimizer updates along depth.

An optax transformation after arXiv 2606.30813. Say where depth is, then chain
`smooth_over_depth` after the preconditioner of any optimizer:

>>> import gradsmooth_optax as gs
>>> import optax
>>> depth = gs.scanned("blocks/")
>>> tx = optax.chain(
...     optax.scale_by_adam(),
...     gs.smooth_over_depth(depth, 0.1),
...     optax.add_decayed_weights(1e-4),
...     optax.scale_by_learning_rate(1e-3),
... )
"""

# Where depth is.
from gradsmooth_optax._depth.depth import Depth as Depth
from gradsmooth_optax._depth.specs import DepthSpec as DepthSpec
from gradsmooth_optax._depth.specs import depth_fn as depth_fn
from gradsmooth_optax._depth.specs import first_match as first_match
from gradsmooth_optax._depth.specs import ranked as ranked
from gradsmooth_optax._depth.specs import scanned as scanned
from gradsmooth_optax._depth.specs import unrolled as unrolled

# Where it is in common stacks.
from gradsmooth_optax import layouts as layouts

# What a spec does to a tree, and a proposal of one.
from gradsmooth_optax._depth.describe import DepthSummary as DepthSummary
from gradsmooth_optax._depth.describe import describe as describe
from gradsmooth_optax._depth.detect import Detection as Detection
from gradsmooth_optax._depth.detect import detect as detect

from gradsmooth_optax._depth.doubts import DepthWarning as DepthWarning

# What is applied along depth.
from gradsmooth_optax._operators.operator import Operator as Operator
from gradsmooth_optax._coupling.layers import Layers as Layers
from gradsmooth_optax._coupling.layer_values import LayerValues as LayerValues
from gradsmooth_optax._operators.operator import dense as dense
from gradsmooth_optax._operators.operator import operator_fn as operator_fn
from gradsmooth_optax._operators.smoothers import ema as ema
from gradsmooth_optax._operators.smoothers import gaussian as gaussian
from gradsmooth_optax._operators.smoothers import laplacian as laplacian
from gradsmooth_optax._operators.smoothers import layer_scale as layer_scale
from gradsmooth_optax._operators.smoothers import mean_over_depth as mean_over_depth
from gradsmooth_optax._operators.smoothers import tikhonov as tikhonov
from gradsmooth_optax._operators.smoothers import window as window
from gradsmooth_optax._operators.composed import compose as compose
from gradsmooth_optax._operators.composed import repeat as repeat
from gradsmooth_optax._operators.similarity import (
    similarity_window as similarity_window,
)
from gradsmooth_optax import controls as controls

# The transformations and their states.
from gradsmooth_optax._transforms.smooth import (
    DepthSmoothingState as DepthSmoothingState,
)
from gradsmooth_optax._transforms.smooth import (
    WithDepthSmoothingState as WithDepthSmoothingState,
)
from gradsmooth_optax._transforms.smooth import smooth_over_depth as smooth_over_depth
from gradsmooth_optax._transforms.smooth import (
    with_depth_smoothing as with_depth_smoothing,
)

# Every layer by itself.
from gradsmooth_optax._transforms.layer_states import PerLayerState as PerLayerState
from gradsmooth_optax._transforms.layer_states import StatesByStack as StatesByStack
from gradsmooth_optax._transforms.per_layer import per_layer as per_layer
from gradsmooth_optax._transforms.scale import LayerFactors as LayerFactors
from gradsmooth_optax._transforms.scale import factors_fn as factors_fn
from gradsmooth_optax._transforms.scale import layer_wise_decay as layer_wise_decay
from gradsmooth_optax._transforms.scale import scale_over_depth as scale_over_depth

from gradsmooth_optax._depth.restack import stack as stack
from gradsmooth_optax._depth.restack import unstack as unstack

# What it does, in numbers and in pictures.
from gradsmooth_optax import diagnostics as diagnostics
from gradsmooth_optax import plots as plots

# Ready optimizers.
from gradsmooth_optax._transforms.recipes import adamw as adamw
from gradsmooth_optax._transforms.recipes import muon as muon

# Does it help on your own model?
from gradsmooth_optax import trial as trial

# What no evidence speaks for yet.
from gradsmooth_optax import contrib as contrib

__version__ = "0.2.0"
