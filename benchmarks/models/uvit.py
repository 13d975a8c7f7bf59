"""A small U-ViT in Flax Linen: unrolled blocks with long skips, for square images.

Every block has the same parts; those of the second half have one more, `skip`, which
mixes the residual stream with what its partner of the first half gave. All kernels are
matrices `(inputs, outputs)`.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn


def half_of(layers: int) -> int:
    """Returns how many blocks are before `mid_block`, and as many after it.

    Args:
      layers: number of all blocks.

    Raises:
      ValueError: if there is no such U-ViT.
    """
    if layers % 2 == 0 or layers < 3:
        nearest = {max(layers - 1, 3), max(layers + 1, 3)}
        raise ValueError(
            "`layers` of a U-ViT counts its in_blocks, one mid_block and as many "
            f"out_blocks, so it is odd and at least 3, but is {layers}; use "
            f"{' or '.join(map(str, sorted(nearest)))}."
        )
    return layers // 2


class Attention(nn.Module):
    """Multi-head self-attention of `(batch, tokens, width)` activations."""

    heads: int
    output_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        batch, tokens, width = x.shape
        qkv = nn.Dense(3 * width, name="qkv")(x)
        query, key, value = jnp.split(
            qkv.reshape(batch, tokens, 3 * self.heads, width // self.heads), 3, axis=2
        )
        mixed = jax.nn.dot_product_attention(query, key, value)
        return nn.Dense(width, kernel_init=self.output_init, name="out")(
            mixed.reshape(batch, tokens, width)
        )


class Block(nn.Module):
    """A pre-norm block; with a second input it first mixes both by a matrix, `skip`."""

    heads: int
    output_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: jax.Array, skipped: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        if skipped is not None:
            x = nn.Dense(width, name="skip")(jnp.concatenate([x, skipped], axis=-1))
        h = nn.LayerNorm(name="attention_norm")(x)
        x = x + Attention(self.heads, self.output_init, name="attention")(h)
        h = nn.LayerNorm(name="mlp_norm")(x)
        h = nn.gelu(nn.Dense(4 * width, name="mlp_in")(h))
        return x + nn.Dense(width, kernel_init=self.output_init, name="mlp_out")(h)


class UViT(nn.Module):
    """Maps noised images `(batch, size, size)` and times `(batch,)` to their noise.

    Tokens are the time and then the patches, row by row.

    Attributes:
      layers: number of all blocks: `in_blocks_{i}`, `mid_block`, `out_blocks_{i}`.
      width: of the residual stream; even.
      heads: of attention, in every block.
      patch: pixels along an edge of a patch; divides the size of an image.
    """

    layers: int
    width: int
    heads: int
    patch: int = 2

    @nn.compact
    def __call__(self, images: jax.Array, times: jax.Array) -> jax.Array:
        half = half_of(self.layers)
        # The sum of 2 L such outputs has the variance of one ordinary output.
        scaled = nn.initializers.variance_scaling(
            1 / (2 * self.layers), "fan_in", "truncated_normal"
        )

        def block(name: str) -> Block:
            return Block(self.heads, scaled, name=name)

        patches = to_patches(images, self.patch)
        time = nn.Dense(self.width, name="time")(waves(times, self.width))
        x = nn.Dense(self.width, name="patches")(patches)
        x = jnp.concatenate([time[:, None], x], axis=1)
        normal = nn.initializers.normal(0.5)
        x = x + self.param("positions", normal, x.shape[1:])
        # Only kept when "intermediates" is mutable: one after the other, in a tuple.
        self.sow("intermediates", "states", x)
        skips = []
        for i in range(half):
            x = block(f"in_blocks_{i}")(x)
            self.sow("intermediates", "states", x)
            skips.append(x)
        x = block("mid_block")(x)
        self.sow("intermediates", "states", x)
        for i in range(half):
            x = block(f"out_blocks_{i}")(x, skips.pop())
            self.sow("intermediates", "states", x)
        x = nn.LayerNorm(name="final_norm")(x[:, 1:])
        head = nn.Dense(
            self.patch**2, kernel_init=nn.initializers.normal(0.02), name="head"
        )
        return from_patches(head(x), images.shape[-1])


def waves(times: jax.Array, width: int) -> jax.Array:
    """Returns cosines and sines of times in [0, 1], `(batch, width)`.

    Their angles go from `times` to 100 `times`.
    """
    angles = times[:, None] * jnp.geomspace(1.0, 100.0, width // 2)
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def to_patches(images: jax.Array, patch: int) -> jax.Array:
    """Returns the patches of images, `(batch, number, patch * patch)`, row by row."""
    batch, size, _ = images.shape
    side = size // patch
    split = images.reshape(batch, side, patch, side, patch).swapaxes(2, 3)
    return split.reshape(batch, side * side, patch * patch)


def from_patches(patches: jax.Array, size: int) -> jax.Array:
    """Returns the images `(batch, size, size)` of which `to_patches` made patches."""
    batch, number, pixels = patches.shape
    side = int(number**0.5)
    patch = int(pixels**0.5)
    split = patches.reshape(batch, side, side, patch, patch).swapaxes(2, 3)
    return split.reshape(batch, size, size)
