"""The picture of the README: what a window along depth does to an update.

`python -m benchmarks.readme` writes it to docs/window.svg. It is plain SVG on a white
ground, for light and dark pages, and the same every time.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

import gradsmooth_optax as gs

_LAYERS, _ALPHA = 12, 0.5
_BEFORE, _AFTER = "#767676", "#0072B2"
# Of a panel: its size, and where its first one begins.
_WIDTH, _HEIGHT, _LEFT, _TOP = 245, 110, 16, 72


def window_svg() -> str:
    """Returns the picture: one entry of the update in every layer, before and after."""
    alone = np.zeros(_LAYERS)
    alone[4] = 1.0
    rng = np.random.default_rng(0)
    noisy = 0.3 + 0.4 * np.linspace(0, 1, _LAYERS) + rng.uniform(-0.35, 0.35, _LAYERS)
    second = _LEFT + _WIDTH + 38
    return "\n".join(
        [
            '<svg xmlns="http://www.w3.org/2000/svg" width="560" height="212" '
            'viewBox="0 0 560 212" font-family="sans-serif" font-size="13" '
            'fill="#222">',
            '<rect width="560" height="212" rx="6" fill="#fff"/>',
            *_legend(),
            *_panel(_LEFT, alone, "One layer's update is shared"),
            *_panel(second, noisy, "What layers share stays"),
            "</svg>",
            "",
        ]
    )


def smoothed(values: np.ndarray) -> np.ndarray:
    """Returns what the window makes of one number per layer."""
    tx = gs.smooth_over_depth(gs.scanned("blocks"), _ALPHA)
    updates = {"blocks": jnp.asarray(values)}
    out, _ = tx.update(updates, tx.init(updates))
    return np.asarray(jax.tree.leaves(out)[0])


def _legend() -> Iterator[str]:
    yield '<text x="16" y="26">One entry of the update:</text>'
    yield f'<circle cx="186" cy="22" r="4.5" fill="none" stroke="{_BEFORE}"/>'
    yield '<text x="198" y="26">from the optimizer</text>'
    yield f'<circle cx="345" cy="22" r="4.5" fill="{_AFTER}"/>'
    yield f'<text x="357" y="26">after gs.window({_ALPHA})</text>'


def _panel(left: float, values: np.ndarray, title: str) -> Iterator[str]:
    bottom, right = _TOP + _HEIGHT, left + _WIDTH
    xs = left + (np.arange(_LAYERS) + 0.5) * _WIDTH / _LAYERS
    yield f'<text x="{left}" y="{_TOP - 18}" font-weight="bold">{title}</text>'
    yield f'<path d="M{left} {bottom}h{_WIDTH}" stroke="#222"/>'
    yield f'<text x="{left}" y="{bottom + 18}">layer 1</text>'
    yield f'<text x="{right}" y="{bottom + 18}" text-anchor="end">{_LAYERS}</text>'
    before, after = (
        [bottom - _HEIGHT * v for v in of] for of in (values, smoothed(values))
    )
    yield _line(xs, before, _BEFORE, "4 3")
    yield _line(xs, after, _AFTER, "none")
    for x, y in zip(xs, before, strict=True):
        ring = f'fill="#fff" stroke="{_BEFORE}"'
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" {ring}/>'
    for x, y in zip(xs, after, strict=True):
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_AFTER}"/>'


def _line(
    xs: Sequence[float] | np.ndarray, ys: Sequence[float], color: str, dash: str
) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    return (
        f'<polyline points="{points}" fill="none" stroke="{color}" '
        f'stroke-width="1.5" stroke-dasharray="{dash}"/>'
    )
