"""Depth as an axis for optax: which leaf is which layer, and what to do about it.

Say where depth is, then chain what acts along it. Gradient Smoothing (arXiv 2606.30813)
couples the updates of neighboring layers, after the preconditioner of any optimizer:

>>> import gradsmooth_optax as gs
>>> import optax
>>> depth = gs.scanned("blocks/")
>>> tx = optax.chain(
...     optax.scale_by_adam(),
...     gs.smooth_over_depth(depth, 0.1),
...     optax.add_decayed_weights(1e-4),
...     optax.scale_by_learning_rate(1e-3),
... )

Where depth is:

- `unrolled`: one leaf per layer, with the layer's number in its path
- `scanned`: layers stacked along an axis of a leaf
- `first_match`: several specs, the first that fits a leaf wins
- `ranked`: layers in their order, across gaps in their numbers
- `depth_fn`: a spec by a function of path and leaf
- `Depth`: which layers of which stack one leaf holds
- `DepthSpec`: what the functions above return
- `layouts`: ready specs for common stacks

What a spec does to a tree:

- `describe`: shows what is coupled and what is left alone
- `DepthSummary`: what `describe` returns
- `detect`: proposes a spec
- `Detection`: what `detect` returns
- `DepthWarning`: a grouping that is allowed, but probably not meant

Transformations:

- `smooth_over_depth`: couples the updates of neighboring layers
- `with_depth_smoothing`: the same around a preconditioner, whose state it keeps
- `adamw`: AdamW with the smoothing in its place
- `muon`: Muon and Adam with the smoothing in its place
- `DepthSmoothingState`: the state where a strength is a schedule
- `WithDepthSmoothingState`: the same of `with_depth_smoothing`

Every layer by itself:

- `per_layer`: any transformation, on each layer as if it were the whole tree
- `scale_over_depth`: a factor for each layer's update, such as a rate
- `layer_wise_decay`: factors that fall from the last layer to the first
- `factors_fn`: factors by a function of the number of layers
- `LayerFactors`: what these two return
- `stack`: the tree of an unrolled model as that of the scanned one
- `unstack`: and back
- `PerLayerState`: the state of `per_layer` and of the rest
- `StatesByStack`: the state where it does not say what is like the parameters

Operators along depth:

- `window`: the paper's: a share of the weight goes to the neighbors
- `gaussian`: a kernel with a width in layers
- `tikhonov`: smoothing with a long reach
- `ema`: a one-sided average from layer to layer
- `laplacian`: the negative-neighbor operator
- `mean_over_depth`: one update for all layers
- `similarity_window`: couples neighbors only as far as their updates agree
- `layer_scale`: a factor for each layer, to compose with others
- `compose`: one operator after another
- `repeat`: the same operator several times
- `dense`: a matrix of your own
- `operator_fn`: a matrix of your own, by the number of layers
- `Operator`: to subclass
- `Layers`: the updates that an operator couples
- `LayerValues`: one number for every layer of every role
- `controls`: was it the coupling of neighbors, or only a smaller step?

What it does, and whether it helps:

- `diagnostics`: in numbers
- `plots`: in pictures (extra "plots")
- `trial`: a comparison on your own training (extra "trial")
- `contrib`: what no evidence speaks for yet
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
