"""Every public object says what it is, what it takes and returns, with an example."""

import doctest
import inspect
import re
import types

import pytest

import gradsmooth_optax as gs

MODULES = [gs] + [m for m in vars(gs).values() if isinstance(m, types.ModuleType)]
MODULES = [m for m in MODULES if not m.__name__.rpartition(".")[2].startswith("_")]


def public_objects():
    """{name that a user writes: object}, of the package and of its public modules."""
    found = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if name.startswith("_") or not (inspect.isclass(value) or callable(value)):
                continue
            # A table of contents holds what others define; other modules import it.
            is_contents = hasattr(module, "__path__")
            is_made_by_a_function = inspect.isclass(value) and module is gs.controls
            if is_contents or value.__module__ == module.__name__:
                if is_made_by_a_function:
                    continue
                found[f"{module.__name__}.{name}"] = value
    return found


OBJECTS = public_objects()
PUBLIC_MODULES = [module.__name__ for module in MODULES]
FUNCTIONS = {name: f for name, f in OBJECTS.items() if inspect.isfunction(f)}
TUPLES = {name: c for name, c in OBJECTS.items() if hasattr(c, "_fields")}


def test_the_public_modules_are_these():
    names = [module.__name__.removeprefix("gradsmooth_optax.") for module in MODULES]
    assert sorted(names) == [
        "contrib",
        "controls",
        "diagnostics",
        "gradsmooth_optax",
        "layouts",
        "plots",
        "trial",
    ]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_help_of_a_module_lists_what_it_holds(module):
    lines = re.findall(r"^- (`.*`): ", inspect.getdoc(module), re.MULTILINE)
    listed = [
        f"{module.__name__}.{name}" for name in re.findall(r"`(\w+)`", str(lines))
    ]
    constants = {"gradsmooth_optax.trial.DEFAULT"}
    held = {
        name
        for name in {*OBJECTS, *constants, *PUBLIC_MODULES}
        if name.rpartition(".")[0] == module.__name__
    }
    assert len(listed) == len(set(listed))
    assert set(listed) == held


@pytest.mark.parametrize("name", OBJECTS)
def test_a_public_object_has_a_docstring_with_an_example_that_is_run(name):
    of = OBJECTS[name]
    assert of.__doc__
    first, *rest = inspect.getdoc(of).splitlines()
    assert re.match(r"\S.*\.$", first), f"not one sentence on one line: {first}"
    assert not rest or rest[0] == ""
    examples = doctest.DocTestParser().get_examples(of.__doc__)
    assert examples, "no doctest"
    assert re.search(r"^ *Example:\n", of.__doc__, re.MULTILINE)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_describes_each_of_its_arguments_and_what_it_returns(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    parameters = inspect.signature(FUNCTIONS[name]).parameters
    described = _section(doc, "Args")
    for parameter in parameters:
        # As an entry, or among those that are "as in" another function.
        pattern = rf"^  \**{parameter}:|`{parameter}`"
        assert re.search(pattern, described, re.MULTILINE), parameter
    assert _section(doc, "Returns")


@pytest.mark.parametrize("name", TUPLES)
def test_a_public_tuple_describes_each_of_its_fields(name):
    described = _section(inspect.getdoc(TUPLES[name]), "Attributes")
    for field in TUPLES[name]._fields:
        assert re.search(rf"^  (\w+, )*{field}(, \w+)*:", described, re.MULTILINE), (
            field
        )


def _section(doc, title):
    """The lines under a heading, up to the next one."""
    found = re.search(rf"^{title}:\n((?:  .*\n|\n)*)", doc + "\n", re.MULTILINE)
    return found[1] if found else ""
