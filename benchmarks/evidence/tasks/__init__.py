"""The tasks by name: each module makes its `Task` from options by `build`."""

from benchmarks.evidence.tasks import lm, reverse

TASKS = {"lm": lm, "reverse": reverse}
