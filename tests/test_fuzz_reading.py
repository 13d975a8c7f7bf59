"""Which leaf is which layer, of any model: read right, or doubted aloud.

The models of `drawn_models.py` know their layers, and nothing of the library is asked
for them. Right is who is coupled with whom, pair by pair; loud is an error, a warning
of `init`, or a doubt of `detect`. For more models, other ones for every number:

    GRADSMOOTH_FUZZ_EXAMPLES=2000 python -m pytest tests/test_fuzz_reading.py
"""

import itertools
import os
import random
import warnings
from collections import Counter

import drawn_models
import jax
import numpy as np
import pytest
from drawn_models import (
    Cycle,
    Model,
    Numbers,
    Scan,
    as_layer,
    as_stack,
    block_of_t5,
    dense,
    outside,
    scale,
    weight,
)

import gradsmooth_optax as gs

NUMBER = int(os.environ.get("GRADSMOOTH_FUZZ_EXAMPLES", 0))


def models(number, first=0):
    for seed in range(first, first + (NUMBER or number)):
        yield seed, drawn_models.model(random.Random(seed))


# -- What the library makes of a model -------------------------------------------------


def verdict(depth_of, model, kept=lambda param: True):
    """(a word, why) of the depth that `depth_of(tree)` returns.

    "right"; "loud"; silently "wider", where all true neighbors are coupled and others
    too; or silently "wrong", where some are not coupled.
    """
    tree = drawn_models.arrays(model.tree)
    params, leaves = jax.tree.leaves(model.tree), jax.tree.leaves(tree)
    try:
        depth = depth_of(tree)
        ids = {id(x) for p, x in zip(params, leaves, strict=True) if kept(p)}
        if len(ids) < len(params):
            depth = depth.only(lambda path, leaf: id(leaf) in ids)
        summary = gs.describe(depth, tree)
    except ValueError as error:
        return "loud", str(error)
    if summary.problem or summary.doubts:
        return "loud", summary.problem or summary.doubts[0]
    truth, found = drawn_models.truth_of(params, model.joined, kept), pairs(summary)
    if truth.holds(found):
        return "right", ""
    false, lost = found - truth.required - truth.optional, truth.required - found
    why = f"{depth!r} couples {len(false)} false pairs, and not {len(lost)} true ones"
    return "wrong" if lost else "wider", why


def pairs(summary):
    """Which slots are coupled, by what `describe` says."""
    found = set()
    for group in summary.groups:
        slots = sorted(
            (int(layer), (member.leaf, member.axes, index))
            for member in group.members
            for index, layer in np.ndenumerate(member.layers)
        )
        found |= {
            frozenset({one, other})
            for (a, one), (b, other) in itertools.pairwise(slots)
            if group.ranked or b == a + 1
        }
    return found


def unrolled(tree):
    return gs.unrolled()


def detected(tree):
    return gs.detect(tree).spec


def report(wrong):
    """The smallest of what was read wrong."""
    smallest = sorted(wrong, key=lambda case: len(jax.tree.leaves(case[1].tree)))
    shown = [
        f"seed {seed}, {model.kind}: {why}\n{drawn_models.written(model.tree)}"
        for seed, model, why in smallest[:3]
    ]
    return "\n\n".join([f"{len(wrong)} read wrong, and silently", *shown])


# -- Any model -------------------------------------------------------------------------

# What `unrolled` or `detect` need not find.
HARD = {"no layers", "critics", "ensemble", "prefixed", "stages as lists"}
STACKED = {"scanned", "scanned beside unrolled", "two scans", "cycle", "cycle and rest"}


@pytest.mark.parametrize(
    ("reader", "not_its_own", "least"),
    [(unrolled, HARD | STACKED, 0.5), (detected, HARD, 0.4)],
    ids=["unrolled", "detect"],
)
def test_the_layers_of_any_model_are_found_or_doubted_aloud(reader, not_its_own, least):
    counts, wrong = Counter(), []
    for seed, model in models(50):
        word, why = verdict(reader, model)
        if model.kind not in not_its_own:
            counts[word] += 1
        if word in ("wrong", "wider"):
            wrong.append((seed, model, why))
    assert not wrong, report(wrong)
    assert counts["right"] >= least * counts.total(), counts


# -- Calls that are a bit wrong --------------------------------------------------------

PARTS = r"(?:Dense|LayerNorm|wi|ln|experts|w|fc|conv|norm|mlp|experts/|layers/)_?(\d+)"


