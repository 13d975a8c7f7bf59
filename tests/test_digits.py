"""Digits are split into images to train on and to hold out, fairly and for good."""

import numpy as np
import pytest

pytest.importorskip("sklearn")

from sklearn.datasets import load_digits

from benchmarks.data.digits import split_digits

HELD_OUT = 61


def rows(digits):
    """Every image with its label, sorted, in the integers that scikit-learn has."""
    pixels = digits.images.reshape(len(digits.images), -1) * 16
    return sorted(map(tuple, np.c_[digits.labels, pixels].astype(int).tolist()))


def test_every_digit_of_scikit_learn_is_in_one_of_two_parts_with_its_label():
    train, test = split_digits(HELD_OUT)
    pixels, labels = load_digits(return_X_y=True)
    everything = np.c_[labels, pixels].astype(int).tolist()
    assert sorted(rows(train) + rows(test)) == sorted(map(tuple, everything))
    assert len(test.images) == len(test.labels) == HELD_OUT
    assert not {*rows(train)} & {*rows(test)}


def test_every_class_has_its_share_of_both_parts():
    train, test = (np.bincount(part.labels) for part in split_digits(HELD_OUT))
    assert train.shape == test.shape == (10,)
    wanted = (train + test) * HELD_OUT / 1797
    assert np.all(np.abs(test - wanted) <= 1)


def test_the_split_is_the_same_at_every_call_and_another_for_another_number():
    for part, again in zip(split_digits(HELD_OUT), split_digits(HELD_OUT), strict=True):
        np.testing.assert_array_equal(part.images, again.images)
        np.testing.assert_array_equal(part.labels, again.labels)
    assert len(split_digits(HELD_OUT + 1)[1].images) == HELD_OUT + 1


def test_pixels_are_floats_from_0_to_1_in_eight_rows_of_eight():
    for images, labels in split_digits(HELD_OUT):
        assert images.shape[1:] == (8, 8)
        assert (images.dtype, labels.dtype) == (np.float32, np.int32)
        assert (images.min(), images.max()) == (0, 1)
