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


def test_what_the_readme_says_of_speed_and_evidence_is_what_the_results_say():
    pytest.importorskip("flax")  # the extra "bench"
    from benchmarks import readme

    assert readme.main(["--check"]) == 0


def test_a_figure_that_is_not_of_the_results_is_noticed_and_mended():
    pytest.importorskip("flax")  # the extra "bench"
    from benchmarks import readme
    from benchmarks.report.headline import headline
    from benchmarks.report.records import read_sources
    from benchmarks.report.verdicts import outcomes

    reports = {
        name: json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        for name in ("speed", "tpu_compile", "gpu_compile")
    }
    sources = read_sources(ROOT / "benchmarks" / "results")
    verdict = headline(
        outcomes([setting for source in sources for setting in source.settings])
    )
    cost = readme.costs(reports["speed"])["tikhonov(1.0)"]
    table = readme.compiled_table(reports["tpu_compile"], reports["gpu_compile"])
    wrong = README.replace(cost, "0.1× / 0.1×").replace(table, "as fast as light")
    wrong = wrong.replace(verdict, "It always helps.")
    assert wrong != README
    assert readme.written(wrong, reports, sources) == README
