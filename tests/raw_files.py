"""For tests of builders: writing raw files, loading them, and the real ones where they are.

Tests on the real files run when FGRPO_DATA names a folder with lastfm/ and musique/ in it.
"""

import gzip
import json
import os

import pytest

from fgrpo_jax import datasets
from fgrpo_jax.config import DataConfig

RAW = os.environ.get("FGRPO_DATA", "")
real = pytest.mark.skipif(not RAW, reason="FGRPO_DATA does not name a folder of real raw files")


def load(name, folder, prepared, catalogue=None):
    return datasets.load(DataConfig(name=name, manual_dir=str(folder), prepared_dir=str(prepared)), catalogue)


def lengths(dataset):
    return {name: len(split) for name, split in dataset.splits.items()}


def lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
