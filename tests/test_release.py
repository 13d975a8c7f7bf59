"""What is published with a version, and what a contributor is told, is true."""

import ast
import datetime
import doctest
import fnmatch
import inspect
import itertools
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import stacks

import gradsmooth_optax as gs
from gradsmooth_optax import _operators, _smoothers, layouts

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "gradsmooth_optax"
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()
CITATION = (ROOT / "CITATION.cff").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")


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
    named = set(re.findall(r"`gs\.(\w+)`", CHANGELOG))
    public = {module for module in MODULES if not module.startswith("_")}
    assert public <= named
    functions = {
        name
        for name, value in vars(gs).items()
        if not name.startswith("_") and inspect.isfunction(value)
    }
    assert functions <= named
    assert {name for name in named if not hasattr(gs, name)} <= public


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
    for path in re.findall(r"(?:tests|gradsmooth_optax)/\w+\.py", command):
        assert (ROOT / path).is_file(), command


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
    new = {"benchmarks/evidence/tasks/regress.py"}  # the example's
    paths = {text for text in shown if wanted.fullmatch(text)} - new
    assert len(paths) >= 15
    assert [path for path in sorted(paths) if not (ROOT / path).exists()] == []
    # Functions and tables of the files that it sends one to.
    for path, names in {
        "tests/test_operators.py": [
            *("LINEAR", "values", "test_a_strength_of_zero_returns_the_same_objects"),
            "test_a_strength_out_of_range_or_of_the_wrong_kind_is_refused",
            "test_smoothers_keep_constants_and_the_sum_over_depth",
        ],
        "benchmarks/speed/updates.py": ["operators"],
        "benchmarks/readme.py": ["OPERATORS"],
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


def test_files_import_from_their_own_row_of_the_table_and_those_above_it_only():
    section = CONTRIBUTING.split("\n## Which file holds what\n")[1].split("\n## ")[0]
    rows = [
        re.findall(r"`([\w*]+)\.py`", line.split(" | ")[0])
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    row_of = {
        module: at
        for module in MODULES
        for at, patterns in enumerate(rows)
        if any(fnmatch.fnmatchcase(module, pattern) for pattern in patterns)
    }
    assert set(MODULES) == set(row_of)
    for module, at in row_of.items():
        for other in imported(module):
            assert row_of[other] <= at, f"{module} imports {other}"


def imported(module):
    """The modules of the package that one of them imports."""
    for node in ast.walk(ast.parse((PACKAGE / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            package, _, name = (node.module or "").partition(".")
            if package == PACKAGE.name:
                yield from [name] if name else [alias.name for alias in node.names]


@pytest.fixture
def operator():
    """The example's operator and its oracle, run as if they were in their files."""
    in_oracle, in_smoothers = blocks("An operator")
    plain, names = names_of(oracle), names_of(_operators, _smoothers)
    exec(in_oracle, plain)
    exec(in_smoothers, names)
    return names["towards_mean"], plain["towards_mean_matrix"]


def test_the_example_of_an_operator_is_its_plain_formula(operator, monkeypatch):
    make, plain = operator
    monkeypatch.setattr(gs, "towards_mean", make, raising=False)
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
    tx = gs.apply_over_depth(gs.scanned("blocks/"), make(lambda count: 0.5))
    out, _ = jax.jit(tx.update)(u, tx.init(u))
    expected = plain(4, 0.5) @ np.asarray(u["blocks"]["w"])
    np.testing.assert_allclose(out["blocks"]["w"], expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="`weight` must be between 0 and 1"):
        make(1.5)
    assert make(0.0).is_identity
    assert make(0.2) == make(0.2) != make(0.3)


def test_the_example_of_a_preset_couples_true_neighbors(monkeypatch):
    row, preset = blocks("A layout preset")
    names = names_of(layouts)
    exec(preset, names)
    monkeypatch.setattr(layouts, "segments", names["segments"], raising=False)
    run_doctest(names["segments"])
    stack = eval(row, names_of(stacks))
    chains = stacks.random_blocks(stack)
    tree = stacks.build(stack, chains)
    for spec in (stack.spec, stack.preset):
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
