"""The models of the tasks in plain NumPy, of one example: oracles that share no code.

Each takes parameters of float64 and returns the residual stream before the first and
after every block, and what the model says.
"""

import itertools

import numpy as np


def layer_norm(x, norm, epsilon=1e-6):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + epsilon)
    return x * norm["scale"] + norm["bias"]


def rms_norm(x, norm):
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * norm["scale"]


def affine(x, linear):
    return x @ linear["kernel"] + linear.get("bias", 0)


def gelu(x):
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def relu(x):
    return np.maximum(x, 0)


def turned(x):
    """Rotary positions: pairs of numbers, as complex ones, turn with the position."""
    half = x.shape[1] // 2
    speeds = 10_000.0 ** (-np.arange(half) / half)
    numbers = x[:, :half] + 1j * x[:, half:]
    numbers = numbers * np.exp(1j * np.outer(np.arange(len(x)), speeds))
    return np.concatenate([numbers.real, numbers.imag], axis=1)


def attended(query, key, value, heads, of_gpt=False):
    """Attention of `(tokens, width)`, a head at a time; of a GPT rotary and causal."""
    outputs = []
    of_heads = (np.split(x, heads, axis=1) for x in (query, key, value))
    for q, k, v in zip(*of_heads, strict=True):
        if of_gpt:
            q, k = turned(q), turned(k)
        scores = np.exp(q @ k.T / np.sqrt(q.shape[1]))
        if of_gpt:
            scores = np.tril(scores)
        outputs.append(scores / scores.sum(1, keepdims=True) @ v)
    return np.concatenate(outputs, axis=1)


def block(x, params, heads, activation=gelu, epsilon=1e-6):
    """A pre-norm block whose attention has one matrix for query, key and value."""
    of_attention = params.get("attention", params)
    qkv = affine(layer_norm(x, params["attention_norm"], epsilon), of_attention["qkv"])
    x = x + affine(attended(*np.split(qkv, 3, axis=1), heads), of_attention["out"])
    hidden = affine(layer_norm(x, params["mlp_norm"], epsilon), params["mlp_in"])
    return x + affine(activation(hidden), params["mlp_out"])


def gpt_block(x, params, heads):
    normed = rms_norm(x, params["attention_norm"])
    qkv = (affine(normed, params["attention"][of]) for of in ("query", "key", "value"))
    mixed = attended(*qkv, heads, of_gpt=True)
    x = x + affine(mixed, params["attention"]["out"])
    hidden = gelu(affine(rms_norm(x, params["mlp_norm"]), params["mlp_in"]))
    return x + affine(hidden, params["mlp_out"])


def layers_of(stacked):
    """The parameters of every layer of stacked ones."""
    if isinstance(stacked, np.ndarray):
        return list(stacked)
    of_parts = [layers_of(part) for part in stacked.values()]
    return [
        dict(zip(stacked, each, strict=True)) for each in zip(*of_parts, strict=True)
    ]


def through(x, blocks):
    """The states of blocks, which are functions, one after the other."""
    return np.array(list(itertools.accumulate(blocks, lambda x, f: f(x), initial=x)))


def gpt(params, tokens, heads):
    table = params["embed"]["embedding"]
    states = through(
        table[tokens] / 0.02,
        [lambda x, p=p: gpt_block(x, p, heads) for p in layers_of(params["blocks"])],
    )
    return states, rms_norm(states[-1], params["final_norm"]) @ table.T


def encoder(params, symbols, heads):
    """PyTorch's TransformerEncoderLayer(norm_first=True), on symbols and places."""
    states = through(
        params["in"]["embedding"][symbols] + params["positions"],
        [
            lambda x, p=p: block(x, p, heads, relu, epsilon=1e-5)
            for p in layers_of(params["blocks"])
        ],
    )
    last = layer_norm(states[-1], params["final_norm"], epsilon=1e-5)
    return states, affine(last, params["head"])


def cut(image, rows, columns):
    """The patches of an 8 × 8 image and where they are, row by row."""
    corners = [*itertools.product(range(0, 8, rows), range(0, 8, columns))]
    return corners, [image[i : i + rows, j : j + columns].ravel() for i, j in corners]


def vit(params, image, heads, patch):
    _, patches = cut(image, *patch)
    pixels = (np.stack(patches) - 0.305) / 0.376
    states = through(
        affine(pixels, params["embed"]) + params["positions"],
        [lambda x, p=p: block(x, p, heads) for p in params["blocks"].values()],
    )
    pooled = layer_norm(states[-1].mean(0), params["final_norm"])
    return states, affine(pooled, params["head"])


def uvit(params, image, time, heads, patch=2):
    """A U-ViT of any odd number of blocks; it says the noise in the image."""
    width = len(params["time"]["bias"])
    angles = time * 100 ** (np.arange(width // 2) / (width // 2 - 1))
    corners, patches = cut(image, patch, patch)
    of_time = affine(np.r_[np.cos(angles), np.sin(angles)], params["time"])
    x = np.stack([of_time, *(affine(of, params["patches"]) for of in patches)])
    states = [x := x + params["positions"]]
    half = sum(name.startswith("in_blocks_") for name in params)
    for name in (*(f"in_blocks_{i}" for i in range(half)), "mid_block"):
        states.append(x := block(x, params[name], heads))
    for i in range(half):
        # The first of the out blocks sees what the last of the in blocks gave.
        params_here, skipped = params[f"out_blocks_{i}"], states[half - i]
        x = affine(np.concatenate([x, skipped], axis=1), params_here["skip"])
        states.append(x := block(x, params_here, heads))
    said = affine(layer_norm(x, params["final_norm"]), params["head"])[1:]
    noise = np.zeros((8, 8))
    for (i, j), pixels in zip(corners, said, strict=True):
        noise[i : i + patch, j : j + patch] = pixels.reshape(patch, patch)
    return np.array(states), noise
