import contextlib
import io
import json
import math
import re
import shutil
import signal
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from benchmarks import checkpoints, pretrain

SMALL = [
    *["--layers", "2", "--width", "8", "--heads", "2", "--context", "8"],
    *["--batch", "2", "--seeds", "2", "--steps", "12", "--chunk", "2"],
    *["--eval-every", "4", "--eval-windows", "5", "--checkpoint-every", "4"],
    *["--alpha", "0.2"],
]


@pytest.fixture(scope="module")
def corpus_option(tmp_path_factory):
    directory = tmp_path_factory.mktemp("text")
    paths = [directory / f"{name}.txt" for name in "abc"]
    for path in paths:
        path.write_text(f"This is file {path.name}. " * 40)
    return ["--corpus", *map(str, paths)]


class Finished(NamedTuple):
    status: int
    printed: str
    report: dict[str, Any]
    directory: Path


def run(directory, options):
    """Runs the benchmark with its output and checkpoints in `directory`."""
    out, saved = directory / "out", directory / "checkpoints"
    printed, report = io.StringIO(), out / "pretrain.json"
    with contextlib.redirect_stdout(printed):
        status = pretrain.main(
            [*SMALL, *options, "--out", str(out), "--checkpoint-dir", str(saved)]
        )
    values = json.loads(report.read_text()) if report.exists() else {}
    return Finished(status, printed.getvalue(), values, directory)


@pytest.fixture(scope="module")
def finished(corpus_option, tmp_path_factory):
    return run(tmp_path_factory.mktemp("finished"), corpus_option)


def error_of(options, capsys):
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(options)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_the_base_arm_is_added_and_comes_first(finished):
    assert finished.status == 0
    assert [arm["name"] for arm in finished.report["arms"]] == ["adamw", "α = 0.2"]
    assert [arm["alpha"] for arm in finished.report["arms"]] == [0.0, 0.2]


def test_the_table_shows_what_the_json_holds(finished):
    base, smoothed = finished.report["arms"]
    for arm in (base, smoothed):
        loss = np.mean(arm["validation_loss"])
        (row,) = (x for x in finished.printed.splitlines() if f"| {arm['name']} " in x)
        assert f"{loss:.4f}" in row
        assert f"{loss / math.log(2):.4f}" in row
        assert f"{arm['relative_time']:.3f}×" in row
    differences = np.subtract(smoothed["validation_loss"], base["validation_loss"])
    assert smoothed["minus_base"]["mean"] == pytest.approx(differences.mean())
    assert smoothed["minus_base"]["wins"] == np.sum(differences < 0)
    assert f"{smoothed['minus_base']['mean']:+.4f} ± " in finished.printed
    entropy = finished.report["corpus"]["unigram_bits_per_byte"]
    assert f"unigram entropy {entropy:.4f} bits/byte" in finished.printed


def test_the_json_says_what_was_run_and_measured(finished):
    report = finished.report
    assert report["config"]["layers"] == 2
    assert report["config"]["alpha"] == [0.0, 0.2]
    assert report["config"]["learning_rate"] > 0
    assert {"python", "jax", "optax", "flax", "gradsmooth_optax"} <= set(
        report["versions"]
    )
    assert report["machine"]["cpus"] >= 1
    assert report["resumed_at"] == []
    for arm in report["arms"]:
        curves = arm["curves"]
        assert curves["validation_steps"] == [4, 8, 12]
        assert np.shape(curves["validation_loss"]) == (3, 2)
        assert np.shape(curves["train_loss"]) == (12, 2)
        assert curves["validation_loss"][-1] == arm["validation_loss"]
        assert arm["seconds_per_step"] > 0


def test_all_arms_start_at_the_same_loss_of_the_same_batch(finished):
    base, smoothed = (arm["curves"]["train_loss"] for arm in finished.report["arms"])
    # To rounding: each arm's program is compiled on its own.
    np.testing.assert_allclose(base[0], smoothed[0], rtol=1e-6)
    assert base[-1] != smoothed[-1]


def test_the_figure_is_a_png(finished):
    png = finished.directory / "out" / "pretrain.png"
    assert png.read_bytes().startswith(b"\x89PNG")


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(
    finished, corpus_option, tmp_path, monkeypatch
):
    save = checkpoints.save

    def save_and_press_ctrl_c(manager, run, **options):
        save(manager, run, **options)
        if run.step == 4:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save", save_and_press_ctrl_c)
        stopped = run(tmp_path, corpus_option)
    assert stopped.status == 130
    # Pressed while step 4 is saved, heard at the end of the next round.
    assert "stopped at step 6 of 12" in stopped.printed
    assert stopped.report == {}

    resumed = run(tmp_path, corpus_option)
    assert "resumed at step 6" in resumed.printed
    assert resumed.report["resumed_at"] == [6]
    assert timeless(resumed.report["arms"]) == timeless(finished.report["arms"])
    jax.tree.map(
        np.testing.assert_array_equal, final_state(resumed), final_state(finished)
    )


def timeless(arms):
    times = {"seconds_per_step", "relative_time"}
    return [{k: v for k, v in arm.items() if k not in times} for arm in arms]


def final_state(run):
    """All parameters and optimizer states after the last step."""
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.restore(run.directory / "checkpoints" / "12" / "arrays")
    return saved["states"]


def test_other_options_than_the_checkpoints_are_an_error_that_lists_them(
    finished, corpus_option, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    saved = tmp_path / "checkpoints"
    shutil.copytree(finished.directory / "checkpoints", saved)
    options = [*SMALL, *corpus_option, "--learning-rate", "0.5", "--scope", "proj"]
    message = error_of([*options, "--checkpoint-dir", str(saved)], capsys)
    assert "--learning-rate was 0.008, now 0.5; --scope was 'full'" in message
    assert "--layers" not in message.splitlines()[-1]
    message = error_of([*SMALL, "--checkpoint-dir", str(saved)], capsys)
    assert "--corpus was 'sha256" in message
    # Nothing was trained, and nothing written.
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--corpus", "nowhere.txt"], "--corpus: there is no corpus file"),
        (["--heads", "5"], "--heads: 5 heads do not divide --width 48; .* --width 50"),
        (["--heads", "16"], "rotary positions turn pairs.*--positions learned"),
        (["--warmup", "300"], "--warmup: 300 .* use at most --warmup 299"),
        (["--optimizer", "sgd", "--weight-decay", "0.1"], "sgd has no decoupled"),
        (["--alpha", "0", "1.5"], "--alpha: '1.5' is not a number from 0 to 1"),
        (["--alpha", "nan"], "--alpha: 'nan' is not a number from 0 to 1"),
        (["--steps", "0"], "--steps: '0' is not a whole number from 1"),
        (["--learning-rate", "0"], "--learning-rate: '0' is not a number above 0"),
        (["--out", __file__], "--out: .* cannot be used as a directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_that_cannot_work_are_errors_that_say_what_would(
    options, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, error_of(options, capsys), re.DOTALL)


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(["--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "--checkpoint-dir" in text
    assert "(default: 300)" in text
