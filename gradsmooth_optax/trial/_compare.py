"""Runs a comparison: what comes next, one run after the other or in processes."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import inspect
import math
import multiprocessing
import numbers
import pickle
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import gradsmooth_optax
from gradsmooth_optax._checks import check_choice, check_flag, shown
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax.trial import _store
from gradsmooth_optax.trial._arms import (
    DEFAULT,
    PLAIN,
    SHUFFLED,
    Arm,
    all_arms,
    arms_of,
    smoothing_of,
    texts_of,
)
from gradsmooth_optax.trial._extra import needs
from gradsmooth_optax.trial._protocol import (
    SCREEN,
    Outcome,
    Run,
    Settings,
    least_runs,
    next_runs,
    thresholds,
    value_of,
)
from gradsmooth_optax.trial._result import Result

Optimizer = Callable[[Any, Any], Any]
_LARGEST_MISMATCH = 10  # times the difference of the first run to its repetition


class many_seeds:
    """Marks a `train(optimizer, seeds) -> array` that trains several seeds at once.

    `compare` then calls it under `jax.jit`, once compiled for each arm: the rates that
    `optimizer` is given are traced, `seeds` is an int32 array, and everything that
    `train` does must be traceable, so loop by `jax.lax.scan`. Seeds that train at once
    share one shuffled order.

    Args:
      train: takes an optimizer and seeds `(n,)`; returns `(n,)` values of the metric,
        or a dict of such.
      at_once: the most seeds of a call, which bounds the memory; where it divides both
        numbers of seeds, an arm is compiled once. None: all seeds of a stage.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax, jax.numpy as jnp
      >>> @gs.trial.many_seeds
      ... def train(optimizer, seeds):
      ...     def one(seed):
      ...         params = {"h": jax.random.normal(jax.random.key(seed), (4, 3))}
      ...         updates, _ = optimizer.update(params, optimizer.init(params))
      ...         return jnp.sum(optax.apply_updates(params, updates)["h"] ** 2)
      ...     return jax.vmap(one)(seeds)
    """

    def __init__(
        self,
        train: Callable[[Any, Any], Any],
        *,
        at_once: int | None = None,
    ):
        if at_once is not None:
            _whole_number("at_once", at_once, 1)
        self.train, self.at_once = train, at_once


def compare(
    train: Callable[..., Any] | many_seeds,
    optimizer: Optimizer,
    depth: DepthLike,
    *,
    rates: Sequence[float],
    seeds: int = 12,
    screen_seeds: int = 4,
    arms: Mapping[str, Any] = DEFAULT,
    block_rates: Sequence[float] = (1.0, 0.5, 0.25),
    metric: str | None = None,
    tune_metric: str | None = None,
    better: str = "lower",
    margin: float | None = None,
    workers: int = 1,
    dry_run: bool = False,
    path: str | Path = "trial.json",
) -> Result:
    """Finds out whether coupling layers helps your own training.

    Every *arm* is one way to treat the updates of the blocks: `plain` (nothing), `base`
    (the blocks have a rate of their own), and for every operator in `arms` the operator
    itself and two *controls*, all with a tuned block rate as the base: *norm-matched*,
    the base's updates at the norms that the operator gives, and *shuffled*, the
    operator over layers in a random order, another for every seed.

    First a *screen* chooses the rates of each arm on `screen_seeds` seeds: the rates
    given, extended by the same factor until the best has worse ones on all sides; the
    choice is the minimum of a parabola through the logarithms. Then all arms run on
    `seeds` others that chose nothing. Coupling of neighbors is credited only if it is
    better than the base, than its norm-matched and than its shuffled control, in
    direct paired contrasts (guide *Does it help?* has the rules and how often they
    err).

    Every finished run is in the file at `path`. The same call goes on after an
    interruption; the first run is done twice, and one once more when going on, to see
    that `train` repeats. Ctrl-C returns what there is.

    Args:
      train: your own training, `train(optimizer, seed)`: seeds parameters and data by
        `seed` and returns the metric of the end on held-out data: a number, or a dict
        of numbers. Or a generator of them, the last being the end: a run of the screen
        may then be stopped where the best one was better at half the progress. Or a
        `many_seeds`.
      optimizer: `optimizer(smoothing, rate)` makes your optimizer, with `smoothing` (an
        optax transformation) behind the preconditioner, before weight decay and
        learning rate. The block rate is inside `smoothing`: decay added after it is
        not scaled.
      depth: where depth is, as in `smooth_over_depth`.
      rates: learning rates to begin with, a few by factors of 2.
      seeds: to confirm with; fewer than 8 give no verdict.
      screen_seeds: to choose rates with.
      arms: {name: operator}.
      block_rates: factors of the blocks' updates to begin with.
      metric: key of the dict that the verdict is about; None for its only one.
      tune_metric: key of the one that rates are chosen by, on other held-out data;
        None for `metric`, and the result says so.
      better: "lower" or "higher".
      margin: a difference that would not matter, in units of the metric; stated before
        the run, it allows the verdict *does the same*.
      workers: processes to run in; each imports your module again, so `train` and
        `optimizer` must be functions of an importable module. All share the devices.
      dry_run: only say how many runs it will be.
      path: of the file. It belongs to these arguments; other ones are refused.

    Returns:
      A `Result`: `print` it.

    Raises:
      TypeError, ValueError: for arguments of the wrong kind; for a `train` that returns
        no number, other keys than before, the same for all seeds, or NaN at all
        `rates`; for a file of other arguments (`OtherSettings`), or one whose stored
        run does not repeat.
      ModuleNotFoundError: without the extra "trial".
      Exception: what the first run raises. Later runs that raise count as diverged,
        and are tried again by the next call.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import jax, optax, tempfile
      >>> def train(optimizer, seed):  # 4 layers that shall become 0
      ...     params = {"h": jax.random.normal(jax.random.key(seed), (4, 3))}
      ...     state = optimizer.init(params)
      ...     for _ in range(3):
      ...         updates, state = optimizer.update(params, state, params)
      ...         params = optax.apply_updates(params, updates)
      ...     return optax.tree.norm(params)
      >>> def optimizer(smoothing, rate):
      ...     return optax.chain(smoothing, optax.scale_by_learning_rate(rate))
      >>> result = gs.trial.compare(
      ...     train, optimizer, gs.scanned("h"), rates=[0.2, 0.4, 0.8],
      ...     arms={"window(0.5)": gs.window(0.5)}, dry_run=True)
      >>> print(result)
      Does coupling layers help? The metric, lower is better; 12 paired seeds.
      Nothing run yet: about 156 runs to choose rates and at most 120 to confirm.
    """
    everything = all_arms(arms)
    settings = _settings(
        depth,
        everything,
        rates,
        seeds,
        screen_seeds,
        block_rates,
        metric,
        tune_metric,
        better,
        margin,
    )
    check_flag("dry_run", dry_run)
    _check_callables(train, optimizer, _whole_number("workers", workers, 1))
    path = Path(path)
    if dry_run:
        return Result(settings, everything, {}, {})
    for module in ("scipy.stats", "tqdm", "filelock"):
        needs(module)
    with _store.locked(path):
        if path.exists():
            saved, outcomes, notes = _store.read(path)
            _store.check_same(path, saved, settings)
        else:
            outcomes, notes = {}, {"sessions": []}
        outcomes = {run: of for run, of in outcomes.items() if of.error is None}
        job = _Job(train, optimizer, as_spec(depth), everything, settings.tuned_by)
        result = Result(settings, everything, outcomes, notes)
        notes["sessions"].append(_session(train, optimizer, len(outcomes)))
        with contextlib.suppress(KeyboardInterrupt):
            for run, outcome in _run_all(job, settings, outcomes, notes, workers, path):
                outcomes[run] = outcome
                _store.write(path, settings, outcomes, notes)
                _check_sense(settings, everything, outcomes)
    return result


def read_result(path: str | Path) -> Result:
    """Reads the result of a comparison, complete or not.

    Args:
      path: of the file that `compare` wrote.

    Returns:
      A `Result`.

    Raises:
      FileNotFoundError: without a file.
      ValueError: for a file of another kind.

    Example:
      >>> import gradsmooth_optax as gs
      >>> import pathlib, tempfile
      >>> def nothing(*_): ...
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "trial.json"
      >>> depth = gs.scanned("blocks/")
      >>> result = gs.trial.compare(
      ...     nothing, nothing, depth, rates=[1e-3], dry_run=True)
      >>> result.to_json(path)
      >>> gs.trial.read_result(path).settings.rates
      (0.001,)
    """
    settings, outcomes, notes = _store.read(Path(path))
    return Result(settings, arms_of(settings.arms), outcomes, notes)


# -- One run ---------------------------------------------------------------------------


class _Job:
    """All that a run needs; it travels to other processes whole."""

    def __init__(
        self,
        train: Any,
        optimizer: Optimizer,
        depth: Any,
        arms: Mapping[str, Arm],
        tuned_by: str | None,
    ):
        self.train, self.optimizer, self.depth = train, optimizer, depth
        self.arms, self.tuned_by = arms, tuned_by

    def built(self, run: Run, rate: Any, block_rate: Any) -> Any:
        arm = self.arms[run.arm]
        return self.optimizer(smoothing_of(arm, self.depth, block_rate, run.seed), rate)

    def __call__(
        self, run: Run, limits: Sequence[float] | None, sign: float
    ) -> Outcome:
        """Trains one seed; raises what `train` raises."""
        began = time.perf_counter()
        returned = self.train(self.built(run, run.rate, run.block_rate), run.seed)
        curve: list[float] = []
        if not inspect.isgenerator(returned):
            metrics = _metrics(returned)
        else:
            metrics = {}
            for yielded in returned:
                metrics = _metrics(yielded)
                value = value_of(Outcome(metrics), self.tuned_by)
                curve.append(value)
                hopeless = (
                    limits is not None
                    and len(curve) < len(limits)
                    and (
                        not math.isfinite(value)
                        or sign * value > limits[len(curve) - 1]
                    )
                )
                if hopeless:
                    returned.close()
                    seconds = time.perf_counter() - began
                    return Outcome({}, tuple(curve), True, None, seconds)
            if not curve:
                raise TypeError(
                    "`train` is a generator that yields nothing. Yield the metric, at "
                    "least at the end."
                )
        return Outcome(metrics, tuple(curve), seconds=time.perf_counter() - began)

    @functools.cache  # noqa: B019
    def program(self, arm: str, order: int) -> Any:
        """The compiled training of an arm, for `many_seeds`."""
        run = Run(SCREEN, arm, 1.0, 1.0, order)

        def trained(rate: Any, block_rate: Any, seeds: Any) -> Any:
            return self.train.train(self.built(run, rate, block_rate), seeds)

        return jax.jit(trained)

    def at_once(self, runs: Sequence[Run]) -> list[Outcome]:
        """Trains all seeds of one arm at one point."""
        began = time.perf_counter()
        first = runs[0]
        order = first.seed if self.arms[first.arm].control == SHUFFLED else 0
        returned = self.program(first.arm, order)(
            jnp.float32(first.rate),
            jnp.float32(first.block_rate),
            jnp.array([run.seed for run in runs], jnp.int32),
        )
        whole = returned if isinstance(returned, Mapping) else {"metric": returned}
        values = {name: np.asarray(of, np.float64) for name, of in whole.items()}
        for name, of in values.items():
            if of.shape != (len(runs),):
                raise TypeError(
                    f"`train` under `many_seeds` must return a value for each of the "
                    f"{len(runs)} seeds, but {name!r} has shape {of.shape}. Return "
                    "`jax.vmap(train_one)(seeds)`."
                )
        seconds = (time.perf_counter() - began) / len(runs)
        return [
            Outcome(
                {name: float(of[k]) for name, of in values.items()}, (), seconds=seconds
            )
            for k in range(len(runs))
        ]


def _metrics(returned: Any) -> dict[str, float]:
    """What a run returned as {name: number}, or an error that says what it was."""
    whole = returned if isinstance(returned, Mapping) else {"metric": returned}
    metrics = {}
    for name, value in whole.items():
        array = np.asarray(value) if isinstance(value, jax.Array) else value
        if isinstance(array, np.ndarray) and array.ndim == 0:
            array = array.item()
        if not isinstance(array, numbers.Real) or isinstance(array, bool):
            where = f" under {name!r}" if isinstance(returned, Mapping) else ""
            hint = " It has no `return`?" if value is None else ""
            raise TypeError(
                f"`train` must return a number, or a dict of numbers, but returned "
                f"{shown(value)} of type {type(value).__name__}{where}.{hint}"
            )
        metrics[str(name)] = float(array)
    if not metrics:
        raise TypeError("`train` returned a dict without numbers.")
    return metrics


# -- All runs --------------------------------------------------------------------------


def _run_all(
    job: _Job,
    settings: Settings,
    outcomes: Mapping[Run, Outcome],
    notes: dict[str, Any],
    workers: int,
    path: Path,
) -> Iterator[tuple[Run, Outcome]]:
    """Yields runs with their outcomes until none is left, as `outcomes` grows."""
    tqdm = needs("tqdm.auto").tqdm
    if not next_runs(settings, job.arms, outcomes):
        return
    if outcomes:
        _check_repeats(job, settings, outcomes, notes, path)
    with (
        tqdm(
            total=_total(settings, job, outcomes), initial=len(outcomes), unit="run"
        ) as bar,
        _mapper(job, workers) as mapped,
    ):
        while pending := next_runs(settings, job.arms, outcomes):
            bar.total = max(
                _total(settings, job, outcomes), len(outcomes) + len(pending)
            )
            fresh = not outcomes
            if workers == 1 or fresh or _many(job):
                # What comes next depends on nothing but what is finished, so that an
                # interruption changes nothing. The first is run alone: to fail early.
                pending = _next_at_once(job, pending) if _many(job) else pending[:1]
            for run, outcome in mapped(pending, settings, outcomes, first=fresh):
                if fresh and "repeat" not in notes:
                    notes["repeat"] = _repetition(job, settings, pending, run, outcome)
                bar.set_description(f"{run.stage} {run.arm} at {run.rate:g}", False)
                bar.update()
                yield run, outcome


def _total(settings: Settings, job: _Job, outcomes: Mapping[Run, Outcome]) -> int:
    return max(sum(least_runs(settings, job.arms)), len(outcomes))


def _many(job: _Job) -> bool:
    return isinstance(job.train, many_seeds)


def _next_at_once(job: _Job, runs: Sequence[Run]) -> list[Run]:
    """The first runs, of those that differ in their seeds alone and train at once."""
    alike = [run for run in runs if run[:-1] == runs[0][:-1]]
    return alike[: job.train.at_once]


@contextlib.contextmanager
def _mapper(job: _Job, workers: int) -> Iterator[Any]:
    """What runs a list of runs and yields each with its outcome once it is finished."""

    def attempt(
        runs: Sequence[Run], call: Callable[[], list[Outcome]], first: bool
    ) -> Iterator[tuple[Run, Outcome]]:
        try:
            yield from zip(runs, call(), strict=True)
        except Exception as error:
            # What is wrong with the first run is wrong with all of them, as is a
            # `train` that returns no numbers.
            if first or isinstance(error, TypeError):
                raise
            text = " ".join(f"{type(error).__name__}: {error}".split())
            yield from ((run, Outcome({}, error=text[:400])) for run in runs)

    def in_turn(
        runs: Sequence[Run], settings: Settings, outcomes: Any, first: bool
    ) -> Iterator[tuple[Run, Outcome]]:
        if _many(job):
            yield from attempt(runs, lambda: job.at_once(runs), first)
            return
        for run in runs:
            limits = thresholds(settings, outcomes, run)
            sign = _sign(settings)
            yield from attempt([run], lambda: [job(run, limits, sign)], first)  # noqa: B023

    if workers == 1 or _many(job):
        yield in_turn
        return

    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:

        def in_processes(
            runs: Sequence[Run], settings: Settings, outcomes: Any, first: bool
        ) -> Iterator[tuple[Run, Outcome]]:
            sign = _sign(settings)
            futures = {
                pool.submit(job, run, thresholds(settings, outcomes, run), sign): run
                for run in runs
            }
            for future in concurrent.futures.as_completed(futures):
                run = futures[future]
                yield from attempt([run], lambda: [future.result()], first)  # noqa: B023

        try:
            yield in_processes
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _sign(settings: Settings) -> float:
    return 1.0 if settings.better == "lower" else -1.0


def _repetition(
    job: _Job, settings: Settings, runs: Sequence[Run], run: Run, outcome: Outcome
) -> dict[str, Any]:
    """The first run once more: how well it repeats."""
    again = job.at_once(runs)[0] if _many(job) else job(run, None, 1.0)
    values = [value_of(of, settings.tuned_by) for of in (outcome, again)]
    return {"run": list(run), "values": values}


def _check_repeats(
    job: _Job,
    settings: Settings,
    outcomes: Mapping[Run, Outcome],
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


def _check_sense(
    settings: Settings, arms: Mapping[str, Arm], outcomes: Mapping[Run, Outcome]
) -> None:
    """Raises for results that no verdict can come from, as soon as they show."""
    *others, latest = outcomes.values()
    for name in (settings.metric, settings.tune_metric):
        _check_key(name, latest)
    if others and latest.metrics:
        earlier = next((of for of in others if of.metrics), latest)
        if earlier.metrics.keys() != latest.metrics.keys():
            raise ValueError(
                f"`train` returned the metrics {sorted(latest.metrics)} now, but "
                f"{sorted(earlier.metrics)} before. Return the same keys every time."
            )
    if settings.metric is None and len(latest.metrics) > 1:
        keys = sorted(latest.metrics)
        raise ValueError(
            f"`train` returns several metrics, {keys}: say which the verdict is about, "
            f"as in `metric={keys[0]!r}`."
        )
    of_plain = [
        (run, of)
        for run, of in outcomes.items()
        if run.arm == PLAIN and run.stage == SCREEN
    ]
    if len(of_plain) != len(settings.rates) * settings.screen_seeds:
        return
    values = {
        run: value_of(of, settings.tuned_by) for run, of in of_plain if not of.stopped
    }
    if not any(map(math.isfinite, values.values())):
        raise ValueError(
            f"`train` returned nothing finite at any of `rates` {settings.rates}, for "
            f"{settings.screen_seeds} seeds each. They are probably too high, or the "
            f"training is broken at the start; begin with lower ones in another `path`."
        )
    for rate in settings.rates:
        at_rate = [value for run, value in values.items() if run.rate == rate]
        if len(at_rate) > 1 and math.isfinite(at_rate[0]) and len(set(at_rate)) == 1:
            raise ValueError(
                f"`train` returned {at_rate[0]:.8g} for all of {len(at_rate)} seeds at "
                f"rate {rate:g}: it seems to ignore `seed`, and then more seeds say "
                "nothing. Seed the parameters and the data by it, as in "
                "`jax.random.key(seed)`."
            )


def _check_key(name: str | None, outcome: Outcome) -> None:
    if name is not None and outcome.metrics and name not in outcome.metrics:
        raise ValueError(
            f"`train` returned no metric {name!r}, but {sorted(outcome.metrics)}. "
            "Return it in a dict, or name another by `metric` or `tune_metric`."
        )


# -- Arguments -------------------------------------------------------------------------


def _settings(
    depth: Any,
    arms: Mapping[str, Arm],
    rates: Any,
    seeds: Any,
    screen_seeds: Any,
    block_rates: Any,
    metric: Any,
    tune_metric: Any,
    better: Any,
    margin: Any,
) -> Settings:
    check_choice("better", better, ("lower", "higher"))
    for name, key in (("metric", metric), ("tune_metric", tune_metric)):
        if key is not None and not isinstance(key, str):
            raise TypeError(f"`{name}` must be a name or None, but is {shown(key)}.")
    if tune_metric is not None and metric is None:
        raise ValueError(
            "`tune_metric` is given and `metric` is not. Name both: "
            f"`metric='test', tune_metric={tune_metric!r}`."
        )
    if margin is not None:
        (margin,) = _positive("margin", [margin])
    return Settings(
        rates=_positive("rates", rates),
        block_rates=_positive("block_rates", block_rates),
        seeds=_whole_number("seeds", seeds, 2),
        screen_seeds=_whole_number("screen_seeds", screen_seeds, 1),
        arms=texts_of(arms),
        metric=metric,
        tune_metric=tune_metric,
        better=better,
        margin=margin,
        depth=repr(as_spec(depth)),
    )


def _positive(name: str, values: Any) -> tuple[float, ...]:
    try:
        found = sorted({float(value) for value in values})
    except (TypeError, ValueError):
        found = []
    if not found or not all(0 < value < math.inf for value in found):
        raise ValueError(
            f"`{name}` must be finite numbers above 0, but is {shown(values)}. Write "
            + {
                "margin": "`margin=0.01`.",
                "rates": "`rates=[1e-3, 2e-3, 4e-3]`.",
                "block_rates": "`block_rates=(1.0, 0.5, 0.25)`.",
            }[name]
        )
    return tuple(found)


def _whole_number(name: str, value: Any, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
            f"`{name}` must be a whole number from {least}, but is {shown(value)}."
        )
    return value


def _check_callables(train: Any, optimizer: Any, workers: int) -> None:
    for name, value in (("train", train), ("optimizer", optimizer)):
        if not callable(value) and not isinstance(value, many_seeds):
            raise TypeError(
                f"`{name}` must be a function, but is {shown(value)} of type "
                f"{type(value).__name__}."
            )
    if workers > 1 and not isinstance(train, many_seeds):
        try:
            pickle.dumps((train, optimizer))
        except Exception as error:
            raise ValueError(
                f"`workers={workers}` runs in other processes, to which `train` and "
                f"`optimizer` cannot be sent: {error}. Define both at the top of a "
                "module, or write `workers=1`."
            ) from None


def _session(train: Any, optimizer: Any, finished: int) -> dict[str, Any]:
    """Where a part of the runs was made."""
    train = train.train if isinstance(train, many_seeds) else train
    names = [
        f"{getattr(f, '__module__', '?')}.{getattr(f, '__qualname__', shown(f))}"
        for f in (train, optimizer)
    ]
    return {
        "finished_before": finished,
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "train": names[0],
        "optimizer": names[1],
        "device": jax.devices()[0].device_kind,
        "versions": {
            "python": platform.python_version(),
            "jax": jax.__version__,
            "optax": optax.__version__,
            "gradsmooth_optax": gradsmooth_optax.__version__,
        },
    }
