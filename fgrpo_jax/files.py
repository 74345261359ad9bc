"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: Path, text: str) -> None:
    """The file is there whole or not at all, also when the process is killed."""
    partial_of(path).write_text(text, encoding="utf-8")
    os.replace(partial_of(path), path)


def partial_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")
