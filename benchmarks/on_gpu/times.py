"""The groups of cases that are timed: operators, optimizers, a training step."""

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import gradsmooth_optax as gs
from benchmarks.cost.cpu.updates import (
    LAYOUTS,
    LIMIT,
    case_name,
    depth_of,
    limit,
    smoothings,
    updates_of,
)
from benchmarks.on_gpu import training
from benchmarks.on_gpu.peers import peers
from benchmarks.on_gpu.session import Case, Plan, Session, applied

WINDOW = "window(0.2)"
PRESERVING = f"{WINDOW}, norm_preserving"
# Where not every operator fits into the time: one of each kind.
_FEW = (WINDOW, PRESERVING, "tikhonov(1.0)", f"controls.norm_matched({WINDOW})")
_RATE = 1e-3


def groups(plan: Plan) -> Iterator[tuple[str, Callable[[Session], None]]]:
    """Yields what times each group, first what matters most and compiles fast."""

    def group(function: Callable, *arguments: Any, **options: Any) -> Any:
        shown = [str(x) for x in arguments if not isinstance(x, tuple)]
        shown += ["donated"] if options else []
        name = f"{function.__name__} {', '.join(shown)}".strip()
        return name, lambda session: function(session, *arguments, **options)

    size, large = plan.megabytes
    yield group(copies)
    for layout in LAYOUTS:
        yield group(operators, size, "float32", layout)
    yield group(training_step)
    for layout in LAYOUTS:
        yield group(optimizers, size, layout)
        yield group(operators, size, "bfloat16", layout)
    yield group(peers, size, "stacked")
    for layout in LAYOUTS:
        for dtype in ("float32", "bfloat16"):
            yield group(operators, large, dtype, layout, _FEW)
    for layout in LAYOUTS:
        yield group(operators, size, "float32", layout, _FEW, make=_donated)
    yield group(peers, size, "unrolled")
    for function in (optimizers, peers):
        for layout in LAYOUTS:
            yield group(function, large, layout)


def take_times(session: Session) -> None:
    """Runs the groups for as long as there is time."""
    for name, measure in groups(session.plan):
        if session.left() <= 0:
            session.skip(name, "all", "no time left")
            continue
        began = time.monotonic()
        try:
            measure(session)
        except Exception as error:  # one group must not take the others with it
            session.skip(name, "all", error)
        gc.collect()
        if torch := sys.modules.get("torch"):
            torch.cuda.empty_cache()  # its next tensors may be of other sizes
        session.report["seconds"][name] = time.monotonic() - began
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        session.save()


def copies(session: Session) -> None:
    """Measures the limit at every size: as many bytes, read and written by a copy."""
    for megabytes in session.plan.megabytes:
        updates = updates_of(megabytes, session.plan.layers, "stacked")
        cases = {"copy": applied(lambda u: jax.tree.map(jnp.copy, u), updates)}
        cases[LIMIT] = applied(limit, updates)
        found = session.measure(f"copy {megabytes:g} MB", cases, "copy")
        if found:
            moved = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(updates))
            seconds = found["copy"]["milliseconds"]["median"] / 1e3
            found["bytes"] = moved // 2
            found["gigabytes_per_second"] = moved / seconds / 1e9
        session.report["copy"][f"{megabytes:g} MB"] = found


def _donated(function: Callable, updates: Any) -> Case:
    return Case(lambda u: (function(u), ()), jax.tree.map(jnp.copy, updates))


def operators(
    session: Session,
    megabytes: float,
    dtype: str,
    layout: str,
    only: Iterable[str] | None = None,
    make: Callable[[Callable, Any], Case] = applied,
) -> None:
    """Times operators, and what else is one read and one write, against `0.9 u`."""
    depth = depth_of(layout)

    def with_tx(tx: optax.GradientTransformation) -> Callable:
        return lambda updates: tx.update(updates, tx.init(updates))[0]

    wider = gs.smooth_over_depth(depth, gs.window(0.2, radius=2))
    decayed = gs.scale_over_depth(depth, gs.layer_wise_decay(0.9))
    functions = {
        **smoothings(layout),
        "window(0.2, radius=2)": with_tx(wider),
        "scale_over_depth(layer_wise_decay(0.9))": with_tx(decayed),
    }
    only = session.plan.only or only
    names = [name for name in functions if only is None or name in only]
    updates = updates_of(megabytes, session.plan.layers, layout, dtype)
    cases = {LIMIT: make(limit, updates)}
    cases |= {name: make(functions[name], updates) for name in names}
    case = case_name(megabytes, dtype)
    way = layout if make is applied else f"{layout}, donated"
    copy = session.report["copy"].get(f"{megabytes:g} MB", {}).get("copy")
    copy_ms = copy["milliseconds"]["median"] if copy else None
    found = session.measure(f"{case}, {way}", cases, LIMIT, copy_ms=copy_ms)
    session.report["operators"].setdefault(case, {})[way] = found


