"""The models behind `trees/built_here.txt`, as shapes: what their packages build."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# -- Flax Linen ------------------------------------------------------------------------


def linen(layers, annotate=None):
    """A model of the layers that `layers(block, x)` calls."""
    import flax.linen as nn

    def normal(*names):
        init = nn.initializers.lecun_normal()
        return getattr(nn, annotate)(init, names) if annotate else init

    class MlpBlock(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(5, kernel_init=normal("embed", "mlp"))(x)
            return nn.Dense(3, use_bias=False, kernel_init=normal("mlp", "embed"))(x)

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            return x + MlpBlock()(nn.LayerNorm(use_bias=False)(x)), None

    class Model(nn.Module):
        layers: Callable

        @nn.compact
        def __call__(self, tokens):
            x = self.layers(Block, nn.Embed(7, 3)(tokens))
            return nn.Dense(7, use_bias=False, name="head")(x)

    tokens = jnp.zeros((1, 2), int)
    return jax.eval_shape(Model(layers).init, jax.random.key(0), tokens)


def loop(name=None, num_layers=3, wrap=lambda module: module):
    def layers(block, x):
        for i in range(num_layers):
            x, _ = wrap(block)(name=name and name.format(i))(x)
        return x

    return layers


def remat(module):
    import flax.linen as nn

    return nn.remat(module)


def encoder_and_decoder(block, x):
    import flax.linen as nn

    class Coder(nn.Module):
        block: str
        num_layers: int

        @nn.compact
        def __call__(self, x):
            x = loop(self.block, self.num_layers)(block, x)
            return nn.LayerNorm(use_bias=False)(x)

    x = Coder("encoderblock_{}", 3, name="encoder")(x)
    return Coder("encoderdecoderblock_{}", 4, name="decoder")(x)


def nn_scan(axis, **kwargs):
    def layers(block, x):
        import flax.linen as nn

        axes = {"variable_axes": {"params": axis}, "split_rngs": {"params": True}}
        return nn.scan(block, length=4, **axes, **kwargs)()(x, None)[0]

    return layers


def boxed_scan(axis):
    return nn_scan(axis, metadata_params={"partition_name": "layers"})


def nn_remat_scan(block, x):
    import flax.linen as nn

    class Unary(nn.Module):
        @nn.compact
        def __call__(self, x):
            return block(name="block")(x)[0]

    return nn.remat_scan(Unary, lengths=(3, 2))(name="rs")(x)


def loop_and_nn_vmap(block, x):
    import flax.linen as nn

    axes = {"variable_axes": {"params": 0}, "split_rngs": {"params": True}}
    x, _ = nn.vmap(block, axis_size=3, **axes)()(jnp.broadcast_to(x, (3, *x.shape)))
    return loop()(block, x.mean(0))


# -- Flax NNX --------------------------------------------------------------------------


def nnx(make_layers):
    """The state of a model with the layers of `make_layers(nnx, block, rngs)`."""
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.lin = nnx.Linear(3, 3, rngs=rngs)
            self.norm = nnx.LayerNorm(3, use_bias=False, rngs=rngs)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = make_layers(nnx, Block, rngs)
            self.head = nnx.Linear(3, 2, use_bias=False, rngs=rngs)

    return nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)


def nnx_list(nnx, block, rngs):
    layers = [block(rngs) for _ in range(11)]
    return nnx.List(layers) if hasattr(nnx, "List") else layers


def nnx_sequential(nnx, block, rngs):
    parts = [x for _ in range(3) for x in (nnx.Linear(3, 3, rngs=rngs), jax.nn.relu)]
    return nnx.Sequential(*parts)


def nnx_vmap(nnx, block, rngs):
    return nnx.split_rngs(splits=4)(nnx.vmap(block))(rngs)


# -- Equinox: without biases and functions, which are None -----------------------------


def equinox(make_layers):
    """A model with the layers of `make_layers(eqx, make, keys)`."""
    import equinox as eqx

    class Block(eqx.Module):
        linear: eqx.nn.Linear
        norm: eqx.nn.LayerNorm
        act: Callable = jax.nn.gelu

    class Model(eqx.Module):
        layers: Any
        head: eqx.nn.Linear

    def make(key):
        return Block(eqx.nn.Linear(3, 3, key=key), eqx.nn.LayerNorm(3, use_bias=False))

    def arrays(key):
        head = eqx.nn.Linear(3, 2, use_bias=False, key=key)
        model = Model(make_layers(eqx, make, jax.random.split(key, 4)), head)
        return eqx.filter(model, eqx.is_inexact_array)

    return jax.eval_shape(arrays, jax.random.key(0))


def equinox_mlp():
    import equinox as eqx

    def arrays(key):
        model = eqx.nn.MLP(3, 2, 4, depth=5, key=key)
        return eqx.filter(model, eqx.is_inexact_array)

    return jax.eval_shape(arrays, jax.random.key(0))


# -- Haiku -----------------------------------------------------------------------------


def haiku(forward, x=(1, 3), dtype=float):
    """The parameters of `forward(hk, x)`."""
    import haiku as hk

    init = hk.transform(lambda x: forward(hk, x)).init
    return jax.eval_shape(init, jax.random.PRNGKey(0), jnp.ones(x, dtype))


def block_of(hk):
    class Block(hk.Module):
        def __call__(self, x):
            x = hk.LayerNorm(-1, True, True)(x)
            x = hk.Linear(3, with_bias=False)(x)
            return hk.Linear(3, with_bias=False)(x)

    return Block


def head(hk, x):
    return hk.Linear(2, with_bias=False, name="head")(x)


def made_in_call(hk, x):
    block = block_of(hk)

    class Net(hk.Module):
        def __call__(self, x):
            for _ in range(4):
                x = block()(x)
            return head(hk, x)

    return Net(name="net")(x)


def made_in_init(hk, x):
    block = block_of(hk)

    class Made(hk.Module):
        def __init__(self):
            super().__init__()
            self.blocks = [block() for _ in range(4)]

        def __call__(self, x):
            for layer in self.blocks:
                x = layer(x)
            return head(hk, x)

    return Made()(x)


def layer_stacks(hk, x):
    block = block_of(hk)
    for length in (4, 3):
        x = hk.layer_stack(length)(lambda x: block()(x))(x)
    return head(hk, x)


def haiku_transformer(hk, tokens):
    """The modules of Haiku's example, made and called in its order."""

    def norm(x):
        return hk.LayerNorm(axis=-1, create_scale=True, create_offset=True)(x)

    class Transformer(hk.Module):
        def __call__(self, x):
            for _ in range(3):
                attend = hk.MultiHeadAttention(2, 2, model_size=4, w_init_scale=1.0)
                y = norm(x)
                x = x + attend(y, y, y)
                dense = hk.Sequential([hk.Linear(8), jax.nn.gelu, hk.Linear(4)])
                x = x + dense(norm(x))
            return norm(x)

    class LanguageModel(hk.Module):
        def __call__(self, tokens):
            positions = hk.get_parameter("positional_embeddings", [5, 4], init=jnp.ones)
            x = hk.Embed(7, 4)(tokens) + positions
            return hk.Linear(7)(Transformer(name="transformer")(x))

    return LanguageModel(name="language_model")(tokens)


