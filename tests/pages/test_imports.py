"""Data flows one way, and so do imports."""

import ast
import graphlib
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "gradsmooth_optax"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
# Each imports from its own row and from those above.
ROWS = [
    {"_checks.py", "_arrays.py", "_calls.py", "_extras.py"},
    {"_depth", "layouts.py"},
    {"_coupling"},
    {"_operators", "controls.py"},
    {"_transforms"},
    {"contrib"},
    {"diagnostics"},
    {"plots"},
    {"trial"},
    {"__init__.py"},
]
ROW_OF = {name: row for row, names in enumerate(ROWS) for name in names}


def imported(file):
    """The files of the package that one of them imports."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            package, *parts = node.module.split(".")
            if package == PACKAGE.name:
                for alias in node.names:
                    yield file_of([*parts, alias.name]) or file_of(parts)


def file_of(parts):
    path = Path(*parts)
    found = (
        path.with_suffix(".py") if parts else Path("__init__.py"),
        path / "__init__.py",
    )
    return next((file for file in found if (PACKAGE / file).is_file()), None)


def test_no_file_imports_from_a_later_row_and_no_imports_run_in_a_circle():
    graph = {file: set(imported(file)) for file in FILES}
    late = [
        f"{file} imports {other}"
        for file, others in graph.items()
        for other in others
        if ROW_OF[other.parts[0]] > ROW_OF[file.parts[0]]
    ]
    assert late == []
    graphlib.TopologicalSorter(graph).prepare()
