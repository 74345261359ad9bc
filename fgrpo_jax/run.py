"""A run directory: everything a run writes, and the rules by which it is entered again.

    config.json       the configuration; another one in it is refused
    data.json         fingerprints of the data splits, and the catalogue's items
    tokenizer/        the tokenizer
    model.json        sizes of the decoder
    hf_config.json    config.json of the Hugging Face checkpoint it started from, if any
    start.json        the run that `start_from` named, and where it lies from here
    metrics.jsonl     one row per logged step: {"stage", "step", name: value, ...}
    sft/, rl/         checkpoints/ and done.json (written when the stage is complete)
    curves.png        training curves of both phases
    eval/SPLIT/       evaluations
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from fgrpo_jax import config as config_lib
from fgrpo_jax.config import Config, ConfigError


def write_atomically(path: Path, text: str) -> None:
    """The file is there whole or not at all, also when the process is killed."""
    _partial(path).write_text(text, encoding="utf-8")
    os.replace(_partial(path), path)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.partial")


def check(config: Config) -> Path:
    """The run directory of a configuration, which may be entered; nothing is written.

    Raises ConfigError when it holds something that is no run, or belongs to another
    configuration (every differing field is named; where the directory lies does not count, nor
    where the run lies that it started from).
    """
    run_dir = Path(config.run_dir).expanduser()
    saved = run_dir / "config.json"
    if saved.is_file():
        before = read_config(run_dir)
        if before.start_from != config.start_from and _same_start(run_dir, config):
            before = dataclasses.replace(before, start_from=config.start_from)
        if differing := config_lib.differences(_placeless(before), _placeless(config)):
            raise ConfigError(
                f"{run_dir} belongs to another configuration; choose another run_dir, or restore:\n"
                + "\n".join(f"  - {line}" for line in differing)
            )
    elif run_dir.is_dir() and {path.name for path in run_dir.iterdir()} - {_partial(saved).name}:
        raise ConfigError(f"{run_dir} is not empty, and no run: it holds no config.json; choose another run_dir")
    return run_dir


def enter(config: Config, is_main: bool = True) -> Path:
    """Create the run directory, or enter one of the same configuration.

    Raises ConfigError when it cannot be written, and what `check` raises.
    """
    run_dir = check(config)
    if is_main:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            write_atomically(run_dir / "config.json", config_lib.to_json(config))
        except OSError as error:
            raise ConfigError(f"run_dir {run_dir} cannot be written ({error}): choose another") from None
    return run_dir


def _same_start(run_dir: Path, config: Config) -> bool:
    """Whether `start_from` names the run that was recorded, wherever it lies now."""
    record = _read_start(run_dir)
    return record is not None and record["mark"] == _mark(Path(config.start_from).expanduser())


def _placeless(config: Config) -> Config:
    return dataclasses.replace(config, run_dir="")


def read_config(run_dir: Path) -> Config:
    """Raises ConfigError when the directory is no run, or of an incompatible version."""
    path = run_dir / "config.json"
    if not path.is_file():
        raise ConfigError(f"{run_dir} is not a run directory: it holds no config.json")
    try:
        return config_lib.from_json(path.read_text(encoding="utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path} is not a configuration of this version of fgrpo_jax ({error})") from None


# --------------------------------------------------------------------- finished stages


def is_done(run_dir: Path, name: str) -> bool:
    return (run_dir / name / "done.json").is_file()


def read_done(run_dir: Path, name: str) -> dict[str, Any]:
    """The record of a finished stage: its last step, the best one, and the metric that chose it."""
    return json.loads((run_dir / name / "done.json").read_text(encoding="utf-8"))


# --------------------------------------------------------------------- the run it started from


def start_dir(run_dir: Path, config: Config) -> Path:
    """Where the run that `start_from` names lies: as recorded, from the run directory on, or as given.

    Recorded, because then the working directory does not matter and two runs that are moved
    together find each other; as given, where the recorded run lies there and no more here.
    """
    given, record = Path(config.start_from).expanduser(), _read_start(run_dir)
    if record is None:
        return given
    recorded = (run_dir / record["run"]).resolve()
    return given if _mark(given) == record["mark"] != _mark(recorded) else recorded


def record_start(run_dir: Path, config: Config) -> None:
    """Note which run this one starts from, and where it lies; nothing where it is gone or another."""
    given, record = Path(config.start_from).expanduser(), _read_start(run_dir)
    mark = _mark(given)
    if mark and (record is None or record["mark"] == mark):
        place = os.path.relpath(given.resolve(), run_dir.resolve())
        write_atomically(run_dir / "start.json", json.dumps({"run": place, "mark": mark}, indent=1) + "\n")


def lacking_start(run_dir: Path, config: Config) -> str:
    """Why the run that this one started from cannot be had; empty where it can."""
    start, record = start_dir(run_dir, config), _read_start(run_dir)
    mark = _mark(start)
    if mark is None:
        return f"there is no run with a finished sft stage at {start}"
    if record and record["mark"] != mark:
        return f"{start} is not, or no more, the run that {run_dir} started from: its sft stage ended otherwise"
    return ""


def _read_start(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "start.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _mark(start: Path) -> dict[str, Any] | None:
    """What tells a start from another: its seed, and how its sft stage ended; None where it did not."""
    if not ((start / "config.json").is_file() and is_done(start, "sft")):
        return None
    return {"seed": read_config(start).seed, "sft": read_done(start, "sft")}


# --------------------------------------------------------------------- data


def check_data(
    run_dir: Path, kind: str, fingerprints: dict[str, str], catalogue: Any, is_main: bool = True
) -> None:
    """Record what the run was trained on; refuse to go on with other data under the same name.

    A split that was not there before is added: it does not invalidate anything.
    """
    path = run_dir / "data.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"fingerprints": {}, "kind": kind}
    if known["kind"] != kind:
        raise ConfigError(
            f"{run_dir} was started with {known['kind']} prompts, and its data now make {kind} ones: a raw file "
            "was added or taken away; restore it, or choose another run_dir"
        )
    for split, value in fingerprints.items():
        if known["fingerprints"].get(split, value) != value:
            raise ConfigError(
                f"the {split} split is not the one {run_dir} was started with (fingerprint {value}, "
                f"was {known['fingerprints'][split]}): restore the raw files, or choose another run_dir"
            )
    merged = {
        "kind": kind,
        "fingerprints": known["fingerprints"] | fingerprints,
        "catalogue": [list(item) for item in catalogue],
    }
    if is_main and merged != known:
        write_atomically(path, json.dumps(merged, ensure_ascii=False, sort_keys=True) + "\n")


def read_catalogue(run_dir: Path) -> tuple[tuple[str, str], ...]:
    return tuple((item, text) for item, text in _read_data(run_dir)["catalogue"])


def read_fingerprints(run_dir: Path) -> dict[str, str]:
    """Split -> content hash, of the data the run was trained on."""
    return _read_data(run_dir)["fingerprints"]


def read_kind(run_dir: Path) -> str:
    """Which prompts the run was trained on: "recommendation" or "qa"."""
    return _read_data(run_dir)["kind"]


def _read_data(run_dir: Path) -> dict[str, Any]:
    path = run_dir / "data.json"
    if not path.is_file():
        raise ConfigError(f"{run_dir} holds no data.json: nothing was trained in it yet")
    return json.loads(path.read_text(encoding="utf-8"))


class MetricsLog:
    """metrics.jsonl, and TensorBoard where asked for. Only the main process writes."""

    def __init__(self, run_dir: Path, tensorboard: bool, is_main: bool):
        self.path, self._is_main, self._board = run_dir / "metrics.jsonl", is_main, None
        if tensorboard and is_main:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ConfigError(
                    "tensorboard=True needs the `log` extra: pip install -e '.[log]'"
                ) from None
            self._board = SummaryWriter(str(run_dir / "tensorboard"))

    def _lines(self) -> list[str]:
        """Whole lines: a last one without its end was torn by a kill."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
        return [line for line in lines if line.endswith("\n")]

    def rows(self, stage: str) -> list[dict[str, Any]]:
        return [row for line in self._lines() if (row := json.loads(line))["stage"] == stage]

    def forget_after(self, stage: str, step: int) -> None:
        """Drop what an interrupted run logged beyond the checkpoint it resumes from."""
        if not (self._is_main and self.path.is_file()):
            return
        lines = [(line, json.loads(line)) for line in self._lines()]
        kept = [line for line, row in lines if row["stage"] != stage or row["step"] <= step]
        write_atomically(self.path, "".join(kept))

    def write(self, stage: str, step: int, values: dict[str, float]) -> None:
        if not self._is_main:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(f"{stage}/{name}", value, step)

    def close(self) -> None:
        if self._board:
            self._board.close()


class Progress:
    """One line per log interval; `\\r` would be unreadable in a file, so lines only."""

    def __init__(self, stage: str, start: int, steps: int, queries: int, is_main: bool):
        self._stage, self._steps, self._queries, self._is_main = stage, steps, queries, is_main
        self._last_step, self._last_time = start, time.monotonic()

    def rate(self, step: int) -> float:
        """Queries per second since the last call (or `skip`)."""
        now = time.monotonic()
        rate = (step - self._last_step) * self._queries / max(now - self._last_time, 1e-9)
        self._last_step, self._last_time = step, now
        return rate

    def skip(self, step: int) -> None:
        """Time spent evaluating is not throughput."""
        self._last_step, self._last_time = step, time.monotonic()

    def line(self, step: int, values: dict[str, float], rate: float) -> None:
        if not self._is_main:
            return
        left = (self._steps - step) * self._queries / max(rate, 1e-9)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        print(f"{self._stage} {step}/{self._steps}  {shown}  {rate:.0f} queries/s  ETA {_clock(left)}")
        sys.stdout.flush()


def _clock(seconds: float) -> str:
    seconds = int(min(seconds, 359_999))
    return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"