def wrong_calls(model):
    """Specs that someone might write for a model, of which some happen to be right."""
    for stack in model.stacks:
        yield from {Numbers: of_numbers, Scan: of_scan, Cycle: of_cycle}[type(stack)](
            stack, model
        )
    if model.stacks:
        yield gs.unrolled(PARTS)
        yield gs.unrolled(r"(\d+)")
        yield gs.unrolled(r".*?(\d+)(?=\D*$)")
    for pattern in model.wrong:
        yield gs.unrolled(pattern)


def of_numbers(how, model):
    del model
    for number in (r"(\d)", "(1)", "([0-2])", "([1-9][0-9]*)"):
        yield gs.unrolled(how.pattern(number))
    yield gs.unrolled("params/" + how.pattern())
    yield gs.unrolled("(?:encoder|trunk|text)/" + how.pattern())
    yield gs.unrolled(f"{how.name}[_/]?" + r"(\d+)/")
    for axis in (0, 1):
        yield gs.scanned(how.pattern(r"\d+"), axis=axis)
        yield gs.scanned(how.pattern(), axis=axis)
    yield gs.scanned(how.name)


def of_scan(scan, model):
    layers = [p for p in jax.tree.leaves(model.tree) if p.axes]
    others = {p.shape[1 - scan.axis] for p in layers if len(p.shape) > 1}
    if len(others) > 1:
        yield gs.scanned(f"{scan.name}/", axis=1 - scan.axis)
    yield gs.scanned(f"{scan.name}/", axis=scan.axis)
    yield gs.scanned(f"decoder/{scan.name}/", axis=scan.axis)
    yield gs.scanned("decoder/", axis=scan.axis)
    yield gs.scanned("^", axis=scan.axis)
    yield gs.unrolled(f"{scan.name}/" + r".*?(\d+)")


def of_cycle(cycle, model):
    del model
    how, axis, period = cycle
    yield gs.unrolled(how.pattern())
    yield gs.scanned(how.pattern(r"\d+"), axis=axis)
    yield gs.scanned(how.pattern(), axis=axis)
    yield gs.scanned(how.pattern(), axis=axis, stride=period)
    for stride in (period - 1, period + 1):
        yield gs.scanned(how.pattern(), axis=axis, stride=stride)
    yield gs.scanned(how.pattern(r"(\d)"), axis=1 - axis, stride=period)


def restriction(rng, params):
    """What an `.only` keeps: all, matrices, a chain, or some roles."""
    layers = [p for p in params if p.chain is not None]
    one = rng.choice(layers) if layers else None
    some = {p.role for p in layers if rng.random() < 0.5}
    return rng.choice(
        [
            lambda p: True,
            lambda p: True,
            lambda p: len(p.of_layer) > 1,
            lambda p: p.chain == one.chain if one else True,
            lambda p: p.role in some or p is one,
        ]
    )


def test_a_call_that_is_a_bit_wrong_couples_all_true_neighbors_or_is_loud():
    counts, wrong = Counter(), []
    for seed, model in models(30, first=10_000):
        rng = random.Random(seed)
        calls = list(wrong_calls(model))
        for spec in calls if NUMBER else rng.sample(calls, min(2, len(calls))):
            kept = restriction(rng, jax.tree.leaves(model.tree))
            word, why = verdict(lambda tree, spec=spec: spec, model, kept)
            counts[word] += 1
            if word == "wrong":
                wrong.append((seed, model, why))
    assert not wrong, report(wrong)
    assert counts["right"] >= 0.05 * counts.total(), counts
    assert counts["loud"] >= 0.3 * counts.total(), counts


def test_init_says_of_any_model_what_describe_says():
    for _, model in models(8, first=20_000):
        tree = drawn_models.arrays(model.tree)
        summary = gs.describe(gs.unrolled(), tree)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                gs.smooth_over_depth(gs.unrolled(), 0.2).init(tree)
                said = [str(warning.message) for warning in caught]
            except ValueError as error:
                said = [str(error)]
        assert said == [summary.problem] * bool(summary.problem) + list(summary.doubts)


# -- What it found ---------------------------------------------------------------------

LAYER = {"attn": dense(4, 4), "norm": scale(4), "mlp": dense(4, 8)}
LINEAR = dense(4, 4)
NORMED = LAYER | {"ln_1": scale(4), "ln_2": scale(4)}


def layers(shapes, chain="one", count=3, lead=()):
    return [as_layer(shapes, chain, n, lead) for n in range(count)]


def named(template, shapes, chain="one", count=3):
    return {template.format(n): x for n, x in enumerate(layers(shapes, chain, count))}


