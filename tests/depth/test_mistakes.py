"""What is wrong is told: an error or a `DepthWarning`, with a call that helps.

Each row is a mistake, and fragments of what has to be said: the argument's name, where
it was found and what, and what to write instead. A call that is shown is tried.
"""

import functools
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

# -- Trees -----------------------------------------------------------------------------

MASK = optax.MaskedNode()


def ones(*shape, dtype="float32"):
    return np.ones(shape, dtype)


def dense(*shape):
    shape = shape or (4, 4)
    return {"kernel": ones(*shape), "bias": ones(shape[-1])}


def block(width=8):
    """A layer of two modules and a norm."""
    return {"attn": dense(4, 4), "fc": dense(4, width), "norm": {"scale": ones(4)}}


def stacked(tree, count, axis=0):
    return jax.tree.map(lambda x: np.stack([x] * count, min(axis, x.ndim)), tree)


def many(template, count=3, make=block):
    return {template.format(i): make() for i in range(count)}


def entries(count=3, make=block):
    return [make() for _ in range(count)]


def digits(count=3, make=block):
    return {str(i): make() for i in range(count)}


def layers(numbers, **special):
    """decoder/layers_<i>/mlp/kernel for the numbers; `special` replaces leaves."""
    found = {
        f"layers_{i}": {"mlp": {"kernel": special.get(f"layer_{i}", ones(2, 3))}}
        for i in numbers
    }
    return {"decoder": found, "embed": {"embedding": ones(4, 3)}}


def conv(width):
    return {"kernel": ones(3, 3, width, width), "bias": ones(width)}


def haiku(*modules):
    names = ["block", "block_1", "block_2", "block_3"]
    return {f"net/{n}/{m}": {"w": ones(4, 4)} for n in names for m in modules}


def maxtext(*lead, axis=0):
    def leaf(*shape):
        return ones(*shape[:axis], *lead, *shape[axis:])

    return {
        "mlp": {"wo": {"kernel": leaf(16, 8)}},
        "self_attention": {"out": {"kernel": leaf(2, 4, 8)}},
        "norm": {"scale": leaf(8)},
    }


LAYERS = maxtext(3, axis=1)
CYCLE = {"decoder": {"layers": many("layers_{}", 6, lambda: LAYERS)}}
CYCLE_AND_REST = {
    "decoder": {
        "layers": many("layers_{}", 2, lambda: LAYERS),
        "layers_remainder": many("layers_{}", 2, maxtext),
    }
}
SCAN_ON_1 = {
    "decoder": {
        "layers": {"wi": ones(3, 4, 5), "wo": ones(5, 4, 3), "norm": ones(3, 4)}
    },
    "embed": ones(7, 3),
}
# Stacked layers in a node that holds other parameters too.
WIDE = {
    "decoder": {
        "layers": {"attn": ones(6, 16, 16), "mlp": ones(6, 16, 64), "ln": ones(6, 16)},
        "pos": ones(128, 16),
        "out": ones(16, 16),
    }
}
GEMMA2 = {
    f"{part}_{kind}": module
    for part, module in LAYERS.items()
    for kind in ("local", "global")
}
MLP = {"MLP_0": many("Dense_{}", 3, dense)}
STACK_AND_LIST = {
    "encoder": {"layers": entries()},
    "decoder": {"blocks": stacked(block(), 5)},
    "embed": ones(9, 4),
}
FIRST_LAST = {"layers": (dense(3, 16), stacked(dense(16, 16), 5), dense(16, 2))}
TWO_STACKS = {"encoder": many("layers_{}"), "decoder": many("layers_{}", 4)}
VIT = {
    "Transformer_0": many("EncoderBlock_{}", 3, dense),
    "head": {"kernel": ones(2, 3)},
}


# -- What init says --------------------------------------------------------------------


