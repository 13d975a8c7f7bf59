"""Gradient Smoothing as plain loops in float64, written from the paper's equations.

`blocks[l]` is the update of layer l: a dict from role to array. A role that a layer
lacks is absent from its dict, and a layer that does not exist is an empty dict. Nothing
here is shared with the library, and nothing here is fast.
"""

import itertools

import numpy as np

# Few shapes: a test's time is the compilation of one kernel per shape and dtype.
ROLES = {"kernel": (2, 3), "bias": (3,)}
EVERY_RANK = {**ROLES, "heads": (2, 1, 2), "gain": ()}


# The operators, as matrices.


def window_matrix(num_layers, alpha, radius=1, decay=None):
    """Own weight 1 - alpha; alpha / 2 per side; what falls off the end stays home."""
    distances = range(1, radius + 1)
    weights = {d: np.exp(-(decay or 0.0) * d) for d in distances}
    total = sum(weights.values())
    matrix = np.zeros((num_layers, num_layers))
    for layer in range(num_layers):
        matrix[layer, layer] += 1 - alpha
        for distance in distances:
            for other in (layer - distance, layer + distance):
                exists = 0 <= other < num_layers
                share = alpha / 2 * weights[distance] / total
                matrix[layer, other if exists else layer] += share
    return matrix


def laplacian_matrix(num_layers, alpha):
    """The authors' negative-neighbour operator."""
    matrix = np.zeros((num_layers, num_layers))
    for layer in range(num_layers):
        matrix[layer, layer] = 1 - alpha
        for other in (layer - 1, layer + 1):
            if 0 <= other < num_layers:
                matrix[layer, other] = -alpha / 2
            else:
                matrix[layer, layer] += alpha / 2
    return matrix


def ema_matrix(num_layers, rho, reverse):
    """m <- rho m + (1 - rho) u_l; the first layer visited initialises m."""
    identity = np.eye(num_layers)
    matrix = np.zeros((num_layers, num_layers))
    order = range(num_layers)[::-1] if reverse else range(num_layers)
    memory = None
    for layer in order:
        new = identity[layer]
        memory = new if memory is None else rho * memory + (1 - rho) * new
        matrix[layer] = memory
    return matrix


def gaussian_matrix(num_layers, sigma, radius):
    """exp(-j² / 2σ²), normalized over -radius..radius; at the ends as the window."""
    weights = [
        np.exp(-0.5 * (j / sigma) ** 2) if sigma else 0.0 for j in range(1, radius + 1)
    ]
    total = 1 + 2 * sum(weights)
    matrix = np.zeros((num_layers, num_layers))
    for layer in range(num_layers):
        matrix[layer, layer] += 1 / total
        for distance, weight in enumerate(weights, start=1):
            for other in (layer - distance, layer + distance):
                exists = 0 <= other < num_layers
                matrix[layer, other if exists else layer] += weight / total
    return matrix


def tikhonov_matrix(num_layers, strength):
    """(I + strength · path-graph Laplacian)^-1."""
    differences = np.diff(np.eye(num_layers), axis=0)
    return np.linalg.inv(np.eye(num_layers) + strength * differences.T @ differences)


# The method.


def runs_of(blocks, role, ranked=False):
    """The maximal lists of neighbouring layers that hold `role`, two layers or more."""
    runs = []
    previous = None
    for layer, block in enumerate(blocks):
        if role not in block:
            continue
        if previous is not None and (ranked or layer == previous + 1):
            runs[-1].append(layer)
        else:
            runs.append([layer])
        previous = layer
    return [run for run in runs if len(run) > 1]


def all_runs(blocks, ranked=False):
    """(role, run) of all roles. `ranked` closes the gaps of all roles or of some."""
    roles = sorted({role for block in blocks for role in block})
    closed = roles if ranked is True else ranked or ()
    return [(r, run) for r in roles for run in runs_of(blocks, r, r in closed)]


