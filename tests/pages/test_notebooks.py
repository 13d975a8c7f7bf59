"""Every notebook runs from top to bottom and is committed with its outputs."""

import ast
import json
from pathlib import Path

import pytest

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = ["01_quickstart", "02_where_is_depth", "03_operators_and_theory"]
NAMES += ["04_does_it_help", "05_every_layer_by_itself"]


def cells_of(name):
    cells = json.loads((NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_without_a_warning(name, monkeypatch):
    """In this process, where what jax has compiled is there already."""
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pytest.importorskip("flax")
    monkeypatch.chdir(NOTEBOOKS)
    names = {"__name__": "__main__", "display": show}
    with pyplot.rc_context():
        for number, cell in enumerate(cells_of(name)):
            # Magics: of installing, and of showing no output.
            lines = "".join(cell["source"]).splitlines()
            lines = ["pass" if line.startswith("%%") else line for line in lines]
            text = "\n".join(lines).replace("%pip", "pass  #")
            tree, where = ast.parse(text), f"{name}, cell {number}"
            last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, where, "exec"), names)
            if last is not None:
                show(eval(compile(ast.Expression(last.value), where, "eval"), names))
    pyplot.close("all")


def show(value):
    """What Jupyter asks of the last value of a cell."""
    if value is not None:
        assert repr(value)
        getattr(value, "_repr_html_", str)()


def test_notebooks_are_committed_as_they_ran_and_first_install_what_they_need():
    assert sorted(path.stem for path in NOTEBOOKS.glob("*.ipynb")) == NAMES
    for name in NAMES:
        cells = cells_of(name)
        installs = ["%pip install" in "".join(cell["source"]) for cell in cells]
        assert installs == [True, *[False] * (len(cells) - 1)], name
        assert '"gradsmooth_optax[notebooks]"' in "".join(cells[0]["source"]), name
        assert all(cell["execution_count"] for cell in cells), name
        outputs = [output for cell in cells for output in cell["outputs"]]
        assert outputs, name
        assert not [of for of in outputs if of["output_type"] == "error"], name
        assert not [of for of in outputs if of.get("name") == "stderr"], name
