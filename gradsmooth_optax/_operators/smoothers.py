"""The operators of the paper, of the authors' code, and the classical smoothers."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from gradsmooth_optax._arrays import num_bits
from gradsmooth_optax._checks import (
    Matrix,
    check_flag,
    factors_in,
    is_function,
    positive_int,
    strength_in,
)
from gradsmooth_optax._operators.operator import Operator, resolved, resolved_factors

if TYPE_CHECKING:
    from gradsmooth_optax._coupling.layers import Layers

_NO_COUPLING = " For no coupling at all pass `alpha=0.0`."


def window(
    alpha: optax.ScalarOrSchedule,
    radius: int = 1,
    decay: optax.ScalarOrSchedule | None = None,
) -> Operator:
    """Window Smoothing: each layer shares a part α of its weight with its neighbors.

    A layer keeps 1 - α; each side shares α/2 among its neighbors within `radius`, in
    proportion to exp(-decay · distance). The weight of a neighbor that does not exist
    goes to the layer itself, so S is symmetric and its rows and columns sum to 1. For
    `radius=1`:

        interior   u'_l = (1-α) u_l + α/2 (u_{l-1} + u_{l+1})
        ends       u'_1 = (1-α/2) u_1 + α/2 u_2       (and the mirror image at L)

    which has no negative eigenvalue for α ≤ 1/2. Above, what alternates from layer to
    layer can change its sign, so that a smoothed gradient may ascend.

    Args:
      alpha: scalar in [0, 1] or a schedule of it. Only Python and NumPy numbers are
        range-checked.
      radius: how many neighbors on each side, an int ≥ 1.
      decay: scalar ≥ 0 or a schedule; None shares equally.

    Returns:
      An operator for `smooth_over_depth`.

    Raises:
      TypeError, ValueError: at construction, for a strength or radius of the wrong
        kind or out of range.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.window(0.2).matrix(3)
      array([[0.9, 0.1, 0. ],
             [0.1, 0.8, 0.1],
             [0. , 0.1, 0.9]])

    Differs from the authors' code:
      A single layer passes through unchanged; there it is shrunk by 1 - α/2.

    References:
      Meng, Sugolov, Papyan, "Gradient Smoothing", arXiv 2606.30813, section 3.
    """
    return Window(alpha, radius, decay)


def as_operator(value: Any) -> Operator:
    """The operator that `value`, an operator or a strength of the window, is."""
    if isinstance(value, Operator):
        return value
    is_strength = isinstance(value, int | float) and not isinstance(value, bool)
    is_strength |= is_function(value)
    if is_strength or (hasattr(value, "dtype") and np.shape(value) == ()):
        return Window(value)
    hint = "`0.1` or `window(0.1)`"
    if hasattr(value, "shape"):
        hint = "`dense(matrix)` for a matrix, `0.1` for the paper's window"
    elif isinstance(value, optax.GradientTransformation):
        hint = f"{hint} here, and chain transformations"
    raise TypeError(
        f"`operator` must be a strength of the window (a number, an optax schedule or "
        f"a scalar array) or a depth operator, but is {value!r} of type "
        f"{type(value).__name__}. Write {hint}."
    )


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Window(Operator):
    made_by: ClassVar[str] = "window"
    strengths: ClassVar[tuple[str, ...]] = ("alpha", "decay")

    alpha: optax.ScalarOrSchedule
    width: int = dataclasses.field(default=1, metadata={"argument": "radius"})
    decay: optax.ScalarOrSchedule | None = None

    def __post_init__(self):
        object.__setattr__(self, "alpha", strength_in("alpha", self.alpha, high=1.0))
        width = positive_int("radius", self.width, _NO_COUPLING)
        object.__setattr__(self, "width", width)
        if self.decay is not None:
            object.__setattr__(self, "decay", strength_in("decay", self.decay))

    def couple(self, layers: Layers) -> Layers:
        if not layers.prefers_shifts(self.width):
            return super().couple(layers)
        # The difference form keeps a depth-constant update bit-exact.
        out = layers
        weights = self._side_weights(layers.longest_run)
        for distance, weight in enumerate(weights, start=1):
            for offset in (-distance, distance):
                out = out + layers.difference(offset, weight)
        return out

    def matrix(self, num_layers: int) -> Matrix:
        return _symmetric(self._side_weights(num_layers), num_layers)

    def radius(self, num_layers: int) -> int:
        return min(self.width, num_layers - 1)

    def _side_weights(self, num_layers: int) -> Matrix:
        """w_1, w_2, … of S u = u + Σ_j w_j (u_{l-j} - u_l + u_{l+j} - u_l).

        Those of the distances in a run of `num_layers`, however wide the window is.
        """
        alpha = resolved(self.alpha)
        decay = 0.0 if self.decay is None else resolved(self.decay)
        if isinstance(alpha, jax.Array) and isinstance(decay, jax.Array):
            widest = max(alpha.dtype, decay.dtype, key=num_bits)
            alpha, decay = alpha.astype(widest), decay.astype(widest)
        # Relative to distance 1, so that a large decay cannot make all of them 0.
        distances = np.arange(min(self.width, num_layers - 1))
        if isinstance(decay, float):
            decay = np.minimum(decay, _LARGEST_DECAY)
            shares, ratio = np.exp(-decay * distances), math.exp(-decay)
        else:
            decay = jnp.minimum(decay, _LARGEST_DECAY)
            shares = jnp.exp(-decay * distances.astype(decay.dtype))
            ratio = jnp.exp(-decay)
        return alpha / 2 * (shares / _geometric_sum(ratio, self.width))

    @property
    def is_identity(self) -> bool:
        return _is_zero(self.alpha)


def gaussian(sigma: optax.ScalarOrSchedule, radius: int | None = None) -> Operator:
    """A Gaussian kernel along depth, with the window's rule at the ends.

    Neighbors at distance j get exp(-j² / 2σ²), normalized over -radius..radius; the
    weight of a neighbor that does not exist goes to the layer itself, so S is symmetric
    and its rows and columns sum to 1.

    Args:
      sigma: width in layers, scalar ≥ 0 or a schedule; 0 changes nothing.
      radius: neighbors on each side, an int ≥ 1. None means ceil(3σ), which needs a
        `sigma` that is a Python or NumPy number.

    Returns:
      An operator for `smooth_over_depth`.

    Raises:
      TypeError, ValueError: at construction, for an argument of the wrong kind or out
        of range, or without a `radius` where `sigma` is a schedule or an array.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.gaussian(1.0, radius=1).matrix(3).round(3)
      array([[0.726, 0.274, 0.   ],
             [0.274, 0.452, 0.274],
             [0.   , 0.274, 0.726]])
    """
    return Gaussian(sigma, radius)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Gaussian(Operator):
    made_by: ClassVar[str] = "gaussian"
    strengths: ClassVar[tuple[str, ...]] = ("sigma",)

    sigma: optax.ScalarOrSchedule
    width: int | None = dataclasses.field(default=None, metadata={"argument": "radius"})

    def __post_init__(self):
        sigma = strength_in("sigma", self.sigma)
        object.__setattr__(self, "sigma", sigma)
        if self.width is None:
            if callable(sigma) or isinstance(sigma, jax.Array):
                raise ValueError(
                    f"`radius` of `gaussian` is needed where `sigma` is a schedule or "
                    f"an array ({sigma!r}), since it decides what is compiled. Write "
                    f"`gaussian(sigma, radius=3)`, about three times the largest sigma."
                )
            # In integers where three times the largest floats are infinite.
            is_finite = 3 * sigma < math.inf
            width = max(1, math.ceil(3 * sigma) if is_finite else 3 * math.ceil(sigma))
        else:
            width = positive_int("radius", self.width)
        object.__setattr__(self, "width", width)

    def matrix(self, num_layers: int) -> Matrix:
        return _symmetric(self._side_weights(num_layers), num_layers)

    def radius(self, num_layers: int) -> int:
        return min(self.width or 1, num_layers - 1)

    def _side_weights(self, num_layers: int) -> Matrix:
        sigma, width = resolved(self.sigma), self.width or 1
        if isinstance(sigma, float):
            # Below, exp(-1 / 2σ²) is 0, and a division by σ may overflow.
            if sigma < _NARROWEST:
                return np.zeros(min(width, num_layers - 1))
            with np.errstate(over="ignore"):  # of a sum near the largest float
                kernel, total = _gaussian_kernel(sigma, width, num_layers, np, math.erf)
            return kernel / total
        # Replaced before the division, whose derivative at 0 would be NaN.
        narrow = sigma < _NARROWEST
        safe = jnp.where(narrow, jnp.ones_like(sigma), sigma)
        kernel, total = _gaussian_kernel(
            safe, width, num_layers, jnp, jax.scipy.special.erf
        )
        return jnp.where(narrow, jnp.zeros_like(kernel), kernel / total)

    @property
    def is_identity(self) -> bool:
        return _is_zero(self.sigma)


def tikhonov(strength: optax.ScalarOrSchedule) -> Operator:
    """Tikhonov (ridge) smoothing: S = (I + strength · P)^-1, P the path's Laplacian.

    The u' that minimizes Σ_l ‖u'_l - u_l‖² + strength · Σ_l ‖u'_{l+1} - u'_l‖². S is
    symmetric, its rows and columns sum to 1, and it reaches all layers of the run.

    Args:
      strength: scalar ≥ 0 or a schedule; 0 changes nothing.

    Returns:
      An operator for `smooth_over_depth`.

    Raises:
      TypeError, ValueError: at construction, for a strength of the wrong kind or out of
        range.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.tikhonov(1.0).matrix(2).round(3)
      array([[0.667, 0.333],
             [0.333, 0.667]])
    """
    return Tikhonov(strength)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Tikhonov(Operator):
    made_by: ClassVar[str] = "tikhonov"
    strengths: ClassVar[tuple[str, ...]] = ("strength",)

    strength: optax.ScalarOrSchedule

    def __post_init__(self):
        object.__setattr__(self, "strength", strength_in("strength", self.strength))

    def matrix(self, num_layers: int) -> Matrix:
        # The eigenvectors of P are the cosines of the DCT-II, whatever the strength.
        k = np.arange(num_layers)
        cosines = np.cos(np.pi * np.outer(k + 0.5, k) / num_layers)
        cosines /= np.linalg.norm(cosines, axis=0)
        eigenvalues = 4 * np.sin(np.pi * k / (2 * num_layers)) ** 2
        strength = resolved(self.strength)
        if isinstance(strength, float):
            return (cosines / (1 + strength * eigenvalues)) @ cosines.T
        cosines, eigenvalues = (
            jnp.asarray(a, strength.dtype) for a in (cosines, eigenvalues)
        )
        shrunk = cosines / (1 + strength * eigenvalues)[None, :]
        return jnp.matmul(shrunk, cosines.T, precision=lax.Precision.HIGHEST)

    @property
    def is_identity(self) -> bool:
        return _is_zero(self.strength)


def ema(rho: optax.ScalarOrSchedule, reverse: bool = False) -> Operator:
    """Exponential moving average over depth, as in the authors' code.

    m_1 = u_1 and m_l = ρ m_{l-1} + (1-ρ) u_l; layer l receives m_l. Rows of S sum to 1,
    but it is not symmetric.

    Args:
      rho: memory, scalar in [0, 1] or a schedule; 0 changes nothing.
      reverse: whether to start at the last layer and go backwards.

    Returns:
      An operator for `smooth_over_depth`.

    Raises:
      TypeError, ValueError: at construction, for an argument of the wrong kind or out
        of range.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.ema(0.5).matrix(3)
      array([[1.  , 0.  , 0.  ],
             [0.5 , 0.5 , 0.  ],
             [0.25, 0.25, 0.5 ]])
    """
    return Ema(rho, reverse)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Ema(Operator):
    made_by: ClassVar[str] = "ema"
    strengths: ClassVar[tuple[str, ...]] = ("rho",)

    rho: optax.ScalarOrSchedule
    reverse: bool = False

    def __post_init__(self):
        object.__setattr__(self, "rho", strength_in("rho", self.rho, high=1.0))
        check_flag("reverse", self.reverse)

    def matrix(self, num_layers: int) -> Matrix:
        layers = np.arange(num_layers)
        distance = np.subtract.outer(layers, layers)
        # The layer visited first starts the average and has nothing to share with.
        is_first, is_before = layers == 0, distance >= 0
        rho = resolved(self.rho)
        if isinstance(rho, float):
            powers = np.where(is_before, rho ** np.maximum(distance, 0), 0.0)
            matrix = powers * np.where(is_first, 1.0, 1 - rho)
        else:
            # Without a power of 0, whose derivative at 0 would be NaN.
            exponents = jnp.asarray(np.maximum(distance, 1), rho.dtype)
            powers = jnp.where(distance == 0, jnp.ones_like(rho), rho**exponents)
            powers = jnp.where(is_before, powers, jnp.zeros_like(rho))
            own = jnp.where(is_first, jnp.ones_like(rho), 1 - rho)
            matrix = powers * own[None, :]
        return matrix[::-1, ::-1] if self.reverse else matrix

    def offsets(self, num_layers: int) -> range:
        return range(num_layers) if self.reverse else range(1 - num_layers, 1)

    @property
    def is_identity(self) -> bool:
        return _is_zero(self.rho)


def laplacian(alpha: optax.ScalarOrSchedule) -> Operator:
    """The negative-neighbor operator that the authors' code calls Laplacian.

        interior   u'_l = (1-α) u_l - α/2 (u_{l-1} + u_{l+1})
        ends       u'_1 = (1-α/2) u_1 - α/2 u_2       (and the mirror image at L)

    It sharpens differences between layers and shrinks what they share: its rows do not
    sum to 1.

    Args:
      alpha: scalar in [0, 1] or a schedule; 0 changes nothing.

    Returns:
      An operator for `smooth_over_depth`.

    Raises:
      TypeError, ValueError: at construction, for an `alpha` of the wrong kind or out of
        range.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.laplacian(0.2).matrix(3)
      array([[ 0.9, -0.1,  0. ],
             [-0.1,  0.8, -0.1],
             [ 0. , -0.1,  0.9]])

    Differs from the authors' code:
      A single layer passes through unchanged; there it is shrunk by 1 - α/2.
    """
    return Laplacian(alpha)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Laplacian(Operator):
    made_by: ClassVar[str] = "laplacian"
    strengths: ClassVar[tuple[str, ...]] = ("alpha",)

    alpha: optax.ScalarOrSchedule

    def __post_init__(self):
        object.__setattr__(self, "alpha", strength_in("alpha", self.alpha, high=1.0))

    def matrix(self, num_layers: int) -> Matrix:
        neighbors = np.eye(num_layers, k=1) + np.eye(num_layers, k=-1)
        change = neighbors + np.diag(neighbors.sum(1))
        half = resolved(self.alpha) / 2
        dtype = getattr(half, "dtype", np.float64)
        return np.eye(num_layers, dtype=dtype) - half * change.astype(dtype)

    def radius(self, num_layers: int) -> int:
        return min(1, num_layers - 1)

    @property
    def is_identity(self) -> bool:
        return _is_zero(self.alpha)


def mean_over_depth() -> Operator:
    """Every layer receives the mean of its run: the far end of all smoothing.

    Returns:
      An operator for `smooth_over_depth`.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.mean_over_depth().matrix(2)
      array([[0.5, 0.5],
             [0.5, 0.5]])
    """
    return MeanOverDepth()


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class MeanOverDepth(Operator):
    made_by: ClassVar[str] = "mean_over_depth"

    def matrix(self, num_layers: int) -> Matrix:
        return np.full((num_layers, num_layers), 1 / num_layers)


def layer_scale(factors: Any) -> Operator:
    """Scales every layer by a factor of its own: a diagonal S, for `compose`.

        u'_l = factors_l u_l

    It acts by runs, as every operator does, but also on a run of one layer.

    Args:
      factors: a number for all layers, an array (L,) with one for each layer of a run,
        or a schedule of either. 1 changes nothing.

    Returns:
      An operator for `smooth_over_depth`.

    Raises:
      TypeError, ValueError: at construction, for factors of the wrong kind, not finite,
        or of more than one axis; at trace of `update`, for a run of another length.

    Example:
      >>> import gradsmooth_optax as gs
      >>> gs.layer_scale([0.25, 0.5, 1.0]).matrix(3)
      array([[0.25, 0.  , 0.  ],
             [0.  , 0.5 , 0.  ],
             [0.  , 0.  , 1.  ]])
    """
    return LayerScale(factors)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LayerScale(Operator):
    made_by: ClassVar[str] = "layer_scale"
    strengths: ClassVar[tuple[str, ...]] = ("factors",)

    factors: Any

    def __post_init__(self):
        object.__setattr__(self, "factors", factors_in("factors", self.factors))

    def couple(self, layers: Layers) -> Layers:
        return layers.scaled(self._of_run)

    def matrix(self, num_layers: int) -> Matrix:
        factors = self._of_run(num_layers)
        return (
            np.diag(factors) if isinstance(factors, np.ndarray) else jnp.diag(factors)
        )

    def radius(self, num_layers: int) -> int:
        return 0

    def _of_run(self, num_layers: int) -> Matrix:
        factors = resolved_factors(self.factors)
        if np.shape(factors) == ():
            ones = np.ones(num_layers)
            return factors * ones.astype(getattr(factors, "dtype", np.float64))
        if np.shape(factors) != (num_layers,):
            raise ValueError(
                f"`layer_scale` holds factors for {np.shape(factors)[0]} layers, but "
                f"is applied to a run of {num_layers}. Pass one number, or restrict "
                f"`depth` to the stack of {np.shape(factors)[0]} layers with "
                f"`.only(...)`."
            )
        return factors

    @property
    def is_identity(self) -> bool:
        return isinstance(self.factors, float | int) and self.factors == 1

    @property
    def scales_single_layers(self) -> bool:
        return True


# Of σ and of a decay: beyond these exp(-1 / 2σ²) and exp(-decay) are 0 in float64.
_NARROWEST = 0.02
_LARGEST_DECAY = 1e4

# Of the terms of a kernel's sum: those beyond follow from an integral.
_MOST_TERMS = 4096


def _gaussian_kernel(
    sigma: Any, width: int, num_layers: int, xnp: Any, erf: Any
) -> tuple[Any, Any]:
    """exp(-j² / 2σ²) for j = 1, … in a run, and the sum of all up to ±width."""
    dtype = getattr(sigma, "dtype", np.float64)
    terms = min(width, _MOST_TERMS)
    distances = np.arange(1, max(terms, min(width, num_layers - 1)) + 1).astype(dtype)
    kernel = xnp.exp(-0.5 * (distances / sigma) ** 2)
    total = 1 + 2 * kernel[:terms].sum()

    def beyond(number: Any) -> Any:
        # Of all terms beyond, in units of σ, by Euler and Maclaurin: a sum of two that
        # are too large for a float would have no difference.
        x = xnp.minimum((number + 0.5) / sigma, 1e3)
        integral = math.sqrt(math.pi / 2) * (1 - erf(x / math.sqrt(2)))
        return integral - x / (24 * sigma * sigma) * xnp.exp(-0.5 * x**2)

    if width > terms:
        last = min(width, float(jnp.finfo(dtype).max))
        total = total + 2 * sigma * (beyond(terms) - beyond(last))
    return kernel[: num_layers - 1], total


def _geometric_sum(ratio: Any, count: int) -> Any:
    """1 + ratio + … + ratio^(count-1), in log₂ count steps and without a division."""
    total, power, found, at = 1.0, ratio, 0.0, 1.0
    while count:
        if count % 2:
            found, at = found + at * total, at * power
        total, power = total * (1 + power), power * power
        count //= 2
    return found


def _symmetric(weights: Matrix, num_layers: int) -> Matrix:
    """I + Σ_j w_j (neighbors at distance j - their number): rows sum to 1."""
    layers = np.arange(num_layers)
    distance = np.abs(np.subtract.outer(layers, layers))
    is_coupled = (distance > 0) & (distance <= weights.shape[0])
    beside = weights[np.where(is_coupled, distance - 1, 0)] if num_layers > 1 else 0.0
    xnp = np if isinstance(weights, np.ndarray) else jnp
    neighbors = xnp.where(is_coupled, beside, xnp.zeros((), weights.dtype))
    return neighbors + xnp.diag(1 - neighbors.sum(1))


def _is_zero(strength: Any) -> bool:
    """Whether it is a number, and 0."""
    return isinstance(strength, float | int | np.generic) and float(strength) == 0
