"""Gradient Smoothing as plain loops in float64, written from the paper's equations.

`blocks[l]` is the update of layer l: a dict from role to array. A role that a layer
lacks is absent from its dict, and a layer that does not exist is an empty dict. Nothing
here is shared with the library, and nothing here is fast.
"""

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


def smooth(blocks, matrix_of, variant="standard", norm_scope="param", ranked=False):
    """Smooths `blocks` with the L x L matrix `matrix_of(L)` of every run of L layers.

    Returns blocks in float64 (complex128). `ranked` closes the gaps.
    """
    blocks = [{role: _double(x) for role, x in block.items()} for block in blocks]
    roles = sorted({role for block in blocks for role in block})
    runs = [(role, run) for role in roles for run in runs_of(blocks, role, ranked)]

    def norm(some, role, layer):
        if norm_scope == "param":
            return np.linalg.norm(some[layer][role].ravel())
        squares = 0.0  # The block: every slice of this layer that takes part.
        for other, run in runs:
            if layer in run:
                squares += np.sum(np.abs(some[layer][other]) ** 2)
        return np.sqrt(squares)

    source = [dict(block) for block in blocks]
    if variant == "directional":
        for role, run in runs:
            for layer in run:
                size = norm(blocks, role, layer)
                unit = blocks[layer][role] / size if size > 0 else 0.0
                source[layer][role] = unit * np.ones_like(blocks[layer][role])

    smoothed = [dict(block) for block in source]
    for role, run in runs:
        matrix = matrix_of(len(run))
        for i, layer in enumerate(run):
            total = np.zeros_like(source[layer][role])
            for j, other in enumerate(run):
                total = total + matrix[i, j] * source[other][role]
            smoothed[layer][role] = total

    result = [dict(block) for block in blocks]
    for role, run in runs:
        for layer in run:
            before = norm(blocks, role, layer)
            after = norm(smoothed, role, layer)
            if variant == "standard":
                result[layer][role] = smoothed[layer][role]
            elif before > 0 and after > 0:
                result[layer][role] = before * smoothed[layer][role] / after
            elif variant == "norm_preserving":
                result[layer][role] = smoothed[layer][role]
            else:  # Directional: comes back unchanged.
                result[layer][role] = blocks[layer][role]
    return result


def window(blocks, alpha, radius=1, decay=None, **kwargs):
    """`smooth` with the window."""
    return smooth(blocks, lambda n: window_matrix(n, alpha, radius, decay), **kwargs)


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
