"""The tasks by name."""

from benchmarks.evidence.tasks import diffusion, lm, reverse, rl, vit

TASKS = {"lm": lm, "reverse": reverse, "vit": vit, "diffusion": diffusion, "rl": rl}
