"""All runs: what comes next, one after the other or in processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradsmooth_optax._extras import needs
from gradsmooth_optax.trial._job import Job, many_seeds
from gradsmooth_optax.trial._protocol import (
    CONFIRM,
    Outcome,
    Outcomes,
    Run,
    Settings,
    next_runs,
    thresholds,
    usual_runs,
    value_of,
)

_LARGEST_MISMATCH = 10  # times the difference of the first run to its repetition


def run_all(
    job: Job,
    settings: Settings,
    outcomes: Outcomes,
    notes: dict[str, Any],
    workers: int,
    path: Path,
) -> Iterator[tuple[Run, Outcome]]:
    """Yields runs with their outcomes until none is left, as `outcomes` grows."""
    tqdm = needs("tqdm.auto", "trial", "trial.compare").tqdm
    if not next_runs(settings, job.arms, outcomes):
        return
    if outcomes:
        _check_repeats(job, settings, outcomes, notes, path)
    with (
        tqdm(
            total=_total(settings, job, outcomes, []),
            initial=len(outcomes),
            unit="run",
        ) as bar,
        _mapper(job, workers) as mapped,
    ):
        while pending := next_runs(settings, job.arms, outcomes):
            bar.total = _total(settings, job, outcomes, pending)
            fresh = not outcomes
            if workers == 1 or fresh or _many(job):
                # What comes next depends on nothing but what is finished, so that an
                # interruption changes nothing. The first is run alone: to fail early.
                pending = _next_at_once(job, pending) if _many(job) else pending[:1]
            bar.set_description(_about(pending[0]))  # what is compiled and run now
            for run, outcome in mapped(pending, settings, outcomes):
                if fresh and "repeat" not in notes:
                    notes["repeat"] = _repetition(job, settings, pending, run, outcome)
                bar.update()
                yield run, outcome


def _total(
    settings: Settings, job: Job, outcomes: Outcomes, pending: Sequence[Run]
) -> int:
    """How many runs it will be, about; of a confirmation exactly."""
    done = len(outcomes) + len(pending)
    if pending and pending[0].stage == CONFIRM:
        return done
    screen, confirm = usual_runs(settings, job.arms)
    return max(screen, done) + confirm


def _about(run: Run) -> str:
    return f"{run.stage} {run.arm} at {run.rate:.3g}"


def _many(job: Job) -> bool:
    return isinstance(job.train, many_seeds)


def _next_at_once(job: Job, runs: Sequence[Run]) -> list[Run]:
    """The first runs, of those that differ in their seeds alone and train at once."""
    alike = [run for run in runs if run[:-1] == runs[0][:-1]]
    return alike[: job.train.at_once]


@contextlib.contextmanager
def _mapper(job: Job, workers: int) -> Iterator[Any]:
    """What runs a list of runs and yields each with its outcome once it is finished."""

    def attempt(
        runs: Sequence[Run], call: Callable[[], list[Outcome]], outcomes: Outcomes
    ) -> Iterator[tuple[Run, Outcome]]:
        try:
            yield from zip(runs, call(), strict=True)
        except Exception as error:
            # What is wrong with the first run of an arm is wrong with all of them, as
            # is a `train` that returns no numbers.
            known = {run.arm for run, of in outcomes.items() if of.error is None}
            if runs[0].arm not in known or isinstance(error, TypeError):
                raise
            text = " ".join(f"{type(error).__name__}: {error}".split())
            yield from ((run, Outcome({}, error=text[:400])) for run in runs)

    def in_turn(
        runs: Sequence[Run], settings: Settings, outcomes: Outcomes
    ) -> Iterator[tuple[Run, Outcome]]:
        if _many(job):
            yield from attempt(runs, lambda: job.at_once(runs), outcomes)
            return
        for run in runs:
            limits = thresholds(settings, outcomes, run)
            alone = functools.partial(_alone, job, run, limits, _sign(settings))
            yield from attempt([run], alone, outcomes)

    if workers == 1 or _many(job):
        yield in_turn
        return

    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:

        def in_processes(
            runs: Sequence[Run], settings: Settings, outcomes: Outcomes
        ) -> Iterator[tuple[Run, Outcome]]:
            sign = _sign(settings)
            futures = {
                pool.submit(job, run, thresholds(settings, outcomes, run), sign): run
                for run in runs
            }
            for future in concurrent.futures.as_completed(futures):
                run = futures[future]
                alone = functools.partial(_alone, future.result)
                yield from attempt([run], alone, outcomes)

        try:
            yield in_processes
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _alone(call: Callable[..., Outcome], *arguments: Any) -> list[Outcome]:
    return [call(*arguments)]


def _sign(settings: Settings) -> float:
    return 1.0 if settings.better == "lower" else -1.0


def _repetition(
    job: Job, settings: Settings, runs: Sequence[Run], run: Run, outcome: Outcome
) -> dict[str, Any]:
    """The first run once more: how well it repeats."""
    again = job.at_once(runs)[0] if _many(job) else job(run, None, 1.0)
    values = [value_of(of, settings.tuned_by) for of in (outcome, again)]
    return {"run": list(run), "values": values}


def _check_repeats(
    job: Job,
    settings: Settings,
    outcomes: Outcomes,
    notes: Mapping[str, Any],
    path: Path,
) -> None:
    """Runs a stored run again, and raises where it is not what it was."""
    run = Run(*notes["repeat"]["run"])
    alike = [other for other in outcomes if other[:-1] == run[:-1]]
    alike = alike[: job.train.at_once] if _many(job) else alike
    again = job.at_once(alike)[alike.index(run)] if _many(job) else job(run, None, 1.0)
    before = value_of(outcomes[run], settings.tuned_by)
    now = value_of(again, settings.tuned_by)
    first, second = map(float, notes["repeat"]["values"])
    allowed = _LARGEST_MISMATCH * abs(first - second) + 1e-6 * abs(before)
    if math.isfinite(before) and not abs(now - before) <= allowed:
        raise ValueError(
            f"`path` {str(path)!r} holds {before:.8g} for seed {run.seed} of "
            f"{run.arm!r} at rate {run.rate:g}, but the same run now gives {now:.8g} "
            f"(it repeated within {abs(first - second):.2g} before). Probably `train`, "
            "the data, a version or the machine has changed, and new runs would be "
            "compared with old ones of another experiment. Go on with what it was, or "
            "write `path='another.json'`."
        )
