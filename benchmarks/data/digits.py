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


def split_digits(held_out: int) -> tuple[Digits, Digits]:
    """Returns images to train on and images held out, no image in both.

    The split is the same every time, and every class has its share of either part.

    Args:
      held_out: how many images are held out.
    """
    pixels, labels = cast(tuple[np.ndarray, ...], load_digits(return_X_y=True))
    images = (pixels / pixels.max()).astype(np.float32).reshape(-1, SIZE, SIZE)
    labels = labels.astype(np.int32)
    train, test = train_test_split(
        np.arange(len(labels)), test_size=held_out, stratify=labels, random_state=0
    )
    return Digits(images[train], labels[train]), Digits(images[test], labels[test])
