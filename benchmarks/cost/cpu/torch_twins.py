"""PyTorch twins of the window, written from its equations.

    u'_l = (1 - α) u_l + α/2 (u_{l-1} + u_{l+1}), a missing neighbor being u_l itself

Three ways to write it: for layers stacked in one tensor, for a list of one tensor per
layer with PyTorch's multi-tensor functions, and as a hook of an optimizer does it:
clone all updates, then write every layer of every parameter anew.
"""

# PyTorch is optional, and its multi-tensor functions have no public names.
# pyright: reportMissingImports=false, reportPrivateImportUsage=false

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def stacked_window(u: Tensor, alpha: float) -> Tensor:
    """Returns S u of layers stacked along axis 0."""
    before = torch.cat([u[:1], u[:-1]])
    after = torch.cat([u[1:], u[-1:]])
    return (1 - alpha) * u + alpha / 2 * (before + after)


def stacked_norm_preserving(u: Tensor, alpha: float) -> Tensor:
    """Returns S u of stacked layers, each at the norm that it had."""
    smoothed = stacked_window(u, alpha)
    others = tuple(range(1, u.ndim))
    return smoothed * _ratio(
        *(torch.linalg.vector_norm(x, dim=others, keepdim=True) for x in (u, smoothed))
    )


def listed_window(us: Sequence[Tensor], alpha: float) -> list[Tensor]:
    """Returns S u of one tensor per layer."""
    us = list(us)
    sums = torch._foreach_add(us[:1] + us[:-1], us[1:] + us[-1:])
    smoothed = torch._foreach_mul(us, 1 - alpha)
    torch._foreach_add_(smoothed, sums, alpha=alpha / 2)
    return list(smoothed)


def listed_norm_preserving(us: Sequence[Tensor], alpha: float) -> list[Tensor]:
    """Returns S u of one tensor per layer, each at the norm that it had."""
    smoothed = listed_window(us, alpha)
    norms = (torch._foreach_norm(list(x)) for x in (us, smoothed))
    ratios = [_ratio(*of_layer) for of_layer in zip(*norms, strict=True)]
    torch._foreach_mul_(smoothed, ratios)
    return smoothed


def hook_window(us: Sequence[Tensor], alpha: float) -> None:
    """Replaces one tensor per layer by S u."""
    old = [u.clone() for u in us]
    for layer, u in enumerate(us):
        before, after = old[max(layer - 1, 0)], old[min(layer + 1, len(old) - 1)]
        u.copy_((1 - alpha) * old[layer] + alpha / 2 * (before + after))


def hook_norm_preserving(us: Sequence[Tensor], alpha: float) -> None:
    """Replaces one tensor per layer by S u, each at the norm that it had."""
    norms = [torch.linalg.vector_norm(u) for u in us]
    hook_window(us, alpha)
    for u, norm in zip(us, norms, strict=True):
        u.mul_(_ratio(norm, torch.linalg.vector_norm(u)))


STACKED: dict[str, Callable] = {
    "window": stacked_window,
    "norm_preserving": stacked_norm_preserving,
}
LISTED: dict[str, Callable] = {
    "window": listed_window,
    "norm_preserving": listed_norm_preserving,
}
HOOK: dict[str, Callable] = {
    "window": hook_window,
    "norm_preserving": hook_norm_preserving,
}


def _ratio(before: Tensor, after: Tensor) -> Tensor:
    """before / after, and 1 where one of them is 0."""
    zero = (before == 0) | (after == 0)
    return torch.where(zero, 1.0, before / torch.where(zero, 1.0, after))
