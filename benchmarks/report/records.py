"""Result files read into records whose metric is lower where it is better."""

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

    @property
    def label(self) -> str:
        """Such as `validation loss (nats/byte)`."""
        return f"{self.name} ({self.unit})" if self.unit else self.name

    @property
    def better(self) -> str:
        """The direction in which it is better."""
        return "lower is better" if self.sign > 0 else "higher is better"

    @property
    def text(self) -> str:
        """Name, unit and direction."""
        return f"{self.label}, {self.better}"


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
      losses: one per seed, lower is better.
      others: the same by other metrics, {name: losses}.
      before: {name of a metric: its mean before training}, of a base; else empty.
      mechanism: quantity, such as "roughness, after", to its values over training,
        with "steps" among them.
    """

    kind: Kind
    learning_rate: float
    seeds: tuple[int, ...]
    losses: np.ndarray
    others: Mapping[str, np.ndarray]
    before: Mapping[str, float]
    mechanism: Mapping[str, np.ndarray]

    @property
    def level(self) -> float:
        """The mean loss."""
        return float(np.mean(self.losses))


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

    @property
    def run(self) -> str:
        """The name of its file, such as `lm, adamw`."""
        preset = "" if self.preset == "full" else f", {self.preset}"
        return f"{self.task}, {self.optimizer}{preset}"

    @property
    def name(self) -> str:
        """Such as `lm, adamw, 12 layers`."""
        return f"{self.run}, {self.layers} layers"


class Source(NamedTuple):
    """A result file: its settings, shallow to deep, and where its numbers come from."""

    stem: str
    settings: tuple[Setting, ...]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    sittings: Sequence[Mapping[str, Any]]
    machine: Mapping[str, Any]


def read_sources(results: Path) -> list[Source]:
    """Reads all `<task>/*.json` below `results`, full runs before other presets."""

    def place(source: Source) -> tuple[Any, ...]:
        first = source.settings[0]
        return _TASKS.index(first.task), first.optimizer, first.preset != "full"

    found = (
        _read(path)
        for path in results.glob("*/*.json")
        if path.parent.name not in (COST.name, TRIALS.name)
    )
    return sorted(found, key=place)


def _read(path: Path) -> Source:
    value = json.loads(path.read_text("utf-8"))
    return Source(
        f"{path.parent.name}-{path.stem}",
        tuple(_setting(value, layers) for layers in sorted(value["config"]["depths"])),
        *(value[key] for key in ("config", "versions", "sittings", "machine")),
    )


def _setting(value: Mapping[str, Any], layers: int) -> Setting:
    # Files of tasks that have one metric do not say that there is no other.
    metric, *others = (
        Metric(of["name"], of["unit"], 1 if of["lower_is_better"] else -1)
        for of in (value["metric"], *value.get("other_metrics", ()))
    )
    screen, confirm = (
        tuple(
            _arm(of, metric, others)
            for of in value["arms"]
            if (of["layers"], of["stage"]) == (layers, stage)
        )
        for stage in ("screen", "confirm")
    )
    return Setting(
        *(value["task"], value["optimizer"], value["preset"], layers),
        *(metric, tuple(others), screen, confirm),
    )


def _arm(value: Mapping[str, Any], metric: Metric, others: Sequence[Metric]) -> Arm:
    # Before and after smoothing become quantities of their own.
    mechanism = {}
    for name, of in value["mechanism"].items():
        parts = {f"{name}, {at}": x for at, x in of.items()} if "after" in of else {}
        mechanism |= parts or {name: of}
    return Arm(
        Kind(*(value[field] for field in Kind._fields)),
        value["learning_rate"],
        tuple(value["seeds"]),
        metric.sign * np.array(value["metric_per_seed"], float),
        {
            of.name: of.sign * np.array(value["other_metrics_per_seed"][of.name])
            for of in others
        },
        value.get("metrics_before", {}),
        {name: np.array(of, float) for name, of in mechanism.items()},
    )
