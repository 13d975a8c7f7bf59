"""Every public object is documented: what it is, takes and returns, with an example."""

import doctest
import functools
import inspect
import re
import types
from pathlib import Path

import gradsmooth_optax as gs


@functools.cache
def public_modules():
    found = [gs, *(m for m in vars(gs).values() if isinstance(m, types.ModuleType))]
    return [m for m in found if not m.__name__.rpartition(".")[2].startswith("_")]


@functools.cache
def public_objects():
    """{name that a user writes: object}, of the package and of its public modules."""
    found = {}
    for module in public_modules():
        for name, value in vars(module).items():
            if name.startswith("_") or not callable(value):
                continue
            # A table of contents holds what others define; other modules import it.
            is_contents = hasattr(module, "__path__")
            is_made_by_a_function = inspect.isclass(value) and module is gs.controls
            is_its_own = is_contents or value.__module__ == module.__name__
            if is_its_own and not is_made_by_a_function:
                found[f"{module.__name__}.{name}"] = value
    return found


def section(doc, title):
    """The lines under a heading, up to the next one."""
    found = re.search(rf"^{title}:\n((?:  .*\n|\n)*)", doc + "\n", re.MULTILINE)
    return found[1] if found else ""


def held():
    """Every public name: modules, what they hold, and a constant."""
    modules = [module.__name__ for module in public_modules()]
    return {*public_objects(), *modules, "gradsmooth_optax.trial.DEFAULT"}


def test_the_public_modules_list_in_their_help_what_they_hold():
    names = [m.__name__.removeprefix("gradsmooth_optax.") for m in public_modules()]
    assert sorted(names) == [
        *("contrib", "controls", "diagnostics", "gradsmooth_optax", "layouts"),
        *("plots", "trial"),
    ]
    for module in public_modules():
        lines = re.findall(r"^- (`.*`): ", inspect.getdoc(module), re.MULTILINE)
        listed = sorted(re.findall(r"`(\w+)`", str(lines)))
        of_all = [name.rpartition(".") for name in held()]
        there = sorted(name for of, _, name in of_all if of == module.__name__)
        assert listed == there, module.__name__


def test_every_public_name_is_on_one_page_of_the_site_and_no_page_has_another():
    pages = (Path(__file__).parents[2] / "docs" / "api").glob("*.md")
    text = "\n".join(page.read_text() for page in pages)
    assert sorted(re.findall(r"^::: (\S+)", text, re.MULTILINE)) == sorted(held())


def test_public_objects_have_a_docstring_with_all_sections_and_an_example_that_is_run():
    missing = []
    for name, of in public_objects().items():
        doc = inspect.getdoc(of) or ""
        first, *rest = doc.splitlines() or [""]
        if not re.match(r"\S.*\.$", first) or (rest and rest[0]):
            missing.append(f"{name}: one sentence on the first line")
        examples = doctest.DocTestParser().get_examples(of.__doc__ or "")
        if not examples or not re.search(r"^ *Example:\n", of.__doc__, re.MULTILINE):
            missing.append(f"{name}: an example")
        if inspect.isfunction(of):
            described = section(doc, "Args")
            for parameter in inspect.signature(of).parameters:
                # As an entry, or among those that are "as in" another function.
                pattern = rf"^  \**{parameter}:|`{parameter}`"
                if not re.search(pattern, described, re.MULTILINE):
                    missing.append(f"{name}: its argument {parameter}")
            if not section(doc, "Returns"):
                missing.append(f"{name}: what it returns")
        for field in getattr(of, "_fields", ()):
            pattern = rf"^  (\w+, )*{field}(, \w+)*:"
            if not re.search(pattern, section(doc, "Attributes"), re.MULTILINE):
                missing.append(f"{name}: its field {field}")
    assert missing == []