def stacked(shapes, chain="one", count=5, has_names=False):
    return as_stack(shapes, chain, range(count), 0, lambda sizes: has_names)


def positions(shapes, axis):
    """Of a cycle of three, which is repeated twice."""
    return [as_stack(shapes, "one", range(p, 6, 3), axis) for p in range(3)]


def of_stages(shapes, name):
    return {name: [layers(shapes, stage, 2) for stage in range(3)]}


def down_blocks(number):
    """Stages of their own widths, but for a part that is alike in all."""
    part = outside({"downsample": LINEAR})
    return {
        f"down_blocks{s}": named("DecoderLayer_{}", dense(4, 8 + 4 * s), s, 2) | part
        for s in range(number)
    }


def scans(has_names, mlp=LAYER["mlp"]):
    second = LAYER | {"mlp": mlp}
    return {
        "encoder": {"encoderblock": stacked(LAYER, "encoder", 3, has_names[0])},
        "decoder": {"h": stacked(second, "decoder", 5, has_names[1])},
    }


def stages_of_one(name, layer, down=True):
    part = outside({"downsample": LINEAR}) if down else {}
    return {
        "down_blocks": [{name: as_layer(layer, s, 0)} | part for s in range(2)],
    }


MATRICES = {
    "attn": {"w": [weight(4, 4)] * 3},
    "mlp": weight(4, 8),
    "gate": weight(8, 4),
}
WITH_NORMS = MATRICES | {"norms": [weight(4), weight(4)]}


def beside(linears, others):
    return {"params": {"text": linears, "vision": others}}


TREES = {
    # Layers of one module or one array each are read otherwise under another node.
    "lists of two arrays": {"params": {"blocks": layers([weight(4, 4)] * 2)}},
    "lists of two modules": {"params": {"groups": layers([dense(4, 8)] * 2)}},
    "a list of modules beside layers": beside(
        {"layers": layers(LINEAR, "text", 5)}, {"blocks": layers(LAYER, "vision")}
    ),
    "modules by name beside layers": beside(
        named("encoder_layer_{}", dense(4, 8), "text"),
        named("encoder_layer_{}", LAYER, "vision"),
    ),
    "a cycle of modules": {"params": {"blocks": positions(dense(4, 8), 0)}},
    "a cycle of modules on axis 1": {"params": {"blocks": positions(dense(4, 8), 1)}},
    "stages of own widths": {"params": down_blocks(4)},
    # Lists of lists.
    "blocks that hold layers": of_stages(dense(4, 8), "blocks"),
    "down_blocks that hold layers": of_stages(dense(4, 8), "down_blocks"),
    "layers that hold layers": of_stages(dense(4, 8), "layers"),
    "stages that hold T5's layers": of_stages(block_of_t5(8), "stages"),
    "stages of lists whose layers have parts called layers": {
        "stages": [
            [
                as_layer({"mlp": {"layers": [LINEAR] * 2}, "attn": LINEAR}, s, n)
                for n in range(2)
            ]
            for s in range(2)
        ]
    },
    # One layer alone.
    "stages of one layer each": stages_of_one("encoder_layer_00", block_of_t5(8)),
    "stages of one layer without a number": stages_of_one("h", LAYER),
    "stages of which one has a single layer": {
        "stages": [
            named("block_{}", block_of_t5(8), s, count)
            if count > 1
            else {"block": as_layer(block_of_t5(8), s, 0)}
            for s, count in enumerate([2, 1, 3])
        ]
    },
    "two models of layers of their own widths": {
        f"gpt_{m}": {"h": [as_layer(dense(4, 4 + n), m, n) for n in range(3)]}
        | outside({"embed": weight(9, 4)})
        for m in range(2)
    },
    # Where no name tells vectors from matrices.
    "a cycle of matrices": {"layers": positions(MATRICES, 0)},
    "a cycle of matrices and vectors without names": {
        "layers": positions(WITH_NORMS, 0)
    },
    "a stack of these": {"decoder": {"layers_0": stacked(WITH_NORMS)}}
    | outside({"embed": weight(9, 4)}),
    # Named otherwise than layers.
    "discriminators beside blocks": {
        "generator": {"blocks": layers(LAYER, "generator")},
        "discriminators": [
            outside({"convs": [dense(5, 4, 4)] * 3, "post": LINEAR}) for _ in range(3)
        ],
    },
    "players": {"players": [outside({"actor": LINEAR, "critic": LINEAR})] * 3},
    "lists of parts": {
        "attentions": layers(LAYER["attn"], "attn", 4),
        "layer_norm1": layers(scale(4), "norm1", 4),
        "ffns": layers({"up": dense(4, 8), "down": dense(8, 4)}, "ffn", 4),
        "layer_norm2": layers(scale(4), "norm2", 4),
    },
    "a stack beside a tower of its own": {
        "decoder": {"layers": stacked(NORMED, "decoder", 4)},
        "vision_tower": {"layers": stacked(NORMED, "tower", 3)}
        | outside({"patch": weight(3, 4)}),
    },
    # Stacked layers beside others.
    "a stack without names beside one with": scans((True, False)),
    "lists in a stack beside a stack with names": scans(
        (True, False), {"layers": [LINEAR] * 2}
    ),
}


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("reader", [unrolled, detected], ids=["unrolled", "detect"])
def test_these_models_are_read_right_or_doubted_aloud(reader, name):
    word, why = verdict(reader, Model(name, TREES[name]))
    assert word in ("right", "loud"), why


