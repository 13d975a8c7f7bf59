"""What is published with a version, and what a contributor is told, is true."""

import ast
import datetime
import doctest
import graphlib
import inspect
import itertools
import pickle
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import stacks

import gradsmooth_optax as gs
from gradsmooth_optax import layouts
from gradsmooth_optax._depth import specs

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gradsmooth_optax"
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CITATION = (ROOT / "CITATION.cff").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# All files of the package but its table of contents, as `_depth/paths.py`.
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
FILES.remove("__init__.py")


# The version.


def releases():
    return re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\S+)$", CHANGELOG, re.MULTILINE)


def citation(key):
    found = re.search(rf"^{key}: (.*)$", CITATION, re.MULTILINE)
    return found and found[1]


def test_the_version_is_the_changelogs_newest_and_the_one_to_cite():
    (newest, day), *_ = releases()
    assert gs.__version__ == newest == citation("version")
    # A version that is not out has no day, here and there.
    assert citation("date-released") == (None if day == "unreleased" else day)


def test_releases_are_listed_newest_first_with_their_days():
    versions = [tuple(map(int, version.split("."))) for version, _ in releases()]
    assert versions == sorted(set(versions), reverse=True)
    days = [day for _, day in releases()]
    assert "unreleased" not in days[1:]
    dated = [datetime.date.fromisoformat(day) for day in days if day != "unreleased"]
    assert dated == sorted(dated, reverse=True)


def test_what_is_cited_is_this_package_under_its_license_and_the_paper():
    assert citation("license") == PROJECT["license"]
    assert f"- name: {PROJECT['authors'][0]['name']}\n" in CITATION
    assert "arXiv:2606.30813" in CITATION
    assert PROJECT["name"] in citation("title")
    keywords = re.search(r"^keywords:\n((?:  - .*\n)+)", CITATION, re.MULTILINE)[1]
    assert [line[4:] for line in keywords.splitlines()] == PROJECT["keywords"]


def test_every_public_module_and_name_is_in_the_changelog_and_no_other():
    # But for what is said to be gone.
    told = re.sub(r"^\| gone \|.*?\n\n", "", CHANGELOG, flags=re.M | re.DOTALL)
    named = set(re.findall(r"`gs\.(\w+)`", told))
    modules = {re.split(r"[/.]", file)[0] for file in FILES}
    public = {module for module in modules if not module.startswith("_")}
    assert public <= named
    functions = {
        name
        for name, value in vars(gs).items()
        if not name.startswith("_") and inspect.isfunction(value)
    }
    assert functions <= named
    assert {name for name in named if not hasattr(gs, name)} <= public


def test_what_is_said_to_be_gone_is_gone_and_the_calls_instead_can_be_made():
    table = re.search(r"^\| gone \|.*?\n\n", CHANGELOG, re.M | re.DOTALL)[0]
    names = {"gs": gs, "optax": optax, "depth": gs.scanned("blocks/"), "radius": 1}
    names |= {"alpha": 0.2, "lr": 1e-3, "inner": optax.scale_by_adam()}
    names |= {"operator": gs.window(0.2), "function": np.eye}
    call = re.compile(r"`((?:gs|optax)\.[\w.]+\(.*?\))`")
    rows = re.findall(r"^\| (.*) \| (.*) \|$", table, re.MULTILINE)[2:]
    assert len(rows) >= 10
    for gone, instead in rows:
        for name in re.findall(r"`gs\.(\w+)`", gone):
            assert not hasattr(gs, name)
        for old in call.findall(gone):
            with pytest.raises((AttributeError, TypeError)):
                eval(old.replace(", variant=...", ""), dict(names))
        for new in call.findall(instead):
            eval(new.replace("variant=...", "variant='directional'"), dict(names))
        for name in re.findall(r"`gs\.([\w.]+)`", instead):
            assert eval(f"gs.{name}", names)


def test_every_python_that_is_classified_may_install_it():
    found = {
        tuple(map(int, classifier.rpartition(" ")[2].split(".")))
        for classifier in PROJECT["classifiers"]
        if re.search(r"Python :: \d\.\d+$", classifier)
    }
    assert PROJECT["requires-python"] == ">={}.{}".format(*min(found))


# The workflows.


