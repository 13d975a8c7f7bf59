import itertools
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.data import corpus

FILES = [
    b"import this\n" * 40,
    b"print('hello')\n" * 50,
    b"x = [1, 2, 3]\n" * 60,
    b"def f(): ...\n" * 70,
]


def test_the_default_corpus_is_the_source_of_the_standard_library():
    files = corpus.standard_library_files()
    root = Path(sysconfig.get_path("stdlib"))
    assert root / "argparse.py" in files
    assert root / "json" / "decoder.py" in files
    assert {path.suffix for path in files} == {".py"}
    parts = {part for path in files for part in path.relative_to(root).parts}
    assert parts.isdisjoint({"site-packages", "test", "tests"})


def test_the_split_is_by_file_and_disjoint():
    train, validation = corpus.split_by_file(FILES, validation_share=0.3)
    assert sorted(train + validation) == sorted(FILES)
    assert train
    assert validation


def test_the_split_depends_on_contents_only():
    splits = [corpus.split_by_file(order) for order in itertools.permutations(FILES)]
    assert all(split == splits[0] for split in splits)
    # A file that comes twice counts once, and so cannot be in both parts.
    assert corpus.split_by_file([*FILES, *FILES]) == splits[0]


def test_the_split_holds_out_the_share_asked_for():
    texts = [bytes([index]) * 100 for index in range(200)]
    train, validation = corpus.split_by_file(texts, validation_share=0.2)
    assert (len(train), len(validation)) == (160, 40)


def test_of_a_lone_file_the_end_is_held_out():
    text = bytes(range(100))
    assert corpus.split_by_file([text], 0.1) == ([text[:90]], [text[90:]])


def test_loading_twice_gives_the_same_corpus(tmp_path):
    paths = [tmp_path / name for name in "abcd"]
    for path, text in zip(paths, FILES, strict=True):
        path.write_bytes(text)
    first = corpus.load_corpus(paths, shortest=10)
    second = corpus.load_corpus(paths[::-1], shortest=10)
    assert first.sha256 == second.sha256
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.validation, second.validation)
    assert first.train.dtype == np.uint8
    assert first.train.size + first.validation.size == sum(map(len, FILES))

    paths[0].write_bytes(b"something else\n" * 40)
    assert corpus.load_corpus(paths, shortest=10).sha256 != first.sha256


@pytest.mark.parametrize("name", ["nowhere.txt", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(corpus.CorpusError, match=r"the corpus file .* cannot be read"):
        corpus.load_corpus([tmp_path / name], shortest=10)


@pytest.mark.parametrize("text", [b"", b"short", b"just long enough to train on"])
def test_a_corpus_that_is_too_short_says_what_is_needed(tmp_path, text):
    path = tmp_path / "short.txt"
    path.write_bytes(text)
    with pytest.raises(corpus.CorpusError, match=r"too short.* at least 20"):
        corpus.load_corpus([path], shortest=20)


def draw(seed, step, batch=16):
    text, key = jnp.arange(200, dtype=jnp.uint8), jax.random.key(seed)
    return np.asarray(corpus.sample_windows(text, key, jnp.int32(step), batch, 9))


def test_batches_depend_on_seed_and_step_alone():
    np.testing.assert_array_equal(draw(0, 3), draw(0, 3))
    assert not np.array_equal(draw(0, 3), draw(0, 4))
    assert not np.array_equal(draw(0, 3), draw(1, 3))


def test_windows_are_consecutive_bytes_of_the_text():
    windows = draw(0, 0, batch=5000)
    assert windows.shape == (5000, 10)
    assert windows.dtype == np.int32
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1)
    # The first and the last byte of the text are used like any other.
    assert windows.min() == 0
    assert windows.max() == 199


def test_validation_windows_reach_from_the_first_to_the_last_byte():
    text = np.arange(100, dtype=np.uint8)
    windows = corpus.spread_windows(text, num_windows=4, context=9)
    assert windows[:, 0].tolist() == [0, 30, 60, 90]
    np.testing.assert_array_equal(np.diff(windows, axis=1), 1)
    # Too short a text: windows overlap.
    windows = corpus.spread_windows(text[:12], num_windows=4, context=9)
    assert windows[:, 0].tolist() == [0, 0, 1, 2]