def smooth(blocks, matrix_of, variant="standard", norm_scope="param", ranked=False):
    """`couple` with the L x L matrix `matrix_of(L)` of every run of L layers."""

    def coupling(source):
        result = [dict(block) for block in source]
        for role, run in all_runs(source, ranked):
            matrix = matrix_of(len(run))
            for i, layer in enumerate(run):
                total = np.zeros_like(source[layer][role])
                for j, other in enumerate(run):
                    total = total + matrix[i, j] * source[other][role]
                result[layer][role] = total
        return result

    return couple(blocks, coupling, variant, norm_scope, ranked)


def couple(blocks, coupling, variant="standard", norm_scope="param", ranked=False):
    """A variant of any `coupling(source blocks) -> coupled blocks`, linear or not.

    Returns blocks in float64 (complex128). `ranked` closes the gaps, of all roles or of
    those in it.
    """
    blocks = [{role: _double(x) for role, x in block.items()} for block in blocks]
    before = layer_norms(blocks, norm_scope, ranked)
    source = [dict(block) for block in blocks]
    if variant == "directional":
        for (layer, role), norm in before.items():
            source[layer][role] = blocks[layer][role] / (norm if norm > 0 else np.inf)
    coupled = coupling(source)
    if variant == "standard":
        return coupled
    after = layer_norms(coupled, norm_scope, ranked)
    for (layer, role), norm in before.items():
        if norm > 0 and after[layer, role] > 0:
            coupled[layer][role] = norm * coupled[layer][role] / after[layer, role]
        elif variant == "directional":
            coupled[layer][role] = blocks[layer][role]  # comes back unchanged
    return coupled


def layer_norms(blocks, norm_scope, ranked=False):
    """{(layer, role): norm}, of the parameter or of its block, for layers in runs."""
    squares = {
        (layer, role): np.sum(np.abs(_double(blocks[layer][role])) ** 2)
        for role, run in all_runs(blocks, ranked)
        for layer in run
    }
    if norm_scope == "param":
        return {key: np.sqrt(square) for key, square in squares.items()}
    return {
        (layer, role): np.sqrt(sum(s for (k, _), s in squares.items() if k == layer))
        for layer, role in squares
    }


def window(blocks, alpha, radius=1, decay=None, **kwargs):
    """`smooth` with the window."""
    return smooth(blocks, lambda n: window_matrix(n, alpha, radius, decay), **kwargs)


# Operators that look at the updates.


def norm_matched(blocks, coupling, norm_scope="param", ranked=False):
    """Each update at the norm that `coupling` would give it, a zero update at 0."""
    own = layer_norms(blocks, norm_scope, ranked)
    wanted = layer_norms(coupling(blocks), norm_scope, ranked)
    result = [dict(block) for block in blocks]
    for (layer, role), norm in own.items():
        factor = wanted[layer, role] / norm if norm > 0 else 0.0
        result[layer][role] = factor * blocks[layer][role]
    return result


def similarity_window(blocks, alpha, norm_scope="block", sharpness=1.0, ranked=False):
    """u + Σ_k α/2 · max(0, cos)^sharpness (u_k - u) over the neighbors k."""
    blocks = [{role: _double(x) for role, x in block.items()} for block in blocks]
    pairs = _pairs(blocks, ranked)

    def cosine(role, a, b):
        roles = [r for r, *pair in pairs if pair == [a, b]]
        roles = roles if norm_scope == "block" else [role]
        x, y = (np.concatenate([blocks[k][r].ravel() for r in roles]) for k in (a, b))
        norms = np.linalg.norm(x) * np.linalg.norm(y)
        return np.vdot(x, y).real / norms if norms > 0 else 0.0

    result = [dict(block) for block in blocks]
    for role, a, b in pairs:
        agreement = cosine(role, a, b)
        weight = alpha / 2 * agreement**sharpness if agreement > 0 else 0.0
        difference = blocks[b][role] - blocks[a][role]
        result[a][role] = result[a][role] + weight * difference
        result[b][role] = result[b][role] - weight * difference
    return result


