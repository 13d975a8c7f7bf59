"""Everything that the README shows is executed or checked."""

import doctest
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def _blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def test_the_examples_of_the_readme_print_what_they_show():
    example = "\n".join(_blocks("python"))  # each goes on where the last one ended
    test = doctest.DocTestParser().get_doctest(example, {}, "README.md", None, 0)
    assert len(test.examples) >= 16
    assert doctest.DocTestRunner().run(test).failed == 0


def test_the_quick_start_is_two_commands_that_install_what_they_need():
    section = README.split("## Quick start")[1].split("\n## ")[0]
    (block,) = _blocks("bash", section)
    job, suite = block.splitlines()
    assert re.fullmatch(r"python -m pip install \S+ \S+ && python -m \S+", job)
    assert "benchmarks.pretrain" in job
    assert "pip install" in suite
    assert "pytest" in suite


def test_every_spec_of_the_depth_table_can_be_written_as_shown():
    import gradsmooth_optax as gs

    section = README.split("## Telling it where depth is")[1].split("\n## ")[0]
    calls = re.findall(r"`(gs\.(?:scanned|unrolled|first_match)\(.*?\))`[ :]", section)
    assert len(calls) == 6
    for call in calls:
        hash(eval(call, {"gs": gs}))


def test_the_costs_in_the_operator_table_are_those_of_the_committed_measurement():
    report = json.loads((ROOT / "results" / "operator_cost.json").read_text())
    measured = {
        " / ".join(f"{of_layout[name]['median']:.1f}×" for of_layout in layouts)
        for layouts in [report["operators"].values()]
        for name in report["operators"]["stacked"]
    }
    section = README.split("## Which operator")[1].split("\n## ")[0]
    shown = re.findall(r"\| (\d+\.\d× / \d+\.\d×) \|", section)
    assert len(shown) == 10
    assert set(shown) <= measured


def test_the_table_of_adaptive_operators_is_the_committed_run():
    pytest.importorskip("flax")
    from benchmarks.adaptive import table, times

    def read(name):
        return json.loads((ROOT / "results" / name).read_text())

    assert table(read("adaptive.json")) in README
    assert times(read("adaptive.json")) in README
    assert times(read("adaptive_time.json")) in README
