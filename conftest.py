import importlib.util
import os

os.environ.setdefault("MPLBACKEND", "agg")  # figures are drawn, never shown

# The doctests of what an extra is needed for.
collect_ignore = []
if importlib.util.find_spec("matplotlib") is None:
    collect_ignore.append("gradsmooth_optax/plots.py")