def said(call, *args):
    """The error, or the warnings, that a call gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call(*args)
        except ValueError as error:
            return [str(error)]
    assert all(issubclass(w.category, gs.DepthWarning) for w in caught)
    return [str(warning.message) for warning in caught]


def said_by_init(depth, tree):
    return said(gs.smooth_over_depth(depth, 0.2).init, tree)


UNROLLED = gs.unrolled()


class Row(NamedTuple):
    """A row of a table of mistakes, as its first lines say.

    Attributes:
      name: what it is about.
      source: the call, or the depth.
      tree: what the depth is for.
      said: patterns of what has to be said.
      call: what has to be proposed, if something has.
    """

    name: str
    source: str
    tree: str
    said: list[str]
    call: str


def rows(file, start="# "):
    """{name: row}; a row begins with `start`, and one without a name is its source."""
    text = Path(__file__).with_name(file).read_text()
    found = map(row_of, re.split(f"^(?={start})", text, flags=re.MULTILINE)[1:])
    return {row.name or row.source: row for row in found}


def row_of(text):
    parts, mark = dict.fromkeys("# |-+", ""), " "
    for line in text.splitlines():
        if line.startswith("##"):
            continue  # a headline
        if line[1:2] == " " and line[0] in "#|-+":
            mark, line = line[0], line[2:]
            parts[mark] += "|" * (mark == "-")
        elif not line.startswith(" "):
            mark = " "
        parts[mark] += f" {line.strip()}" if parts[mark] else line.strip()
    name, source, tree, said, call = (part.strip() for part in parts.values())
    fragments = filter(None, map(str.strip, said.split("|")))
    said = [".*".join(map(re.escape, part.split("..."))) for part in fragments]
    return Row(name, source, tree, said, call)


def evaluated(source):
    return eval(source, globals())


WRONG, RIGHT = rows("wrong_depths.txt"), rows("right_depths.txt")


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_with_a_depth_is_said_with_a_call_that_helps(name):
    row = WRONG[name]
    depth, tree = evaluated(row.source), evaluated(row.tree)
    found = said_by_init(depth, tree)
    assert found, "silent"
    for pattern in row.said:
        assert any(re.search(pattern, text) for text in found), (pattern, found)
    if row.call:
        assert f"`{row.call}`" in found[0]
        right = evaluated(row.call)
        assert said_by_init(right, tree) == []
        assert gs.describe(right, tree).smoothed > 0
    # Of the shapes alone it is the same, in `update` too, and `describe` says it.
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert said_by_init(depth, shapes) == found
    described = said(gs.describe, depth, tree)
    if not described:
        summary = gs.describe(depth, tree)
        described = [*filter(None, [summary.problem]), *summary.doubts]
        assert all(text in str(summary) for text in found)
    assert described == found
    tx = gs.smooth_over_depth(depth, 0.2)
    assert said(jax.eval_shape, tx.update, tree, optax.EmptyState()) == found


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_or_meant_is_not_doubted(name):
    row = RIGHT[name]
    assert said_by_init(evaluated(row.source), evaluated(row.tree)) == []


def test_detect_joins_a_cycle_and_what_remains_after_it():
    spec = gs.detect(CYCLE_AND_REST).spec
    for group in gs.describe(spec, CYCLE_AND_REST).groups:
        assert group.layers == tuple(range(8))


NOT_STRICT = {
    "another pattern": (gs.scanned("blocks/"), layers(range(3))),
    "a lone array": (UNROLLED, ones(3)),
    "a lone number": (lambda path, leaf: None, 0.5),
    "no coupled layers": (gs.unrolled(r"Transformer_(\d+)/"), VIT),
    "two readings": (UNROLLED, {f"block{s}": many("unit{}") for s in (1, 2, 3)}),
}


@pytest.mark.parametrize("name", NOT_STRICT)
def test_what_may_hold_no_layers_is_passed_on_where_not_strict(name):
    depth, tree = NOT_STRICT[name]
    tx = gs.smooth_over_depth(depth, 0.2, strict=False)
    out, _ = tx.update(tree, tx.init(tree))
    pairs = zip(jax.tree.leaves(out), jax.tree.leaves(tree), strict=True)
    assert all(after is before for after, before in pairs)


def test_unequal_scans_are_taken_as_they_are_where_not_strict():
    tree = {"layers": {"a": ones(2, 3), "b": ones(4, 3)}}
    tx = gs.smooth_over_depth(gs.scanned("layers/"), 0.2, strict=False)
    assert jax.tree.structure(tx.init(tree)) == jax.tree.structure(optax.EmptyState())
    groups = gs.describe(gs.scanned("layers/"), tree).groups
    assert [group.num_layers for group in groups] == [2, 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda smoothing: smoothing,
        lambda smoothing: gs.with_depth_smoothing(ADAM, smoothing),
        lambda smoothing: gs.adamw(1e-3, smoothing),
        lambda smoothing: optax.chain(ADAM, optax.masked(smoothing, lambda _: True)),
    ],
    ids=["smooth_over_depth", "with_depth_smoothing", "adamw", "chain"],
)
def test_a_warning_is_given_once_by_every_transformation(make):
    smoothing = gs.smooth_over_depth(gs.unrolled(r"Transformer_(\d+)/"), gs.window(0.1))
    tx, tree = make(smoothing), jax.tree.map(jnp.asarray, VIT)
    with pytest.warns(gs.DepthWarning, match=r"EncoderBlock_\(\\d\+\)") as caught:
        state = tx.init(tree)
    assert len(caught) == 1
    assert caught[0].filename == __file__  # at the user's line
    assert said(jax.eval_shape, tx.update, tree, state, tree) == []
    assert said(tx.init, tree) == []


def test_a_warning_is_given_by_update_where_there_was_no_init():
    tx, tree = gs.smooth_over_depth(gs.unrolled(r"Transformer_(\d+)/")), VIT
    with pytest.warns(gs.DepthWarning) as caught:
        gs.smooth_over_depth(gs.unrolled(r"Transformer_(\d+)/")).init(tree)
    assert caught[0].filename == __file__  # at the user's line
    update = (jax.eval_shape, tx.update, tree, optax.EmptyState())
    assert [len(said(*update)), len(said(*update))] == [1, 0]


def test_a_masked_part_of_a_tree_is_grouped_as_the_whole_tree_or_not_at_all():
    tree = {"net2": many("layers_{}", 4), "wi_0": dense(), "wi_1": dense()}
    whole = {g.stack: g.layers for g in gs.describe(UNROLLED, tree).groups}
    for kept, beside in (([0, 2, 3], True), ([], True), ([2, 3], False)):
        mask = {"net2": {f"layers_{i}": i in kept for i in range(4)}}
        mask |= {"wi_0": beside, "wi_1": True}
        part = jax.tree.map(lambda m, x: x if m else MASK, mask, tree)
        summary = gs.describe(UNROLLED, part)
        for group in summary.groups:
            assert set(group.layers) <= set(whole[group.stack])
        tx = optax.masked(gs.smooth_over_depth(UNROLLED, 0.2), mask)
        assert said(tx.init, tree) == said_by_init(UNROLLED, part)
        if summary.problem:
            assert re.search(r"masked or frozen|matched none", summary.problem)


def test_names_of_all_kinds_are_names():
    rest = {"l0": {"w": ones(2)}, "l1": {"w": ones(2)}}
    for tree in (
        {f"m\u00b2{i}": {"w": ones(2)} for i in range(3)},
        {"1" * 5000: ones(2), **rest},
        {"1" * 8000 + "x": ones(2), **rest},
        {i: {"w": ones(2)} for i in range(-2, 3)},
    ):
        (group,) = gs.describe(UNROLLED, tree).groups
        assert said_by_init(UNROLLED, tree) == []
        assert group.num_layers > 1
    assert group.layers == (-2, -1, 0, 1, 2)


# -- Arguments -------------------------------------------------------------------------

ADAM, PLACE = optax.scale_by_adam(), gs.scanned("blocks/")
SMOOTH = gs.smooth_over_depth(PLACE)
PARAMS = {"blocks": {"w": ones(3, 2)}}


THREE = {"blocks": {"w": ones(3, 2, 2), "v": ones(3, 2, 2)}}


def updated(tx, tree=PARAMS):
    return tx.update(tree, tx.init(tree), tree)


def by_matrix(operator):
    return updated(gs.smooth_over_depth(PLACE, operator))


def by_hand(depth):
    return gs.smooth_over_depth(depth).init(layers(range(2)))


def injected(alpha, radius):
    return gs.smooth_over_depth(PLACE, gs.window(alpha, radius))


def not_strict(depth, tree):
    return gs.smooth_over_depth(depth, strict=False).init(tree)


def numbered_otherwise(depth):
    smoothing = gs.smooth_over_depth(depth)
    return gs.muon(0.1, PLACE, smoothing).init({"blocks": {"w": ones(5, 2, 2)}})


CALLS = rows("wrong_arguments.txt", start="[A-Za-z]")


@pytest.mark.parametrize("call", CALLS)
def test_a_wrong_argument_is_named_with_what_to_write_instead(call):
    assert_refused(lambda: evaluated(call), *CALLS[call].said)


def assert_refused(call, *patterns):
    with pytest.raises((TypeError, ValueError)) as info:
        call()
    message = " ".join([str(info.value), *getattr(info.value, "__notes__", [])])
    for pattern in patterns:
        assert re.search(pattern, message), (pattern, message)
    # Said by this library, and not by what it calls.
    assert "gradsmooth_optax" in str(info.traceback[-1].path)


@pytest.mark.parametrize(
    "operator",
    ["window", "0.1", None, [0.1], True, UNROLLED, optax.identity()],
    ids=["name", "number as text", "None", "list", "bool", "depth", "optax"],
)
def test_what_is_no_operator_is_refused_at_construction(operator):
    found = type(operator).__name__
    assert_refused(
        lambda: gs.smooth_over_depth(UNROLLED, operator),
        "`operator`",
        r"window\(",
        found,
    )


@pytest.mark.parametrize("make", [gs.window, lambda x: gs.smooth_over_depth(PLACE, x)])
def test_a_strength_out_of_range_is_refused(make):
    wrong = (-0.1, np.nextafter(1, 2), -1, math.inf, -math.inf, math.nan, np.float32(2))
    for alpha in wrong:
        call = functools.partial(make, alpha)
        assert_refused(call, "`alpha`", "between 0 and 1", re.escape(f"{alpha:g}"))


def test_values_at_the_ends_of_their_ranges_are_taken():
    for alpha in (0, 1, 0.0, 1.0, np.float32(1), np.array(0.5)):
        gs.window(alpha)
    gs.window(0.1, radius=1)
    static = optax.inject_hyperparams(injected, static_args=("radius",))
    static(0.1, radius=2).init(PARAMS)
    gs.window(0.1, radius=np.int64(2))
    gs.adamw(2**31 - 1, SMOOTH)
    gs.adamw(-(2**31) + 1, SMOOTH)
    gs.smooth_over_depth(PLACE, norm_axis_names=["a", "b"], axis_name="c")
    gs.contrib.learn_alpha(ADAM, PLACE, decay=0)
    gs.layer_scale(abs)
    # A smoothing of less than `depth`, or of what `depth` only leaves out.
    for depth in (PLACE, PLACE.only(lambda path, leaf: path[-1] == "w")):
        gs.muon(0.1, depth, gs.smooth_over_depth(PLACE)).init(THREE)
        gs.muon(0.1, PLACE, gs.smooth_over_depth(depth)).init(THREE)
    with pytest.raises(ValueError, match=r"between 0 and 1, but is 101\.$"):
        gs.window(101)


def test_a_long_value_is_shown_by_its_ends():
    for length, shown in ((158, "x" * 158), (159, f"{'x' * 119} … {'x' * 29}")):
        call = functools.partial(smooth_with, variant="x" * length)
        assert_refused(call, f"`variant` must be .*, but is '{shown}'\\.$")


def test_a_traced_alpha_and_an_array_of_jax_are_never_checked():
    jaxpr = jax.make_jaxpr(lambda x: updated(gs.smooth_over_depth(PLACE, x)))(jnp.nan)
    assert jaxpr.in_avals[0].shape == ()
    jax.make_jaxpr(lambda x: by_matrix(gs.dense(x)))(np.full((3, 3), np.nan))
    jax.make_jaxpr(lambda x: repr(gs.window(x)) and x)(2.0)
    # Of a number `optax.inject_hyperparams` makes such an array.
    gs.smooth_over_depth(PLACE, jnp.asarray(1.5))
    gs.window(jnp.asarray(-0.5))
    gs.layer_scale(jnp.asarray([jnp.nan]))
    gs.contrib.learn_alpha(ADAM, PLACE, alpha=0.1, alpha_max=jnp.asarray(jnp.nan))


def test_a_function_that_fails_tells_the_leaf_or_the_flattening():
    tx = gs.smooth_over_depth(lambda path, leaf: gs.Depth(path[0], path[9]))
    for made, note in ((tx, "at leaf blocks/w"), (optax.flatten(tx), "optax.flatten")):
        with pytest.raises(IndexError) as info:
            made.init(PARAMS)
        assert note in "".join(info.value.__notes__)


def test_a_wrong_structure_is_told_before_the_state_is_looked_at():
    tree = {name: {"layers_0": {"bias": ones(3)}} for name in ("decoder", "mtp")}
    tx = gs.smooth_over_depth(gs.unrolled(stack="one"), lambda count: 0.1, strict=False)
    with pytest.raises(ValueError, match="gives layer 0"):
        tx.update(tree, None)


# Of the wrong kind, of every kind.


class Odd:
    """Neither hashable nor to be shown."""

    __hash__ = None

    def __repr__(self):
        raise RuntimeError("no text")


def odd_values():
    unhashable = {
        "dict": {},
        "list": [["a"]],
        "array": np.ones(3),
        "empty array": np.ones(0),
        "array of jax": jnp.ones(3),
        "object array": np.array([None, {}], dtype=object),
        "object": Odd(),
    }
    no_numbers = {
        **unhashable,
        "text": "x",
        "text array": np.array("x"),
        "flag": True,
        "flag of jax": jnp.array(True),
        "complex": 1j,
        "key": jax.random.key(0),
        "long int": 10**400,
        "endless int": 10**5000,
        "operator": gs.window(0.1),
        "masked": MASK,
    }
    return unhashable, no_numbers


def smooth_with(**kwargs):
    return gs.smooth_over_depth(PLACE, 0.1, **kwargs)


def adamw_with(**kwargs):
    return gs.adamw(**{"learning_rate": 0.1, "smoothing": SMOOTH, **kwargs})


def muon_with(**kwargs):
    given = {"learning_rate": 0.1, "depth": PLACE, "smoothing": SMOOTH}
    return gs.muon(**{**given, **kwargs})


def alpha_with(**kwargs):
    return gs.contrib.learn_alpha(ADAM, PLACE, **kwargs)


def operator_with(**kwargs):
    return gs.contrib.learn_operator(ADAM, PLACE, **kwargs)


def wrong_kinds():
    """What takes the arguments, their names, and what they do not take."""
    unhashable, numbers = odd_values()
    no_rows = {k: v for k, v in numbers.items() if "array" not in k}
    no_starts = {k: v for k, v in numbers.items() if "int" not in k}
    flags, no_function = {**numbers, "flag": 1}, {"function": abs}
    axis_names = {**unhashable, "ints": (0,), "text": "data", "none": (None,)}
    rates = "learning_rate weight_decay"
    return [
        (smooth_with, "variant norm_scope axis_boundary", numbers),
        (smooth_with, "strict", {**flags, "numpy": np.bool_(True)}),
        (smooth_with, "axis_name", {**unhashable, "flag": True, "int": 3, "set": {1}}),
        (smooth_with, "norm_axis_names", {**axis_names, "list": (["a"],), "2": "aa"}),
        (adamw_with, f"{rates} b1 b2 eps eps_root", numbers),
        (adamw_with, "b1 eps", no_function),
        (adamw_with, "mu_dtype", {**numbers, "int": int}),
        (adamw_with, "nesterov", flags),
        (muon_with, f"{rates} adam_learning_rate adam_weight_decay beta eps", numbers),
        (muon_with, "consistent_rms adam_b1 adam_b2 adam_eps_root", numbers),
        (muon_with, "preconditioning", numbers),
        (muon_with, "mu_dtype", {**numbers, "int": int}),
        (muon_with, "nesterov adaptive", flags),
        (muon_with, "ns_steps", {**no_starts, "zero": 0, "array": jnp.ones(2, int)}),
        (muon_with, "ns_coeffs", {**no_rows, "two": (1.0, 2.0), "array": jnp.ones(4)}),
        (muon_with, "ns_coeffs", {"rows": jnp.ones((6, 3)), "none": jnp.ones((0, 3))}),
        (
            muon_with,
            "muon_weight_dimension_numbers",
            {"int": 3, "two": (0, 1), "x": "x"},
        ),
        (alpha_with, "dtype", {**numbers, "int": int}),
        (alpha_with, "per decay alpha", numbers),
        (operator_with, "signal direction radius alpha_max learning_rate", numbers),
        (gs.window, "alpha", numbers),
        (gs.ema, "rho", numbers),
        (gs.tikhonov, "strength", numbers),
        (gs.layer_scale, "factors", {"x": "x", "key": numbers["key"], "flag": True}),
        (gs.layer_scale, "factors", {"long": 10**400, "flags": jnp.array([True])}),
        (gs.diagnostics.line_shape_score, "states", {"none": None, "x": "x", "d": {}}),
        (gs.diagnostics.residual_alignment, "states", {"long": 10**400, "of": [None]}),
        (gs.unrolled, "start", no_starts),
    ]


def test_an_argument_of_the_wrong_kind_is_named_whatever_it_is():
    for make, arguments, kinds in wrong_kinds():
        for argument in arguments.split():
            for kind, value in kinds.items():
                with pytest.raises((TypeError, ValueError)) as info:
                    make(**{argument: value})
                found = (make.__name__, kind, str(info.value))
                assert f"`{argument}`" in str(info.value), found
                assert len(str(info.value)) < 700, found
                raised_in = str(info.traceback[-1].path)
                assert "gradsmooth_optax" in raised_in, (found, raised_in)