def ensemble(shapes):
    return {"ensemble": {"block": layers(shapes, lead=(2,))}}


CALLS = {
    "a list of modules as a stack": (
        gs.scanned("blocks/"),
        {"params": {"blocks": layers(LINEAR)}},
    ),
    "a list of arrays as a stack": (
        gs.scanned("blocks/"),
        {"params": {"blocks": layers(weight(4, 4))}},
    ),
    "every position of a cycle by itself": (
        gs.scanned("blocks/"),
        TREES["a cycle of modules"],
    ),
    "the number of a model": (
        gs.unrolled(r"gpt(\d+)/"),
        {"params": {"gpt2": {"h": layers(LINEAR)}}},
    ),
    "the number of a larger model": (
        gs.unrolled(r"(\d+)"),
        {"vit_b16": {"h": layers(weight(4, 4))}},
    ),
    "the parts of an ensemble's layers": (
        gs.unrolled(r"layer/(\d+)/"),
        ensemble(block_of_t5(8)),
    ),
    "an ensemble without its first layer": (
        gs.unrolled("block/([1-9])/"),
        ensemble(LAYER),
    ),
    "parts of layers of which one lacks a parameter": (
        gs.unrolled(r"ln_(\d)/"),
        {
            **named("block_{}", NORMED, count=4),
            "block_2": as_layer(NORMED | {"norm": {"scale": None}}, "one", 2),
        },
    ),
    "one of two stacks": (gs.scanned("decoder/h/"), scans((False, True))),
    "stages of a U-Net": (
        gs.unrolled(r"down_blocks/(\d+)/"),
        {"down_blocks": [{"h": layers(LAYER, s, 3)} for s in range(2)]},
    ),
    "experts of each layer": (
        gs.unrolled(r"experts/(\d+)/"),
        {"blocks": layers(LAYER | {"moe": {"experts": [dense(4, 8)] * 3}})},
    ),
    "the last number, of one part only": (
        gs.unrolled(r".*?(\d+)(?=\D*$)"),
        {"layers": layers({"attn": LINEAR, "mlp": {"fc_0": dense(4, 8)}}, count=4)},
    ),
    "the number of the model for a first layer without one": (
        gs.unrolled(r".*?(\d+)(?=\D*$)"),
        {
            "bert2": {"resblocks": as_layer(LINEAR, "one", 0)}
            | {f"resblocks_{n}": as_layer(LINEAR, "one", n) for n in (1, 2)}
        },
    ),
    "the layers inside of the layers of a second stack": (
        gs.scanned("layers/"),
        {
            "decoder": {"layers": stacked(LAYER, "decoder", 5, True)},
            "encoder": {
                "block": stacked(
                    LAYER | {"mlp": {"layers": [LINEAR] * 2}}, "encoder", 5, True
                )
            },
        },
    ),
    "a stack beside a tower": (
        gs.scanned("decoder/layers/"),
        TREES["a stack beside a tower of its own"],
    ),
    "the width of one stack and the depth of another": (
        gs.scanned("(?:encoderblock|h)/", axis=1),
        scans((False, False)) | outside({"embed": weight(9, 4)}),
    ),
    "the number of a stage": (gs.unrolled(r"down_blocks(\d+)/"), down_blocks(3)),
}


@pytest.mark.parametrize("name", CALLS)
def test_these_calls_couple_all_true_neighbors_or_are_loud(name):
    spec, tree = CALLS[name]
    word, why = verdict(lambda tree: spec, Model(name, tree))
    assert word != "wrong", why
