"""The tasks by name; the other modules here are what they are made of."""

from benchmarks.evidence.tasks import diffusion, lm, reverse, rl, vit

TASKS = {"lm": lm, "reverse": reverse, "vit": vit, "diffusion": diffusion, "rl": rl}
