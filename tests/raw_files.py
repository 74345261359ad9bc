"""For tests of builders: writing raw files, loading them, and the real ones where they are.

Tests on the real files read FGRPO_DATA, a folder with lastfm/ and musique/ in it; unset, it is
shared/data beside the checkout. Where there is none they are skipped, and say so.
"""

import gzip
import json
import os
from pathlib import Path

import pytest

from fgrpo_jax.config import DataConfig
from fgrpo_jax.data import datasets
from fgrpo_jax.data.datasets import DataError

RAW = os.environ.get("FGRPO_DATA") or str(Path(__file__).resolve().parents[2] / "shared" / "data")
real = pytest.mark.skipif(not Path(RAW).is_dir(), reason=f"no raw files at {RAW}: set FGRPO_DATA to their folder")


def load(name, folder, prepared, catalogue=None):
    return datasets.load(DataConfig(name=name, manual_dir=str(folder), prepared_dir=str(prepared)), catalogue)


def lengths(dataset):
    return {name: len(split) for name, split in dataset.splits.items()}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def refused_in_one_line(folder, message, prepare):
    """`prepare` says what is wrong in one line, and leaves nothing in folder/prepared."""
    with pytest.raises(DataError, match=message) as error:
        prepare()
    assert "\n" not in str(error.value)
    assert not [path for path in (folder / "prepared").rglob("*") if path.is_file()]
