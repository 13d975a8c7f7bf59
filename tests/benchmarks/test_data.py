"""Data is split fairly, the same way every time, and read as it is."""

import itertools
import sysconfig
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.data import corpus

FILES = [b"import this\n" * 40, b"print('hello')\n" * 50]
FILES += [b"x = [1, 2, 3]\n" * 60, b"def f(): ...\n" * 70]


def test_the_default_corpus_is_the_source_of_the_standard_library():
    files, root = corpus.standard_library_files(), Path(sysconfig.get_path("stdlib"))
    assert {root / "argparse.py", root / "json" / "decoder.py"} <= {*files}
    assert {path.suffix for path in files} == {".py"}
    parts = {part for path in files for part in path.relative_to(root).parts}
    assert parts.isdisjoint({"site-packages", "test", "tests"})


def test_a_corpus_is_split_by_file_and_by_contents_alone():
    train, validation = corpus.split_by_file(FILES, validation_share=0.3)
    assert sorted(train + validation) == sorted(FILES)
    assert train
    assert validation
    splits = [corpus.split_by_file(order) for order in itertools.permutations(FILES)]
    # A file that comes twice counts once, and so cannot be in both parts.
    splits.append(corpus.split_by_file([*FILES, *FILES]))
    assert all(split == splits[0] for split in splits)


def test_a_corpus_holds_out_the_share_asked_for_and_of_a_lone_file_the_end():
    texts = [bytes([index]) * 100 for index in range(200)]
    parts = corpus.split_by_file(texts, validation_share=0.2)
    assert [len(part) for part in parts] == [160, 40]
    text = bytes(range(100))
    assert corpus.split_by_file([text], 0.1) == ([text[:90]], [text[90:]])


def test_equal_digests_mean_equal_corpora(tmp_path):
    paths = [tmp_path / name for name in "abcd"]
    for path, text in zip(paths, FILES, strict=True):
        path.write_bytes(text)
    first, second = (corpus.load_corpus(of, 10) for of in (paths, paths[::-1]))
    assert first.sha256 == second.sha256
    np.testing.assert_array_equal(first.train, second.train)
    np.testing.assert_array_equal(first.validation, second.validation)
    assert first.train.size + first.validation.size == sum(map(len, FILES))
    paths[0].write_bytes(b"something else\n" * 40)
    assert corpus.load_corpus(paths, 10).sha256 != first.sha256


def test_a_corpus_that_cannot_be_used_is_an_error_that_says_what_is_needed(tmp_path):
    short = tmp_path / "short.txt"
    short.write_bytes(b"just long enough to train on")
    with pytest.raises(corpus.CorpusError, match=r"too short.* at least 20"):
        corpus.load_corpus([short], shortest=20)
    for path in (tmp_path / "nowhere.txt", tmp_path):
        with pytest.raises(corpus.CorpusError, match=f"{path}.* cannot be read"):
            corpus.load_corpus([path], shortest=20)


def test_windows_are_consecutive_bytes_of_all_of_the_text():
    text = jnp.arange(200, dtype=jnp.uint8)
    drawn = corpus.sample_windows(text, jax.random.key(0), jnp.int32(0), 5000, 9)
    spread = corpus.spread_windows(np.arange(100, dtype=np.uint8), 4, 9)
    for windows in (drawn, spread):
        assert windows.dtype == np.int32
        np.testing.assert_array_equal(np.diff(windows, axis=1), 1)
    assert drawn.shape == (5000, 10)
    assert (drawn.min(), drawn.max()) == (0, 199)
    assert spread[:, 0].tolist() == [0, 30, 60, 90]
    # Too short a text: windows overlap.
    overlapping = corpus.spread_windows(np.arange(12, dtype=np.uint8), 4, 9)
    assert overlapping[:, 0].tolist() == [0, 0, 1, 2]


def test_digits_are_split_with_their_labels_by_class_and_for_good():
    datasets = pytest.importorskip("sklearn.datasets")
    from benchmarks.data.digits import split_digits

    def rows(digits):
        """Every image with its label, in the integers that scikit-learn has."""
        pixels = digits.images.reshape(len(digits.images), -1) * 16
        return sorted(np.c_[digits.labels, pixels].astype(int).tolist())

    parts = train, test = split_digits(61)
    pixels, labels = datasets.load_digits(return_X_y=True)
    everything = sorted(np.c_[labels, pixels].astype(int).tolist())
    assert sorted(rows(train) + rows(test)) == everything
    assert not {*map(tuple, rows(train))} & {*map(tuple, rows(test))}
    of_class = np.bincount(test.labels, minlength=10)
    assert np.all(np.abs(of_class - np.bincount(labels) * 61 / 1797) <= 1)
    for part, again in zip(parts, split_digits(61), strict=True):
        np.testing.assert_array_equal(part.images, again.images)
        assert part.images.shape[1:] == (8, 8)
        assert (part.images.dtype, part.labels.dtype) == (np.float32, np.int32)
        assert (part.images.min(), part.images.max()) == (0, 1)
    assert len(split_digits(62)[1].images) == 62
