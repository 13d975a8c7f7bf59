"""What is timed and how: cases in turns, and the report that grows with them."""

import functools
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax

from benchmarks.cost.cpu.timing import in_turns, summary, temporaries
from benchmarks.json_files import write_json
from benchmarks.on_gpu import training


class Plan(NamedTuple):
    """Sizes of a run."""

    megabytes: tuple[float, ...]  # what takes long is timed at the first size alone
    layers: int
    rounds: int
    calls: int  # in one turn, so that a launch is hidden behind the last one
    compile_seconds: float  # most of a group: autotuning must leave time to others
    seconds: float  # after which no group of times begins
    all_seconds: float  # that both parts should take
    only: tuple[str, ...] | None  # operators that are timed; None for all
    training: training.Plan


class Case(NamedTuple):
    """What is timed: `function(carry, *fixed)` returns the next carry and an output.

    The carry is donated, and so has to be the case's own.
    """

    function: Callable[..., tuple[Any, Any]]
    carry: Any
    fixed: tuple = ()


def applied(function: Callable, updates: Any) -> Case:
    """Returns a function of updates as a case, which are not donated."""
    return Case(lambda carry, u: (carry, function(u)), (), (updates,))


class Session:
    """A report that grows, its file `out`, and the time that is left for it."""

    def __init__(self, plan: Plan, out: Path, report: dict[str, Any]):
        self.plan, self.out, self.report = plan, out, report
        self.began = time.monotonic()

    def passed(self) -> float:
        """Returns the seconds since the start."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Returns the seconds in which a group of times may still begin."""
        return self.plan.seconds - self.passed()

    def skip(self, group: str, case: str, why: object) -> None:
        """Records what was not measured, and why."""
        text = " ".join(str(why).split())[:120] or type(why).__name__
        print(f"  {group}: {case}: skipped, {text}", flush=True)
        self.report["skipped"].append({"group": group, "case": case, "why": text})

    def save(self) -> None:
        """Writes the report, and never half of it, whenever the process is ended."""
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
        others: Mapping[str, Callable[[int], None]] | None = None,
        calls: int | None = None,
    ) -> dict[str, Any]:
        """Returns the times of all cases, which take turns, and prints them.

        Args:
          group: name for people.
          cases: what to compile and time.
          base: the case that ratios are to.
          copy_ms: the time of a copy of as many bytes, where that is the limit.
          others: what is not jax's: functions that call so often, and then wait.
          calls: in one turn, if not as planned.
        """
        calls = calls or self.plan.calls
        executables = self._compiled(group, cases)
        turns = {
            name: _turn(run, cases[name], calls) for name, run in executables.items()
        }
        turns |= {
            name: functools.partial(repeated, calls)
            for name, repeated in (others or {}).items()
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
        waiting, of_function, found = {}, {}, {}
        until = self.passed() + min(self.plan.compile_seconds, self.left())
        with ThreadPoolExecutor(8) as pool:
            for name, case in cases.items():
                try:
                    if case.function not in of_function:
                        jitted = jax.jit(case.function, donate_argnums=0)
                        lowered = jitted.lower(case.carry, *case.fixed)
                        of_function[case.function] = pool.submit(lowered.compile)
                    waiting[name] = of_function[case.function]
                except Exception as error:
                    self.skip(group, name, error)
            for name, future in waiting.items():
                try:
                    found[name] = future.result(max(0.5, until - self.passed()))
                except Exception as error:
                    future.cancel()
                    self.skip(group, name, str(error) or "not compiled in time")
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
