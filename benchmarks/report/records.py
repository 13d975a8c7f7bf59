"""Result files read into records whose metric is lower where it is better.

They are of the commits that their own headers name, from before `benchmarks.evidence`
used `gradsmooth_optax.trial`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.json_files import COST, TRIALS

# The paper's regimes in its order, then the one replication.
_TASKS = ("lm", "vit", "diffusion", "rl", "reverse")


class Metric(NamedTuple):
    """What is compared.

    Attributes:
      name: such as "validation loss".
      unit: such as "nats/byte", or "".
      sign: 1 where lower is better, -1 where higher is. `Arm.losses` is the metric
        times the sign, and what is shown is the loss times the sign.
    """

    name: str
    unit: str
    sign: int


class Kind(NamedTuple):
    """What an arm does to the updates, at whatever learning rate."""

    name: str
    operator: str
    alpha: float
    variant: str
    scope: str
    control: str | None


class Arm(NamedTuple):
    """One kind at one learning rate.

    Attributes:
      kind: what it does.
      learning_rate: its rate.
      seeds: the seeds it ran with.
      losses: one per seed, lower is better; NaN where the run diverged.
      others: the same by other metrics, {name: losses}.
      before: {name of a metric: its mean before training, None if not finite}, of a
        base; else empty.
      mechanism: quantity, such as "roughness, after", to its values over training,
        with "steps" among them; empty if nothing was recorded.
    """

    kind: Kind
    learning_rate: float
    seeds: tuple[int, ...]
    losses: np.ndarray
    others: Mapping[str, np.ndarray]
    before: Mapping[str, float | None]
    mechanism: Mapping[str, np.ndarray]


class Setting(NamedTuple):
    """One model trained by one optimizer: what a verdict is about.

    Arms are tuned and judged by `metric`; `others` are measured of the same arms.
    """

    task: str
    optimizer: str
    preset: str
    layers: int
    metric: Metric
    others: tuple[Metric, ...]
    screen: tuple[Arm, ...]
    confirm: tuple[Arm, ...]

    @property
    def is_of_parts(self) -> bool:
        """Whether its arms couple a part each; then there are no controls."""
        return self.preset == "parts"


class Source(NamedTuple):
    """A result file: its settings, shallow to deep, and where its numbers come from."""

    stem: str
    settings: tuple[Setting, ...]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    sittings: tuple[Mapping[str, Any], ...]
    machine: Mapping[str, Any]


def read_sources(results: Path) -> list[Source]:
    """Reads all `<task>/*.json` below `results`, full runs before other presets."""
    sources = [
        read_source(path)
        for path in results.glob("*/*.json")
        if path.parent.name not in (COST.name, TRIALS.name)
    ]
    return sorted(sources, key=_place)


def read_source(path: Path) -> Source:
    """Reads one result file.

    Raises:
      ValueError: if two arms of one stage and depth are the same.
    """
    value = json.loads(path.read_text("utf-8"))
    # Depths that a run has not come to yet are settings too, unfinished ones.
    depths = sorted({*value["config"]["depths"], *(a["layers"] for a in value["arms"])})
    try:
        settings = tuple(_setting(value, layers) for layers in depths)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Source(
        stem=f"{path.parent.name}-{path.stem}",
        settings=settings,
        config=value["config"],
        versions=value["versions"],
        sittings=tuple(value["sittings"]),
        machine=value["machine"],
    )


def _place(source: Source) -> tuple[Any, ...]:
    first = source.settings[0]
    known = _TASKS.index(first.task) if first.task in _TASKS else len(_TASKS)
    return known, first.task, first.optimizer, first.preset != "full", source.stem


def _setting(value: Mapping[str, Any], layers: int) -> Setting:
    metric = _metric(value["metric"])
    # Files of tasks that have one metric may leave out that there is no other.
    others = tuple(map(_metric, value.get("other_metrics", ())))

    def stage(name: str) -> tuple[Arm, ...]:
        arms = [
            _arm(arm, metric, others)
            for arm in value["arms"]
            if arm["layers"] == layers and arm["stage"] == name
        ]
        seen = set()
        for arm in arms:
            if (arm.kind, arm.learning_rate) in seen:
                raise ValueError(
                    f"{arm.kind.name} at {arm.learning_rate} is there twice in the "
                    f"{name} stage of {layers} layers"
                )
            seen.add((arm.kind, arm.learning_rate))
        return tuple(arms)

    return Setting(
        value["task"],
        value["optimizer"],
        value["preset"],
        layers,
        metric,
        others,
        stage("screen"),
        stage("confirm"),
    )


def _metric(value: Mapping[str, Any]) -> Metric:
    sign = 1 if value["lower_is_better"] else -1
    return Metric(value["name"], value["unit"], sign)


def _arm(value: Mapping[str, Any], metric: Metric, others: Sequence[Metric]) -> Arm:
    def losses(of: Sequence[float | None], sign: int) -> np.ndarray:
        found = sign * np.array(of, float)
        found[np.array(value["diverged"], bool) | ~np.isfinite(found)] = np.nan
        return found

    return Arm(
        Kind(*(value[field] for field in Kind._fields)),
        value["learning_rate"],
        tuple(value["seeds"]),
        losses(value["metric_per_seed"], metric.sign),
        {
            other.name: losses(value["other_metrics_per_seed"][other.name], other.sign)
            for other in others
        },
        value.get("metrics_before", {}),
        _mechanism(value.get("mechanism") or {}),
    )


def _mechanism(value: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Before and after become quantities of their own."""
    flat = {}
    for name, series in value.items():
        if isinstance(series, Mapping):
            flat |= {f"{name}, {moment}": of for moment, of in series.items()}
        else:
            flat[name] = series
    return {name: np.array(of, float) for name, of in flat.items() if of is not None}
