"""The common tests of optax, with our optimizers in the place of theirs.

Not part of a plain run: `python -m pytest -m optax_suite`. The wheel of optax holds no
tests, so pip downloads the sdist of the installed version, and nothing of it is kept
here. Parameters there are single arrays, each of which is taken for a stack of layers
along its first axis.
"""

import ast
import functools
import importlib.metadata
import re
import subprocess
import sys
import tarfile
import types
import unittest

import numpy as np
import optax
import pytest

import gradsmooth_optax as gs

pytestmark = [
    pytest.mark.optax_suite,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # those of optax's own tests
]

DEPTH = gs.depth_fn(
    lambda path, leaf: gs.Depth(path, "w", axis=0) if np.ndim(leaf) else None
)
SMOOTHING = gs.smooth_over_depth(DEPTH, 0.2)
SCHEDULED = gs.smooth_over_depth(DEPTH, optax.linear_schedule(0.3, 0.0, 1000))


def adamw(learning_rate, mu_dtype=None):
    return gs.adamw(learning_rate, SMOOTHING, mu_dtype=mu_dtype)


def adamw_scheduled(learning_rate):
    return gs.adamw(learning_rate, SCHEDULED, weight_decay=0.0)


def adamw_directional(learning_rate):
    smoothing = gs.smooth_over_depth(DEPTH, 0.1, variant="directional")
    return gs.adamw(learning_rate, smoothing)


def muon(learning_rate):
    return gs.muon(learning_rate, DEPTH, SMOOTHING, adam_learning_rate=learning_rate)


def monitored(learning_rate):
    return optax.chain(
        optax.scale_by_adam(),
        gs.diagnostics.monitor_depth(SCHEDULED, DEPTH, every=100),
        optax.scale_by_learning_rate(learning_rate),
    )


def learned_alpha(learning_rate):
    return optax.chain(
        gs.contrib.learn_alpha(optax.scale_by_adam(), DEPTH),
        optax.scale_by_learning_rate(learning_rate),
    )


def learned_operator(learning_rate):
    return optax.chain(
        gs.contrib.learn_operator(optax.scale_by_adam(), DEPTH, radius=2),
        optax.scale_by_learning_rate(learning_rate),
    )


OURS = {
    make.__name__: make
    for make in (
        adamw,
        adamw_scheduled,
        adamw_directional,
        muon,
        monitored,
        learned_alpha,
        learned_operator,
    )
}

# Of each file: the class, what finds an optimizer by its name, and the tables of names.
FILES = {
    "alias": ("optax/_src/alias_test.py", "AliasTest", "_get_opt"),
    "contrib": ("optax/contrib/_common_test.py", "ContribTest", "_get_opt_factory"),
}
TABLES = {
    "_OPTIMIZERS_UNDER_TEST",
    "_MAIN_OPTIMIZERS_UNDER_TEST",
    "_ALL_OPTIMIZERS_UNDER_TEST",
}

# (file, arm): {what the name and the parameters of a test match: how it fails}.
EXCLUDED = {
    ("contrib", "smoothed"): {
        # It walks along the valley, past the minimum: the two coordinates are no
        # layers, and what is right for one is not for the other.
        r"test_optimizers .*'acprop'.*_setup_rosenbrock": "does not converge",
    },
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """The sdist of the installed optax, unpacked."""
    folder = tmp_path_factory.mktemp("optax")
    version = importlib.metadata.version("optax")
    options = ["--no-deps", "--no-binary", "optax", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", "-q", *options]
    subprocess.run([*command, f"optax=={version}"], check=True, timeout=300)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as sdist:
        sdist.extractall(folder, filter="data")
    return folder / f"optax-{version}"


class _Tables(ast.NodeTransformer):
    """Their tables of optimizers become `TABLE`, a tuple that is given."""

    def visit_Assign(self, node):
        (target,) = node.targets
        is_table = isinstance(target, ast.Name) and target.id in TABLES
        is_last = isinstance(node.value, ast.Tuple | ast.Call)
        if is_table and is_last:
            node.value = ast.copy_location(ast.Name("TABLE", ast.Load()), node.value)
        return node


def load(path, table):
    """The module with another table; None keeps theirs."""
    tree = ast.parse(path.read_text())
    if table is not None:
        tree = ast.fix_missing_locations(_Tables().visit(tree))
    module = types.ModuleType(f"optaxs_{path.stem}")
    sys.modules[module.__name__] = module
    vars(module)["TABLE"] = table
    exec(compile(tree, str(path), "exec"), vars(module))
    return module


def with_ours(module, finder):
    """Their tests, of our optimizers."""
    theirs = getattr(module, finder)
    setattr(module, finder, lambda *names: OURS.get(names[-1]) or theirs(*names))


def with_smoothing_under(module, finder):
    """Their tests, of their optimizers inside of `with_depth_smoothing`."""
    theirs = getattr(module, finder)

    def found(*names):
        factory = theirs(*names)

        @functools.wraps(factory)
        def smoothed(*args, **kwargs):
            return gs.with_depth_smoothing(factory(*args, **kwargs), SMOOTHING)

        return smoothed

    setattr(module, finder, found)


def table_of(module):
    """Theirs, without what `contrib` makes of every one of `alias`."""
    names = ("_MAIN_OPTIMIZERS_UNDER_TEST", "_OPTIMIZERS_UNDER_TEST")
    return next(getattr(module, name) for name in names if hasattr(module, name))


def our_table(file):
    rates = {"muon": 1e-2, "learned_alpha": 1e-2} if file == "contrib" else {}
    wrapper = {"wrapper_name": None, "wrapper_kwargs": None}
    return tuple(
        {"opt_name": name, "opt_kwargs": {"learning_rate": rates.get(name, 1e-1)}}
        | (wrapper if file == "contrib" else {})
        for name in OURS
    )


def what(test):
    """The name of a test, without its number, and its parameters."""
    test = getattr(test, "test_case", test)  # of a subtest
    method = getattr(test, test._testMethodName)
    name = re.sub(r"\d+$", "", test._testMethodName)
    return f"{name} {getattr(method, '__x_params_repr__', '')}"


@pytest.mark.parametrize("arm", ["ours", "smoothed"])
@pytest.mark.parametrize("file", FILES)
def test_the_common_tests_of_optax_pass(sources, file, arm):
    pytest.importorskip("absl")
    path, of_tests, finder = FILES[file]
    if arm == "ours":
        module = load(sources / path, our_table(file))
        with_ours(module, finder)
    else:
        module = load(sources / path, table_of(load(sources / path, None)))
        with_smoothing_under(module, finder)
    tests = unittest.defaultTestLoader.loadTestsFromTestCase(getattr(module, of_tests))
    result = unittest.TestResult()
    tests.run(result)

    failed = {what(test): error for test, error in result.failures + result.errors}
    excluded = EXCLUDED.get((file, arm), {})
    unexplained = {
        name: error
        for name, error in failed.items()
        if not any(re.search(pattern, name) for pattern in excluded)
    }
    print(f"{result.testsRun} run, {len(result.skipped)} skipped, {len(failed)} failed")
    assert result.testsRun > len(result.skipped) + len(failed)
    assert not unexplained, "\n\n".join(
        f"{name}\n{error[-1500:]}" for name, error in unexplained.items()
    )
    # What is excluded is what fails, and no more.
    for pattern in excluded:
        assert any(re.search(pattern, name) for name in failed), pattern
