"""The command that draws samples of diffusion models, on models that are tiny."""

import json

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("sklearn")

import matplotlib.image
from jax.experimental.compilation_cache import compilation_cache

from benchmarks import samples
from benchmarks.evidence import presets
from benchmarks.evidence.tasks import diffusion
from benchmarks.evidence.tasks.digits import split_digits
from benchmarks.json_files import write_json

TINY = {
    **{"depths": [3], "width": 4, "heads": 2, "batch": 4, "micro_batches": 2},
    **{"steps": 2, "warmup": 1, "lanes": 1, "screen_seeds": 2, "confirm_seeds": 2},
    **{"eval_images": 60, "eval_times": 1, "samples": 8, "sampler_steps": 2},
}
COLUMNS = 3


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    """The second run finds what the first one has compiled."""
    values = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("compiled")),
        "jax_persistent_cache_min_compile_time_secs": 0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        # Next to nothing runs: what takes the time is to compile it.
        "jax_disable_most_optimizations": True,
    }
    # The last one is a flag, off, that is no attribute.
    before = {name: getattr(jax.config, name, False) for name in values}
    for name, value in values.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def arm(name, stage, rate, losses):
    return {
        **{"name": name, "stage": stage, "layers": 3, "learning_rate": rate},
        "operator": "none" if name == "base" else "window",
        "alpha": 0.0 if name == "base" else 0.2,
        **{"variant": "standard", "scope": "full", "control": None},
        "seeds": [0, 1] if stage == "screen" else [2, 3],
        **{"metric_per_seed": losses, "diverged": [False, False]},
        "other_metrics_per_seed": {"Fréchet distance": losses},
    }


def result_file(directory):
    """Rates of 0.01, but for the window on the seeds that confirm: 0.02."""
    arms = [
        arm("base", "screen", 0.01, [1.0, 1.0]),
        arm("window(0.2)", "screen", 0.01, [1.0, 1.0]),
    ]
    for rate, of_base, of_window in ((0.01, 1.0, 0.9), (0.02, 1.1, 0.8)):
        arms.append(arm("base", "confirm", rate, [of_base] * 2))
        arms.append(arm("window(0.2)", "confirm", rate, [of_window] * 2))
    metric = {"name": "denoising loss", "unit": "per pixel", "lower_is_better": True}
    value = {
        **{"task": "diffusion", "optimizer": "adamw", "preset": "quick"},
        "metric": metric,
        "other_metrics": [metric | {"name": "Fréchet distance", "unit": ""}],
        "config": presets.options_of("diffusion", "adamw", "quick", TINY),
        **{"versions": {}, "sittings": [], "machine": {}, "arms": arms},
    }
    path = directory / "diffusion" / "adamw.json"
    path.parent.mkdir()
    write_json(value, path)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """The picture's bytes, its pixels, and the images that it is made of; two runs."""
    directory, runs = tmp_path_factory.mktemp("results"), []
    result_file(directory)
    picture = directory / "figures" / "diffusion-adamw-samples.png"
    grid, images = samples.grid, []
    with pytest.MonkeyPatch.context() as monkeypatch:
        # No distance is asked for: no classifier need be trained.
        monkeypatch.setattr(
            diffusion, "trained_classifier", lambda _: lambda x: (x[:, 0], None)
        )
        monkeypatch.setattr(samples, "COLUMNS", COLUMNS)
        monkeypatch.setattr(samples, "grid", lambda of: images.append(of) or grid(of))
        for _ in range(2):
            assert samples.main(["--results", str(directory)]) == 0
            pixels = matplotlib.image.imread(picture)
            runs.append((picture.read_bytes(), pixels, images.pop()))
            picture.unlink()
    return runs


def test_without_a_result_file_the_error_names_it(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        samples.main(["--results", str(tmp_path), "--optimizer", "sgd"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "diffusion" / "sgd.json") in message


def test_an_arm_that_is_not_confirmed_yet_is_named_with_what_to_do(tmp_path, capsys):
    result_file(tmp_path)
    path = tmp_path / "diffusion" / "adamw.json"
    value = json.loads(path.read_text())
    value["arms"] = [arm for arm in value["arms"] if arm["stage"] == "screen"]
    write_json(value, path)
    with pytest.raises(SystemExit):
        samples.main(["--results", str(tmp_path)])
    message = capsys.readouterr().err
    assert "has not confirmed base: take another file" in message


def test_rows_are_real_images_and_both_arms_at_the_rates_that_confirmed_best(drawn):
    _, _, images = drawn[0]
    real, base, window = images.values()
    assert [*images] == ["held out", "base, rate 0.01", "window(0.2), rate 0.02"]
    for of_arm in (base, window):
        assert of_arm.shape == real.shape == (COLUMNS, 8, 8)
        assert np.isfinite(of_arm).all()
        assert np.abs(of_arm).max() <= 1
    assert not np.array_equal(base, window)


def test_the_picture_has_room_for_all_rows_and_columns_and_begins_with_real_ones(drawn):
    _, pixels, _ = drawn[0]
    # A label of 190 pixels, images of 42 and 4 between them.
    assert pixels.shape[:2] == (3 * 46, 190 + COLUMNS * 46)
    middles = ((np.arange(8) + 0.5) * 42 / 8).astype(int)
    _, held_out = split_digits(TINY["eval_images"])
    for column in range(COLUMNS):
        rows, columns = 4 + middles, 190 + 46 * column + middles
        found = pixels[rows[:, None], columns, 0]
        np.testing.assert_allclose(found, held_out.images[column], atol=0.01)


def test_the_same_command_draws_the_same_bytes_again(drawn):
    (first, *_), (second, *_) = drawn
    assert first == second