def haiku_mlp(hk, x):
    return hk.nets.MLP([4, 4, 4, 2])(x)


def listed(eqx, make, keys):
    return [make(key) for key in keys]


def vmapped(eqx, make, keys):
    return eqx.filter_vmap(make)(keys)


BOXED = "linen-boxed-scan-with_partitioning-axis"
LOGICAL = "linen-boxed-scan-with_logical_partitioning-axis-1"
# name: the package to import, the function that builds the tree, its arguments.
MODELS: dict[str, tuple[Any, ...]] = {
    "linen-wmt-encoder-and-decoder": ("flax", linen, encoder_and_decoder),
    "linen-loop": ("flax", linen, loop()),
    "linen-remat-loop": ("flax", linen, loop(wrap=remat)),
    "linen-scan-axis-0": ("flax", linen, nn_scan(0)),
    "linen-scan-axis-1": ("flax", linen, nn_scan(1)),
    f"{BOXED}-0": ("flax", linen, boxed_scan(0), "with_partitioning"),
    f"{BOXED}-1": ("flax", linen, boxed_scan(1), "with_partitioning"),
    LOGICAL: ("flax", linen, boxed_scan(1), "with_logical_partitioning"),
    "linen-boxed-loop": ("flax", linen, loop(), "with_partitioning"),
    "linen-remat-scan": ("flax", linen, nn_remat_scan),
    "linen-loop-beside-a-vmap": ("flax", linen, loop_and_nn_vmap),
    "nnx-list": ("flax", nnx, nnx_list),
    "nnx-sequential-with-gaps": ("flax", nnx, nnx_sequential),
    "nnx-vmap-and-scan": ("flax", nnx, nnx_vmap),
    "equinox-list": ("equinox", equinox, listed),
    "equinox-filter-vmap": ("equinox", equinox, vmapped),
    "eqx-mlp": ("equinox", equinox_mlp),
    "haiku-made-in-call": ("haiku", haiku, made_in_call),
    "haiku-made-in-init": ("haiku", haiku, made_in_init),
    "haiku-two-layer-stacks": ("haiku", haiku, layer_stacks),
    "haiku-mlp": ("haiku", haiku, haiku_mlp, (1, 4)),
    "haiku-transformer-example": ("haiku", haiku, haiku_transformer, (1, 5), int),
}
