"""The tasks by name."""

from benchmarks.evidence.tasks import lm, reverse

TASKS = {"lm": lm, "reverse": reverse}