def alike_window(blocks, alpha, factor, ranked=False):
    """u + Σ_k α/2 (u_k - u) over the neighbors k of a block norm alike."""
    blocks = [{role: _double(x) for role, x in block.items()} for block in blocks]
    norms = layer_norms(blocks, "block", ranked)
    result = [dict(block) for block in blocks]
    for role, a, b in _pairs(blocks, ranked):
        x, y = norms[a, role], norms[b, role]
        if x <= factor * y and y <= factor * x:
            difference = alpha / 2 * (blocks[b][role] - blocks[a][role])
            result[a][role] = result[a][role] + difference
            result[b][role] = result[b][role] - difference
    return result


def _pairs(blocks, ranked):
    """(role, layer, next layer) of all neighbors."""
    return [
        (role, a, b)
        for role, run in all_runs(blocks, ranked)
        for a, b in itertools.pairwise(run)
    ]


def _double(array):
    array = np.asarray(array)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


# Data, and the trees that hold it.


def random_blocks(num_layers, dtype="float32", shapes=None, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ROLES if shapes is None else shapes
    return [
        {role: rng.normal(size=shape).astype(dtype) for role, shape in shapes.items()}
        for _ in range(num_layers)
    ]


def complex_blocks(num_layers, seed=0):
    """Of complex64, with real and imaginary parts."""
    real, imaginary = (random_blocks(num_layers, seed=s) for s in (seed, 99))
    return [
        {role: (a[role] + 1j * b[role]).astype(np.complex64) for role in a}
        for a, b in zip(real, imaginary, strict=True)
    ]


def unrolled_tree(blocks, key="layers_{}"):
    """One subtree per layer."""
    return {key.format(layer): dict(block) for layer, block in enumerate(blocks)}


def stacked_tree(blocks, axis=0):
    """One leaf per role, the layers along `axis` (at most the role's rank)."""
    return {
        role: np.stack(
            [block[role] for block in blocks], axis=min(axis, np.ndim(blocks[0][role]))
        )
        for role in blocks[0]
    }


def unstacked(tree, axis=0):
    """The blocks that `stacked_tree` stacked."""
    num_layers = {r: x.shape[min(axis, np.ndim(x) - 1)] for r, x in tree.items()}
    return [
        {
            role: np.take(np.asarray(x), layer, axis=min(axis, np.ndim(x) - 1))
            for role, x in tree.items()
        }
        for layer in range(max(num_layers.values()))
    ]


# The comparison.


def relative_error(actual, reference):
    """max |difference| / max |reference|, per tensor."""
    actual, reference = _double(actual), _double(reference)
    assert actual.shape == reference.shape
    if reference.size == 0:
        return 0.0
    largest = np.max(np.abs(reference))
    return float(np.max(np.abs(actual - reference)) / (largest if largest else 1.0))


def assert_blocks_close(actual, expected):
    """`actual` is `expected` computed in float32 (or float64) and rounded once.

    A role's largest entry sets the scale of the arithmetic's error; the final rounding
    to a half precision adds half a unit in the last place of each entry.
    """
    assert len(actual) == len(expected)
    for layer, (got, want) in enumerate(zip(actual, expected, strict=True)):
        assert set(got) == set(want)
        for role in want:
            result, reference = np.asarray(got[role]), _double(want[role])
            assert result.shape == reference.shape
            double = result.dtype in (np.float64, np.complex128)
            scale = max(np.max(np.abs(b[role])) for b in expected if role in b)
            bound = (1e-13 if double else 1e-6) * scale
            if result.dtype.itemsize == 2:
                half_ulp = np.spacing(np.ones((), result.dtype)) / 2
                bound = bound + float(half_ulp) * np.abs(reference)
            error = np.abs(_double(result) - reference)
            # A NaN must not pass.
            assert np.all(error <= bound), (
                f"layer {layer}, {role}: {np.max(error):.1e} of {scale:.1e}"
            )