def commands_of(path):
    """Every command of a workflow, with the values of its matrix filled in."""
    yaml = pytest.importorskip("yaml")
    for job in yaml.safe_load(path.read_text())["jobs"].values():
        cells = job.get("strategy", {}).get("matrix", {}).get("include", [{}])
        for cell, step in itertools.product(cells, job.get("steps", [])):
            yield re.sub(
                r"\$\{\{ matrix\.([\w-]+) \}\}",
                lambda at, cell=cell: str(cell[at[1]]),
                step.get("run", ""),
            )


def test_there_are_workflows_for_changes_and_for_releases():
    assert [path.stem for path in WORKFLOWS] == ["ci", "release"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_may_read_only_and_end_in_time(path):
    yaml = pytest.importorskip("yaml")
    workflow = yaml.safe_load(path.read_text())
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    for name, job in workflow["jobs"].items():
        if job.get("uses"):  # another workflow
            assert (ROOT / job["uses"]).is_file()
            continue
        assert job["timeout-minutes"] <= 60, name
        # To say who it is, to PyPI.
        wanted = {"id-token": "write"} if name == "publish" else None
        assert job.get("permissions") == wanted
        for step in job["steps"]:
            if "uses" in step:
                version = r"(v\d+|release/v\d+|[0-9a-f]{40})"
                assert re.fullmatch(rf"[\w/-]+@{version}", step["uses"])


def test_nothing_is_published_before_all_checks_pass():
    yaml = pytest.importorskip("yaml")
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    jobs = yaml.safe_load(text)["jobs"]
    assert set(jobs["publish"]["needs"]) == {"ci", "build"}
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"


def check_that_what_it_calls_is_here(command):
    """Extras, scripts, modules and files that a command names."""
    extras = {
        extra
        for found in re.findall(r"\.\[([\w,-]+)\]", command)
        for extra in found.split(",")
    }
    assert extras <= PROJECT["optional-dependencies"].keys(), command
    for script in re.findall(r"(?<![\w/])\.ci/[\w.]+", command):
        assert (ROOT / script).is_file(), command
        # In a wheel's or an archive's copy nothing may be executable.
        assert (ROOT / script).read_text().startswith("#!") or script.endswith(".py")
    for module in re.findall(r"-m (benchmarks\.[\w.]+)", command):
        path = ROOT / module.replace(".", "/")
        assert (path / "__main__.py").is_file() or path.with_suffix(".py").is_file()
    for path in re.findall(r"(?:tests|gradsmooth_optax)/[\w/]+\.py", command):
        assert path in NEW or (ROOT / path).is_file(), command


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_call_only_what_there_is(path):
    commands = [command for command in commands_of(path) if command]
    assert commands
    for command in commands:
        check_that_what_it_calls_is_here(command)


def test_the_workflow_runs_the_lowest_and_the_newest_versions_that_are_promised():
    commands = " ".join(commands_of(ROOT / ".github" / "workflows" / "ci.yml"))
    assert '--resolution lowest-direct -e ".[core-test]"' in commands
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    pythons = set(re.findall(r'python(?:-version)?: "(3\.\d+)"', text))
    classified = [
        classifier.rpartition(" ")[2]
        for classifier in PROJECT["classifiers"]
        if re.search(r"Python :: 3\.\d+$", classifier)
    ]
    assert {classified[0], classified[-1]} <= pythons


def test_a_release_is_checked_by_the_scripts_that_a_maintainer_runs():
    told = CONTRIBUTING.split("\n## A release\n")[1]
    commands = "\n".join(commands_of(ROOT / ".github" / "workflows" / "release.yml"))
    for script in (".ci/tagged", ".ci/package"):
        assert script in told
        assert script in commands


# What a contributor is told.

# The files of its examples.
NEW = {
    "benchmarks/evidence/tasks/regress.py",
    "gradsmooth_optax/_operators/towards_mean.py",
}


def blocks(heading, language="python"):
    section = CONTRIBUTING.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(rf"^```{language}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)


def names_of(*modules):
    return {name: value for module in modules for name, value in vars(module).items()}


def run_doctest(function, **names):
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(function, function.__name__, globs={**names})
    assert test.examples
    assert doctest.DocTestRunner().run(test).failed == 0


def test_every_file_command_and_name_that_is_written_exists():
    shown = re.findall(r"`([^`\n]+)`", CONTRIBUTING)
    for text in [*shown, *itertools.chain(*map(blocks_of_shell, headings()))]:
        check_that_what_it_calls_is_here(text)
    wanted = re.compile(r"(?:tests|benchmarks|gradsmooth_optax|\.github)/[\w./-]+")
    paths = {text for text in shown if wanted.fullmatch(text)} - NEW
    assert len(paths) >= 15
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    # Functions and tables of the files that it sends one to.
    for path, names in {
        "tests/test_operators.py": ["LINEAR"],
        "gradsmooth_optax/_depth/words.py": ["_LAYERS"],
        "benchmarks/evidence/tasks/__init__.py": ["TASKS"],
        "benchmarks/evidence/presets.py": [
            *("_PRESETS", "_BY_OPTIMIZER", "_REVERSE", "_problems_of_task")
        ],
        "benchmarks/report/text.py": ["WHAT_IS_TRAINED"],
    }.items():
        text = (ROOT / path).read_text()
        for name in names:
            assert f"`{name}" in CONTRIBUTING, name
            assert re.search(rf"^(def )?{name}\b", text, re.MULTILINE), name


def headings():
    return re.findall(r"^## (.*)$", CONTRIBUTING, re.MULTILINE)


def blocks_of_shell(heading):
    return blocks(heading, "bash")


def test_the_first_command_installs_all_that_the_others_need():
    command, _ = re.search(r"```bash\n(.*) && (.*)\n```", CONTRIBUTING).groups()
    *_, target = shlex.split(command)
    (extra,) = re.fullmatch(r"\.\[(\w+)\]", target).groups()
    needed = " ".join(PROJECT["optional-dependencies"][extra])
    for other in ("test", "lint", "docs", "plots", "pre-commit"):
        assert re.search(rf"\b{other}\b", needed), other


def rows_of_files():
    """{file: its row in the table of CONTRIBUTING.md, from above}."""
    section = CONTRIBUTING.split("\n## Which file holds what\n")[1].split("\n## ")[0]
    rows = [
        re.findall(r"`([\w/.]+)`", line.split(" | ")[0])
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    places = [(place, at) for at, row in enumerate(rows) for place in row]
    for place, _ in places:
        assert (PACKAGE / place).exists(), place
    return {
        file: at
        for file in FILES
        for place, at in places
        if file == place or (place.endswith("/") and file.startswith(place))
    }


def test_every_file_has_a_row_in_the_table():
    assert sorted(rows_of_files()) == FILES


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_from_its_own_row_of_the_table_and_those_above_it_only(file):
    row_of = rows_of_files()
    for other in imported(file):
        assert row_of[other] <= row_of[file], f"{file} imports {other}"


def test_no_imports_run_in_a_circle():
    graphlib.TopologicalSorter({file: set(imported(file)) for file in FILES}).prepare()


def imported(file):
    """The files of the package that one of them imports."""
    for node in ast.walk(ast.parse((PACKAGE / file).read_text())):
        if isinstance(node, ast.ImportFrom):
            package, *parts = (node.module or "").split(".")
            if package == PACKAGE.name:
                for alias in node.names:
                    yield file_of([*parts, alias.name]) or file_of(parts)


def file_of(parts):
    """The file of a module, None if there is none."""
    path = "/".join(parts)
    names = (f"{path}.py", f"{path}/__init__.py".removeprefix("/"))
    return next((name for name in names if (PACKAGE / name).is_file()), None)


@pytest.fixture
def operator(monkeypatch):
    """The example's operator and its oracle, run as if they were in their files."""
    in_oracle, row, file, export = blocks("An operator")
    plain = names_of(oracle)
    exec(in_oracle, plain)
    (export,) = ast.parse(export).body
    assert f"{export.module.replace('.', '/')}.py" in NEW
    module = types.ModuleType(export.module)
    monkeypatch.setitem(sys.modules, export.module, module)
    exec(file, vars(module))
    (name,) = export.names
    assert name.name == name.asname  # it is public
    made = vars(module)[name.name]
    monkeypatch.setattr(gs, name.name, made, raising=False)
    names = {"gs": gs, "oracle": types.SimpleNamespace(**plain)}
    (linear,) = eval(f"{{{row}}}", {**names, "Linear": lambda *row: row}).values()
    assert linear[0] is made
    return linear


def test_the_example_of_an_operator_is_its_plain_formula(operator):
    make, plain = operator
    run_doctest(make)
    traced = jax.jit(lambda weight: make(weight).matrix(7))
    for num_layers, weight in itertools.product((1, 2, 7), (0.0, 0.3, 1)):
        expected = plain(num_layers, weight)
        matrix = make(weight).matrix(num_layers)
        assert matrix.dtype == "float64"
        np.testing.assert_allclose(matrix, expected, rtol=0, atol=2e-15)
        if num_layers == 7:
            matrix = traced(jnp.float32(weight))
            np.testing.assert_allclose(matrix, expected, rtol=0, atol=4e-7)


def test_the_example_of_an_operator_smooths_by_a_schedule_too(operator):
    make, plain = operator
    u = {"blocks": {"w": jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))}}
    tx = gs.smooth_over_depth(gs.scanned("blocks/"), make(lambda count: 0.5))
    out, _ = jax.jit(tx.update)(u, tx.init(u))
    expected = plain(4, 0.5) @ np.asarray(u["blocks"]["w"])
    np.testing.assert_allclose(out["blocks"]["w"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="`weight` must be between 0 and 1"):
        make(1.5)
    assert make(0.0).is_identity
    assert make(0.2) == make(0.2) != make(0.3)
    assert pickle.loads(pickle.dumps(make(0.2))) == make(0.2)
    assert repr(make(0.2)) == "gs.towards_mean(0.2)"


def test_the_example_of_a_preset_couples_true_neighbors(monkeypatch):
    row, preset = blocks("A layout preset")
    names = names_of(layouts)
    monkeypatch.setitem(specs.PRESETS, "segments", None)  # put back at the end
    exec(preset, names)
    monkeypatch.setattr(layouts, "segments", names["segments"], raising=False)
    run_doctest(names["segments"])
    stack = eval(row, names_of(stacks))
    chains = stacks.random_blocks(stack)
    tree = stacks.build(stack, chains)
    for spec in (stack.spec, stack.preset, "segments"):
        tx = gs.smooth_over_depth(spec, 0.3)
        out, _ = tx.update(tree, tx.init(tree))
        found, wrong = stacks.coupled_pairs(stack, tree, out, 0.3)
        assert found == stacks.true_pairs(stack)
        assert not wrong


def test_the_example_of_a_task_has_what_a_task_has():
    pytest.importorskip("flax")  # the extra "bench"
    module, sizes = blocks("A task")
    task_module, presets = {}, {}
    exec(module, task_module)
    exec(sizes, presets)
    options = presets["_REGRESS"]
    own = ("width", "heads", "batch", "eval_inputs")
    task = task_module["build"](3, **{name: options[name] for name in own})
    params = jax.eval_shape(task.init, jax.random.key(0))
    batch = task.draw(task.data, jax.random.key(1), 0)
    states = jax.eval_shape(task.states, params, batch)
    assert states.shape == (4, options["batch"], options["width"])
    assert jax.eval_shape(task.loss, params, batch).shape == ()
    (metric,) = task_module["METRICS"]
    assert list(jax.eval_shape(task.evaluate, params)) == [metric.name]
    roles = {group.role for group in gs.describe(task.depth, params).groups}
    assert roles == params["blocks"].keys()


def test_a_tag_is_refused_before_its_version_has_a_day(tmp_path):
    for path in (".ci/tagged", "CHANGELOG.md", "CITATION.cff"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    (tmp_path / "gradsmooth_optax").mkdir()
    shutil.copy(PACKAGE / "__init__.py", tmp_path / "gradsmooth_optax")

    def tagged(tag):
        command = ["bash", str(tmp_path / ".ci" / "tagged"), tag]
        return subprocess.run(command, capture_output=True, text=True)

    version = gs.__version__
    changelog, cited = tmp_path / "CHANGELOG.md", tmp_path / "CITATION.cff"
    changelog.write_text(
        re.sub(rf"(?m)^(## \[{version}\] - ).*", r"\1unreleased", CHANGELOG)
    )
    cited.write_text(re.sub(r"(?m)^date-released: .*\n", "", CITATION))
    assert "CHANGELOG.md has no line" in tagged(f"v{version}").stderr
    assert "__version__" in tagged("v99.0.0").stderr
    assert "a release's tag is" in tagged(version).stderr
    changelog.write_text(changelog.read_text().replace("unreleased", "2027-01-31", 1))
    assert "date-released: 2027-01-31" in tagged(f"v{version}").stderr
    cited.write_text(f"{cited.read_text()}date-released: 2027-01-31\n")
    assert tagged(f"v{version}").stdout == f"v{version} of 2027-01-31\n"
