"""The dtype of the arithmetic: float32 at least, whatever the dtype of the updates."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def widened(x: jax.Array) -> jax.Array:
    """`x` in at least float32 (complex64)."""
    return x if num_bits(x.dtype) >= 32 else x.astype(jnp.float32)


def num_bits(dtype: Any) -> int:
    """Bits of a floating dtype, or of the parts of a complex one."""
    return jnp.finfo(dtype).bits


def in_dtype(number: Any, dtype: Any) -> Any:
    """An array in this dtype; a Python number stays weakly typed."""
    return number.astype(dtype) if isinstance(number, jax.Array) else number
