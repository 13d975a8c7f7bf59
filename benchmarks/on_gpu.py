"""Times and a training on a real GPU, in one process of under six minutes.

    python -m benchmarks.on_gpu
    python -m benchmarks.on_gpu --only train --out FILE
    python -m benchmarks.on_gpu --quick

Times are medians over rounds in which all cases of a group take turns, as ratios to
`0.9 u` under the same `jit`, and to the time in which a copy moves as many bytes. The
main ones are not donated: in a training step the updates are temporaries, which nothing
takes over. The training is of a GPT, its arms paired by seed: benchmarks/
on_gpu_training.py. What fails or does not fit into the time is listed as skipped. The
report is written after every group, so that a run that is ended leaves a valid file.
`--quick` is tiny and runs anywhere: it tests this script, and says nothing of speed.
"""

import argparse
import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import gradsmooth_optax as gs
from benchmarks import on_gpu_training
from benchmarks.cost.cpu.timing import in_turns, summary, temporaries
from benchmarks.cost.cpu.updates import (
    LAYOUTS,
    LIMIT,
    case_name,
    depth_of,
    limit,
    smoothings,
    updates_of,
)
from benchmarks.json_files import COST, write_json
from benchmarks.on_gpu_report import tables
from benchmarks.provenance import provenance

WINDOW = "window(0.2)"
PRESERVING = f"{WINDOW}, norm_preserving"
# Where not every operator fits into the time: one of each kind.
_FEW = (WINDOW, PRESERVING, "tikhonov(1.0)", f"controls.norm_matched({WINDOW})")
_RATE = 1e-3


class Plan(NamedTuple):
    """Sizes of a run.

    Attributes:
      megabytes: of all updates; what takes long is timed at the first size alone.
      layers: L.
      rounds: of every comparison.
      calls: in one turn, back to back, so that a launch is hidden behind the last one.
      seconds: after which no group of times begins,
      all_seconds: and that both parts should take.
      only: operators that are timed; None for all.
      training: sizes of the GPT.
    """

    megabytes: tuple[float, ...]
    layers: int
    rounds: int
    calls: int
    seconds: float
    all_seconds: float
    only: tuple[str, ...] | None
    training: on_gpu_training.Plan


FULL = Plan((1024, 4096), 48, 30, 4, 130, 300, None, on_gpu_training.FULL)
QUICK = Plan((0.25, 0.5), 3, 2, 1, 240, 480, (WINDOW,), on_gpu_training.QUICK)


class Case(NamedTuple):
    """What is timed: `function(carry, *fixed)` returns the next carry and an output.

    The carry is donated, and so has to be the case's own.
    """

    function: Callable[..., tuple[Any, Any]]
    carry: Any
    fixed: tuple = ()


class Session:
    """A report that grows, and the time that is left for it."""

    def __init__(self, plan: Plan, out: Path, report: dict[str, Any]):
        self.plan, self.out, self.report = plan, out, report
        self.began = time.monotonic()

    def passed(self) -> float:
        return time.monotonic() - self.began

    def left(self) -> float:
        return self.plan.seconds - self.passed()

    def skip(self, group: str, case: str, why: object) -> None:
        text = " ".join(str(why).split())[:200] or type(why).__name__
        print(f"  {group}: {case}: skipped, {text}", flush=True)
        self.report["skipped"].append({"group": group, "case": case, "why": text})

    def save(self) -> None:
        # Never half a file, whenever the process is ended.
        partial = self.out.with_suffix(".partial")
        write_json(self.report, partial)
        os.replace(partial, self.out)

    def measure(
        self,
        group: str,
        cases: Mapping[str, Case],
        base: str,
        *,
        copy_ms: float | None = None,
        others: Mapping[str, Callable[[], Any]] | None = None,
        calls: int | None = None,
    ) -> dict[str, Any]:
        """Returns the times of all cases, which take turns, and prints them.

        Args:
          group: name for people.
          cases: what to compile and time.
          base: the case that ratios are to.
          copy_ms: the time of a copy of as many bytes, where that is the limit.
          others: calls that are not jax's, and wait until they are done.
          calls: in one turn, if not as planned.
        """
        calls = calls or self.plan.calls
        executables = self._compiled(group, cases)
        turns = {
            name: _turn(run, cases[name], calls) for name, run in executables.items()
        }
        turns |= {
            name: functools.partial(_repeat, call, calls)
            for name, call in (others or {}).items()
        }
        for name in [*turns]:
            try:
                jax.block_until_ready(turns[name]())
            except Exception as error:  # out of memory, say: the others go on
                del turns[name]
                self.skip(group, name, error)
        if base not in turns:
            return {}
        seconds = in_turns(turns, self.plan.rounds, group, max(5.0, self.left()))
        found = {}
        for name, of_name in seconds.items():
            milliseconds = summary(1e3 * of_name / calls)
            found[name] = {
                "milliseconds": milliseconds,
                "ratio": summary(of_name / seconds[base]),
            }
            if copy_ms is not None:
                found[name]["over_limit"] = milliseconds["median"] / copy_ms
            if name in executables:
                found[name] |= _compilers_bytes(executables[name])
            print(
                f"  {group}: {name}: {milliseconds['median']:.3f} ms, "
                f"{found[name]['ratio']['median']:.2f} of {base}",
                flush=True,
            )
        return found

    def _compiled(self, group: str, cases: Mapping[str, Case]) -> dict[str, Any]:
        """All cases that compile in time; the compiler runs beside the tracing."""
        waiting, found = {}, {}
        with ThreadPoolExecutor(4) as pool:
            for name, case in cases.items():
                try:
                    jitted = jax.jit(case.function, donate_argnums=0)
                    lowered = jitted.lower(case.carry, *case.fixed)
                    waiting[name] = pool.submit(lowered.compile)
                except Exception as error:
                    self.skip(group, name, error)
            for name, future in waiting.items():
                try:
                    found[name] = future.result(max(1.0, self.left()))
                except Exception as error:
                    future.cancel()
                    self.skip(group, name, error)
        return found


