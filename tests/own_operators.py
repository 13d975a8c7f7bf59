"""Operators as a user would write them, for tests of several kinds."""

import dataclasses
from typing import Any

import numpy as np
import optax

import gradsmooth_optax as gs


@dataclasses.dataclass(frozen=True, eq=False)
class TowardsMean(gs.Operator):
    """By a matrix: towards the mean of the run."""

    weight: Any
    strengths = ("weight",)

    def matrix(self, num_layers):
        eye, mean = np.eye(num_layers), np.full((num_layers,) * 2, 1 / num_layers)
        return eye + self.weight * (mean - eye)


@dataclasses.dataclass(frozen=True, eq=False)
class AlikeWindow(gs.Operator):
    """The window, between layers whose norms differ by at most a factor."""

    alpha: optax.ScalarOrSchedule
    factor: float = 2.0
    strengths = ("alpha",)

    def couple(self, layers):
        norms, out = layers.norms("block"), layers
        for offset in (-1, 1):
            theirs = norms.shifted(offset)
            alike = (norms <= self.factor * theirs) * (theirs <= self.factor * norms)
            difference = layers.difference(offset)
            out = out + difference.scaled(self.alpha / 2 * alike)
        return out

    def radius(self, num_layers):
        return 1
