"""The depth signals of the evidence's tasks: measured at three moments, and resumed."""

import json

import pytest

pytest.importorskip("flax")

import tiny_task

from benchmarks import signals


def test_a_table_is_made_of_a_training_and_again_of_the_file(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(signals.TASKS, "reverse", tiny_task)
    out = tmp_path / "signals.json"
    arguments = ["--task", "reverse", "--optimizer", "adamw", "--steps", "2"]
    arguments += ["--batches", "16", "--out", str(out)]
    assert signals.main(arguments) == 0
    table = capsys.readouterr().out
    assert "| reverse |" in table
    found = json.loads(out.read_text())["signals"]
    assert [(of["moment"], of["step"]) for of in found] == [
        *(("start", 0), ("middle", 1), ("end", 2)),
    ]
    assert set(found[0]["block"]["left"]) >= {"best filter", "window(0.5)"}
    monkeypatch.setattr(signals, "signals", None)
    assert signals.main(arguments) == 0
    assert capsys.readouterr().out == table
