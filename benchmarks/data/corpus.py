"""Bytes of real text: found, split by file, and sampled by (seed, step).

The default text is the source of the Python standard library, about 12 MB that comes
with every interpreter and so needs no download. Tokens are bytes, so every text file
works and a loss in bits per byte compares across corpora.
"""

import hashlib
import math
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

VOCABULARY = 256


class CorpusError(ValueError):
    """A corpus that cannot be trained on; the message says what to change."""


class Corpus(NamedTuple):
    """Bytes to train on and held-out bytes, uint8, from different files.

    `sha256` is a digest of both: equal digests mean equal corpora.
    """

    train: np.ndarray
    validation: np.ndarray
    sha256: str


def standard_library_files() -> list[Path]:
    """Returns the source files of this interpreter's standard library.

    Third-party packages are left out, and so are the test suites, which some
    distributions of Python do not ship.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = root.rglob("*.py")
    return sorted(p for p in files if left_out.isdisjoint(p.relative_to(root).parts))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CorpusError(
            f"the corpus file {str(path)!r} cannot be read: {error.strerror}. Name "
            "text files that are there"
        ) from None


def split_by_file(
    texts: Sequence[bytes], validation_share: float = 0.1
) -> tuple[list[bytes], list[bytes]]:
    """Returns the contents of the files to train on, and of those held out.

    Files are ordered by a digest of their contents, and the first ones that together
    hold `validation_share` of all bytes are held out. So neither names nor locations
    nor the order given play a part, and a file that comes twice is used once. A lone
    file cannot be split by file: its last bytes are held out.
    """
    distinct = {hashlib.sha256(text).digest(): text for text in texts if text}
    ordered = [distinct[digest] for digest in sorted(distinct)]
    if len(ordered) == 1:
        (text,) = ordered
        cut = len(text) - math.ceil(validation_share * len(text))
        return [text[:cut]], [text[cut:]]

    wanted = validation_share * sum(map(len, ordered))
    ends = np.cumsum([len(text) for text in ordered])
    # At least one file on either side, however large a file is.
    held_out = int(np.searchsorted(ends, wanted)) + 1
    held_out = min(held_out, len(ordered) - 1)
    return ordered[held_out:], ordered[:held_out]


def load_corpus(paths: Sequence[Path] | None, shortest: int) -> Corpus:
    """Reads a corpus and splits it by file.

    Args:
      paths: text files, or None for the standard library's source.
      shortest: how many bytes either part must have at least.

    Raises:
      CorpusError: if a file cannot be read, or a part is shorter than `shortest`.
    """
    texts = [*map(_read, standard_library_files() if paths is None else paths)]
    train, validation = (b"".join(part) for part in split_by_file(texts))
    for name, part in (("training", train), ("validation", validation)):
        if len(part) < shortest:
            raise CorpusError(
                f"the corpus is too short: after the split its {name} part has "
                f"{len(part):,} bytes, and this run needs at least {shortest:,}. "
                "Give more or longer files, or a shorter context"
            )
    digest = hashlib.sha256(len(train).to_bytes(8, "big") + train + validation)
    return Corpus(
        train=np.frombuffer(train, np.uint8),
        validation=np.frombuffer(validation, np.uint8),
        sha256=digest.hexdigest(),
    )


def sample_windows(
    text: jax.Array, key: jax.Array, step: jax.Array, batch: int, context: int
) -> jax.Array:
    """Draws the windows of one training step.

    They depend on `key` and `step` alone: every arm sees the same data, and a resumed
    run needs no data state.

    Args:
      text: uint8 array of shape `(num_bytes,)`.
      key: the random key of one seed.
      step: the step's number, a scalar.
      batch: number of windows.
      context: number of predicted bytes per window.

    Returns:
      int32 array of shape `(batch, context + 1)`: inputs are all but the last byte of
      a window, targets all but the first.
    """
    last = text.shape[0] - (context + 1)
    starts = jax.random.randint(jax.random.fold_in(key, step), (batch,), 0, last + 1)
    return text[starts[:, None] + jnp.arange(context + 1)].astype(jnp.int32)


def spread_windows(text: np.ndarray, num_windows: int, context: int) -> np.ndarray:
    """Returns fixed windows spread evenly over `text`, for validation.

    Args:
      text: uint8 array of shape `(num_bytes,)`.
      num_windows: number of windows; they overlap where `text` is too short for all.
      context: number of predicted bytes per window.

    Returns:
      int32 array of shape `(num_windows, context + 1)`.
    """
    starts = np.linspace(0, text.size - (context + 1), num_windows).astype(int)
    return text[starts[:, None] + np.arange(context + 1)].astype(np.int32)