def _turn(run: Callable, case: Case, calls: int) -> Callable[[], Any]:
    carry = case.carry

    def turn() -> Any:
        nonlocal carry
        output = None
        for _ in range(calls):
            carry, output = run(carry, *case.fixed)
        return carry, output

    return turn


def _repeat(call: Callable[[], Any], calls: int) -> None:
    for _ in range(calls):
        call()


def _compilers_bytes(executable: Any) -> dict[str, Any]:
    """What the compiler says that it moves and needs, where it says it."""
    try:
        analysis = executable.cost_analysis()
        return {
            "bytes_accessed": float(analysis["bytes accessed"]),
            "temporaries": temporaries(executable),
        }
    except Exception:  # no promise of any backend
        return {}


def copies(session: Session) -> None:
    """Measures the limit at every size: as many bytes, read and written by a copy."""
    for megabytes in session.plan.megabytes:
        updates = updates_of(megabytes, session.plan.layers, "stacked")
        cases = {"copy": _pure(lambda u: jax.tree.map(jnp.copy, u), updates)}
        cases[LIMIT] = _pure(limit, updates)
        found = session.measure(f"copy {megabytes:g} MB", cases, "copy")
        if found:
            moved = 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(updates))
            seconds = found["copy"]["milliseconds"]["median"] / 1e3
            found["bytes"] = moved // 2
            found["gigabytes_per_second"] = moved / seconds / 1e9
        session.report["copy"][f"{megabytes:g} MB"] = found


def _pure(function: Callable, updates: Any) -> Case:
    return Case(lambda carry, u: (carry, function(u)), (), (updates,))


def _donated(function: Callable, updates: Any) -> Case:
    return Case(lambda u: (function(u), ()), jax.tree.map(jnp.copy, updates))


