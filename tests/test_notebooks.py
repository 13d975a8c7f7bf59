"""Every notebook runs from top to bottom and is committed with its outputs."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

NAMES = ["01_quickstart", "02_where_is_depth", "03_operators_and_theory"]
NAMES += ["04_reading_the_evidence", "05_every_layer_by_itself"]
NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))


every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_the_notebooks_are_these():
    assert [path.stem for path in NOTEBOOKS] == NAMES


@every_notebook
def test_a_notebook_begins_with_the_one_cell_that_installs_what_it_needs(path):
    cells = nbformat.read(path, as_version=4).cells
    installs = ["%pip install" in cell.source for cell in cells]
    first_code = [cell.cell_type for cell in cells].index("code")
    assert [i for i, found in enumerate(installs) if found] == [first_code]
    assert '"gradsmooth_optax[notebooks]"' in cells[first_code].source


@every_notebook
# The kernel's own machinery warns, depending on the versions of tornado and zmq.
@pytest.mark.filterwarnings("default")
def test_a_notebook_runs_and_was_committed_with_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert any(cell.outputs for cell in cells)
    assert all(cell.execution_count for cell in cells)
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert not [o for o in outputs if o.get("name") == "stderr"]
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3")
    client.execute(cwd=str(path.parent))
