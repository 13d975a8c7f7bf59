"""A comparison from its arguments to its result."""

from __future__ import annotations

import contextlib
import pickle
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax

import gradsmooth_optax
from gradsmooth_optax._checks import check_flag, shown
from gradsmooth_optax._depth.specs import DepthLike, as_spec
from gradsmooth_optax._extras import needs
from gradsmooth_optax.trial import _store
from gradsmooth_optax.trial._arguments import settings_of, whole_number
from gradsmooth_optax.trial._arms import DEFAULT, all_arms, arms_of
from gradsmooth_optax.trial._job import Job, Optimizer, many_seeds
from gradsmooth_optax.trial._protocol import Outcome, Run, Settings
from gradsmooth_optax.trial._result import Result
from gradsmooth_optax.trial._running import run_all
from gradsmooth_optax.trial._sense import check_sense


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
    direct paired contrasts (the guide *Does it help on my model?* has the rules and how
    often they err).

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
      Exception: what the first run of an arm raises. Later runs that raise count as
        diverged, and are tried again by the next call.

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
      Nothing run yet: at least about 224 runs to choose rates, at most 120 to confirm.
    """
    everything = all_arms(arms)
    settings = settings_of(
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
    _check_callables(train, optimizer, whole_number("workers", workers, 1))
    path = Path(path)
    if dry_run:
        return Result(settings, everything, *_stored(path, settings))
    for module in ("scipy.stats", "tqdm", "filelock"):
        needs(module, "trial", "trial.compare")
    with _store.locked(path):
        outcomes, notes = _stored(path, settings)
        outcomes = {run: of for run, of in outcomes.items() if of.error is None}
        job = Job(train, optimizer, as_spec(depth), everything, settings.tuned_by)
        result = Result(settings, everything, outcomes, notes)
        notes["sessions"].append(_session(train, optimizer, len(outcomes)))
        with contextlib.suppress(KeyboardInterrupt):
            for run, outcome in run_all(job, settings, outcomes, notes, workers, path):
                outcomes[run] = outcome
                _store.write(path, settings, outcomes, notes)
                check_sense(settings, everything, outcomes)
    return result


def _stored(path: Path, settings: Settings) -> tuple[dict[Run, Outcome], dict]:
    """What a file holds already, of these settings."""
    if not path.exists():
        return {}, {"sessions": []}
    saved, outcomes, notes = _store.read(path)
    _store.check_same(path, saved, settings)
    return outcomes, notes


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
