"""Layers of a transformer in NumPy, of one sequence: oracles for the models."""

import numpy as np


def layer_norm(x, norm, epsilon=1e-6):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)
    return x * norm["scale"] + norm["bias"]


def affine(x, linear):
    return x @ linear["kernel"] + linear["bias"]


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def attention(x, params, heads):
    """Attention of `x`, `(tokens, width)`, with `qkv` and `out`, a head at a time."""
    outputs = []
    of_all = np.split(affine(x, params["qkv"]), 3, axis=1)
    of_heads = (np.split(part, heads, axis=1) for part in of_all)
    for query, key, value in zip(*of_heads, strict=True):
        scores = np.exp(query @ key.T / np.sqrt(query.shape[1]))
        outputs.append(scores / scores.sum(1, keepdims=True) @ value)
    return affine(np.concatenate(outputs, axis=1), params["out"])


def block(x, params, heads):
    """A pre-norm block with a GELU MLP."""
    mixed = attention(
        layer_norm(x, params["attention_norm"]), params["attention"], heads
    )
    x = x + mixed
    hidden = gelu(affine(layer_norm(x, params["mlp_norm"]), params["mlp_in"]))
    return x + affine(hidden, params["mlp_out"])
