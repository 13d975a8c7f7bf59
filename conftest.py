import importlib.util
import os
from pathlib import Path

os.environ.setdefault("MPLBACKEND", "agg")  # figures are drawn, never shown

# The doctests of what an extra is needed for.
collect_ignore = []
if importlib.util.find_spec("matplotlib") is None:
    package = Path(__file__).parent / "gradsmooth_optax"
    collect_ignore += [str(path) for path in (package / "plots").glob("_*.py")]