def optimizers(session: Session, megabytes: float, layout: str) -> None:
    """Times optimizers with and without; what they keep is donated."""
    depth = depth_of(layout)
    smooth = gs.smooth_over_depth(depth, 0.2)
    preserving = gs.smooth_over_depth(depth, 0.2, variant="norm_preserving")
    adam, trust = optax.scale_by_adam(), optax.scale_by_trust_ratio()
    pairs: dict[str, dict[str, Any]] = {
        "scale_by_adam()": {"per_layer(scale_by_adam())": gs.per_layer(adam, depth)},
        "scale_by_trust_ratio()": {
            "per_layer(scale_by_trust_ratio())": gs.per_layer(trust, depth)
        },
        "optax.adamw": {
            "gs.adamw(window(0.2))": gs.adamw(_RATE, smooth),
            "gs.adamw(window(0.2), norm_preserving)": gs.adamw(_RATE, preserving),
            "optax.adamw, scale_over_depth(0.5)": optax.chain(
                optax.adamw(_RATE), gs.scale_over_depth(depth, 0.5)
            ),
        },
    }
    bases = dict(zip(pairs, (adam, trust, optax.adamw(_RATE)), strict=True))
    if megabytes != session.plan.megabytes[0]:  # these are large
        pairs = {"optax.adamw": {"gs.adamw(window(0.2))": gs.adamw(_RATE, smooth)}}
    gradients = updates_of(megabytes, session.plan.layers, layout)
    params = jax.tree.map(lambda leaf: 0.5 * leaf, gradients)
    where = f"{megabytes:g} MB, {layout}"
    found = session.report["optimizers"].setdefault(where, {})
    for base, arms in pairs.items():
        whole = base == "optax.adamw"  # a step that is applied, else an update
        cases = {
            name: (_step if whole else _update)(tx, params, gradients)
            for name, tx in {base: bases[base], **arms}.items()
        }
        found |= session.measure(f"optimizer {where}", cases, base)


def _update(tx: Any, params: Any, gradients: Any) -> Case:
    def update(state: Any, gradients: Any, params: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradients, state, params)
        return state, updates

    return Case(update, tx.init(params), (gradients, params))


def _step(tx: Any, params: Any, gradients: Any) -> Case:
    def step(carry: Any, gradients: Any) -> tuple[Any, Any]:
        params, state = carry
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), state), ()

    carry = jax.tree.map(jnp.copy, params), tx.init(params)
    return Case(step, carry, (gradients,))


def training_step(session: Session) -> None:
    """Times a training step of the GPT with and without."""
    sizes = session.plan.training
    loss, params, tokens = training.one_step(sizes)
    depth = gs.scanned("blocks/")

    def case(tx: Any) -> Case:
        def step(carry: Any, tokens: jax.Array) -> tuple[Any, Any]:
            params, state = carry
            value, gradients = jax.value_and_grad(loss)(params, tokens)
            updates, state = tx.update(gradients, state, params)
            return (optax.apply_updates(params, updates), state), value

        return Case(step, (jax.tree.map(jnp.copy, params), tx.init(params)), (tokens,))

    def smoothed(**options: Any) -> Case:
        return case(gs.adamw(_RATE, gs.smooth_over_depth(depth, 0.2, **options)))

    base = case(optax.adamw(_RATE))
    # The same program once more: what its ratio is off by is noise.
    again = base._replace(carry=jax.tree.map(jnp.copy, base.carry))
    cases = {"optax.adamw": base, "optax.adamw again": again, WINDOW: smoothed()}
    if session.plan.only is None:
        cases[PRESERVING] = smoothed(variant="norm_preserving")
    found = session.measure("training step", cases, "optax.adamw", calls=1)
    for of_case in found.values():
        seconds = of_case["milliseconds"]["median"] / 1e3
        of_case["tokens_per_second"] = tokens[:, 1:].size / seconds
    session.report["training_step"] = found
