"""Scikit-learn's handwritten digits: 1,797 real images that come with the package."""

from typing import NamedTuple, cast

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SIZE, CLASSES, IMAGES = 8, 10, 1797


class Digits(NamedTuple):
    """Images in [0, 1] and their classes, `(N, 8, 8)` float32 and `(N,)` int32."""

    images: np.ndarray
    labels: np.ndarray


def split_digits(*held_out: int) -> tuple[Digits, ...]:
    """Returns images to train on and sets of images held out, no image in two of them.

    The split is the same every time, and every class has its share of every part.

    Args:
      *held_out: how many images are in each set that is held out.
    """
    pixels, labels = cast(tuple[np.ndarray, ...], load_digits(return_X_y=True))
    images = (pixels / pixels.max()).astype(np.float32).reshape(-1, SIZE, SIZE)
    labels = labels.astype(np.int32)
    left, sets = np.arange(len(labels)), []
    for size in held_out:
        left, held = train_test_split(
            left, test_size=size, stratify=labels[left], random_state=0
        )
        sets.append(held)
    return tuple(Digits(images[part], labels[part]) for part in (left, *sets))