def operators(
    session: Session,
    megabytes: float,
    dtype: str,
    layout: str,
    only: Iterable[str] | None = None,
    make: Callable[[Callable, Any], Case] = _pure,
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
    only = only or session.plan.only
    names = [name for name in functions if only is None or name in only]
    updates = updates_of(megabytes, session.plan.layers, layout, dtype)
    cases = {LIMIT: make(limit, updates)}
    cases |= {name: make(functions[name], updates) for name in names}
    case = case_name(megabytes, dtype)
    way = layout if make is _pure else f"{layout}, donated"
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
    if megabytes != session.plan.megabytes[0]:
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
    loss, params, tokens = on_gpu_training.one_step(sizes)
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


def peers(session: Session, megabytes: float, layout: str) -> None:
    """Times the authors' formula in PyTorch, eager and compiled, beside ours."""
    import torch  # pyright: ignore[reportMissingImports] # optional

    from benchmarks.cost.cpu import torch_twins

    on_card = torch.cuda.is_available()
    if not on_card and session.plan is not QUICK:
        raise RuntimeError("PyTorch sees no card")
    updates = updates_of(megabytes, session.plan.layers, layout)
    us: Any = [
        torch.randn(leaf.shape, device="cuda" if on_card else "cpu")
        for leaf in jax.tree.leaves(updates)
    ]
    if layout == "stacked":
        (us,) = us
        ways = {"PyTorch": torch_twins.STACKED}
        limits = {f"PyTorch: {LIMIT}": lambda us: 0.9 * us}
    else:
        ways = {"PyTorch, hook": torch_twins.HOOK}
        ways["PyTorch, foreach"] = torch_twins.LISTED
        limits = {f"PyTorch: {LIMIT}": lambda us: torch._foreach_mul(us, 0.9)}

    def call(function: Callable, *arguments: Any) -> None:
        function(us, *arguments)
        if on_card:
            torch.cuda.synchronize()

    where = f"{megabytes:g} MB, {layout}"
    names = {name: functools.partial(call, f) for name, f in limits.items()}
    for variant in ("window", "norm_preserving"):
        for way, twins in ways.items():
            twin = twins[variant]
            names[f"{way}: {variant}"] = functools.partial(call, twin, 0.2)
            name = f"{way}, compiled: {variant}"
            if megabytes != session.plan.megabytes[0]:
                continue  # compiling takes longer than all else
            compiled = functools.partial(call, torch.compile(twin), 0.2)
            try:
                with _at_most(min(30.0, session.left() - 5)):
                    compiled()
                names[name] = compiled
            except Exception as error:
                session.skip(f"peers {where}", name, error)
    functions = {LIMIT: limit, **{n: smoothings(layout)[n] for n in _FEW[:2]}}
    cases = {name: _pure(f, updates) for name, f in functions.items()}
    found = session.measure(f"peers {where}", cases, LIMIT, others=names)
    session.report["peers"][where] = found


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raises `TimeoutError` in what takes longer; a compiler of PyTorch is Python."""
    if seconds <= 0:
        raise TimeoutError("no time left to compile it")

    def stop(*_: Any) -> None:
        raise TimeoutError(f"not compiled in {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def groups(plan: Plan) -> Iterator[tuple[str, Callable[[Session], None]]]:
    """Yields what times each group, what matters most first."""

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
    for function in (optimizers, peers):
        for layout in LAYOUTS:
            yield group(function, size, layout)
    for layout in LAYOUTS:
        yield group(operators, size, "bfloat16", layout)
    for layout in LAYOUTS:
        yield group(operators, size, "float32", layout, _FEW, make=_donated)
    for layout in LAYOUTS:
        for dtype in ("float32", "bfloat16"):
            yield group(operators, large, dtype, layout, _FEW)
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
        if "torch" in sys.modules:  # what it keeps, jax cannot have
            sys.modules["torch"].cuda.empty_cache()
        session.report["seconds"][name] = time.monotonic() - began
        print(f"{name}: {time.monotonic() - began:.1f} s", flush=True)
        session.save()


def card() -> dict[str, str] | None:
    """Returns what the driver says of the first card, None where there is none."""
    fields = ("name", "driver_version", "memory.total")
    try:
        found = subprocess.run(
            ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    first = found.splitlines()[0] if found else ""
    return dict(zip(fields, map(str.strip, first.split(",")), strict=False))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command with the options `argv` and returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.on_gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny, to test the script")
    parser.add_argument("--only", choices=("times", "train"), help="one part alone")
    parser.add_argument(
        "--commit", help="of this code, where git cannot be asked (default: asked)"
    )
    parser.add_argument("--out", type=Path, default=COST / "gpu_times.json")
    options = parser.parse_args(argv)
    # Read when jax first looks for devices. PyTorch needs some of the card, too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.65")
    plan = QUICK if options.quick else FULL
    report: dict[str, Any] = {
        "benchmark": "on_gpu",
        "options": {"quick": options.quick, "only": options.only},
        "plan": plan._asdict() | {"training": plan.training._asdict()},
        **provenance(),
        "card": card(),
        "main": "not donated; what an optimizer keeps is donated",
        **{part: {} for part in ("copy", "operators", "training_step")},
        **{part: {} for part in ("optimizers", "peers", "training", "seconds")},
        "skipped": [],
    }
    if options.commit:
        report["commit"] = {"sha": options.commit, "modified": None}
    report["versions"]["gradsmooth_optax"] = gs.__version__
    options.out.parent.mkdir(parents=True, exist_ok=True)
    session = Session(plan, options.out, report)
    session.save()
    if options.only != "train":
        take_times(session)
    if options.only != "times":
        began = time.monotonic()
        # The times may have taken longer, but a few seeds are always trained.
        most = plan.training.seconds
        seconds = max(0.6 * most, min(most, plan.all_seconds - session.passed()))
        try:
            for result in on_gpu_training.train(plan.training, seconds):
                report["training"] = result
                session.save()
        except Exception as error:  # what was measured before it is kept
            session.skip("training", "all", error)
        report["seconds"]["training"] = time.monotonic() - began
    session.save()
    print(f"\n{tables(report)}\n\nwrote {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
