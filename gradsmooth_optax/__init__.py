"""Gradient Smoothing for JAX: couple per-layer optimizer updates along depth.

An optax transformation after arXiv 2606.30813. Say where depth is, then chain
`smooth_over_depth` after the preconditioner of any optimizer:

>>> import gradsmooth_optax as gs
>>> import optax
>>> depth = gs.scanned("blocks/")
>>> tx = optax.chain(
...     optax.scale_by_adam(),
...     gs.smooth_over_depth(depth, alpha=0.1),
...     optax.add_decayed_weights(1e-4),
...     optax.scale_by_learning_rate(1e-3),
... )
"""

# Where depth is.
from gradsmooth_optax._depth import Depth as Depth
from gradsmooth_optax._specs import DepthSpec as DepthSpec
from gradsmooth_optax._specs import depth_fn as depth_fn
from gradsmooth_optax._specs import first_match as first_match
from gradsmooth_optax._specs import from_tree as from_tree
from gradsmooth_optax._specs import ranked as ranked
from gradsmooth_optax._specs import scanned as scanned
from gradsmooth_optax._specs import unrolled as unrolled

# Where it is in common stacks.
from gradsmooth_optax import layouts as layouts

# What a spec does to a tree, and a proposal of one.
from gradsmooth_optax._describe import DepthSummary as DepthSummary
from gradsmooth_optax._describe import describe as describe
from gradsmooth_optax._detect import Detection as Detection
from gradsmooth_optax._detect import detect as detect

from gradsmooth_optax._suspicions import DepthWarning as DepthWarning

# What is applied along depth.
from gradsmooth_optax._operators import Operator as Operator
from gradsmooth_optax._operators import dense as dense
from gradsmooth_optax._operators import operator_fn as operator_fn
from gradsmooth_optax._smoothers import ema as ema
from gradsmooth_optax._smoothers import gaussian as gaussian
from gradsmooth_optax._smoothers import laplacian as laplacian
from gradsmooth_optax._smoothers import mean_over_depth as mean_over_depth
from gradsmooth_optax._smoothers import tikhonov as tikhonov
from gradsmooth_optax._smoothers import window as window
from gradsmooth_optax._composed import compose as compose
from gradsmooth_optax._composed import repeat as repeat
from gradsmooth_optax._similarity import similarity_window as similarity_window
from gradsmooth_optax import controls as controls

# The transformations and their states.
from gradsmooth_optax._transform import DepthSmoothingState as DepthSmoothingState
from gradsmooth_optax._transform import (
    WithDepthSmoothingState as WithDepthSmoothingState,
)
from gradsmooth_optax._transform import apply_over_depth as apply_over_depth
from gradsmooth_optax._transform import smooth_over_depth as smooth_over_depth
from gradsmooth_optax._transform import with_depth_smoothing as with_depth_smoothing
from gradsmooth_optax._learn_alpha import LearnAlphaState as LearnAlphaState
from gradsmooth_optax._learn_alpha import learn_alpha as learn_alpha
from gradsmooth_optax._learn_operator import LearnOperatorState as LearnOperatorState
from gradsmooth_optax._learn_operator import learn_operator as learn_operator

# What it does, in numbers and in pictures.
from gradsmooth_optax import diagnostics as diagnostics
from gradsmooth_optax import plots as plots

# Ready optimizers.
from gradsmooth_optax._recipes import adamw as adamw
from gradsmooth_optax._recipes import muon as muon
from gradsmooth_optax._recipes import sgd as sgd

__version__ = "0.1.0"
