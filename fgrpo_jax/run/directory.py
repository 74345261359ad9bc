"""A run directory: everything a run writes, and the rules by which it is entered again.

config.json       the configuration; what may change in it says changes.py
data.json         fingerprints of the data splits, and the catalogue's items
tokenizer/, ...   what its policies say of themselves: policies/llm/files.py, policies/ranker/files.py
start.json        the run that `start_from` named, and where it lies from here
metrics.jsonl     one row per logged step: {"stage", "step", name: value, ...}
samples.jsonl     lists of a few validation queries, at every evaluation
sft/, rl/, ...    of every stage: checkpoints/ and done.json (written when it is complete)
eval/SPLIT/       evaluations, each with its report.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fgrpo_jax import config_files
from fgrpo_jax.config import ConfigError, RunConfig
from fgrpo_jax.files import (
    TRIAL,
    check_reachable,
    check_writable,
    follow,
    is_address,
    partial_of,
    path_of,
    read_json,
    relative,
    storing,
    write_atomically,
)
from fgrpo_jax.run import changes
from fgrpo_jax.run.checkpoint import steps_in, unpin
from fgrpo_jax.run.experiment import KNOWN
from fgrpo_jax.run.log import MetricsLog
from fgrpo_jax.run.validation import problems_of
from fgrpo_jax.stages import from_start, stages

_LOCK = ".lock"
_DATA = ("kind", "fingerprints", "catalogue")  # what data.json holds


def check(config: RunConfig) -> Path:
    """The run directory of a configuration, which may be entered; nothing is written.

    Raises ConfigError when it holds something that is no run, or belongs to another
    configuration (every differing field is named that may not change: see changes.py).
    """
    run_dir = path_of(config.run_dir)
    check_reachable(run_dir)
    saved = run_dir / "config.json"
    if saved.is_file():
        if (system := read_config(run_dir).SYSTEM) != config.SYSTEM:
            raise ConfigError(f"{run_dir} belongs to a run of {system!r}, not {config.SYSTEM!r}: choose another")
        if lines := changes.refused(_before(run_dir, config), config, _reached(run_dir, config)):
            raise ConfigError(
                f"{run_dir} belongs to another configuration; choose another run_dir, or restore:\n"
                + "\n".join(f"  - {line}" for line in lines)
            )
    elif run_dir.is_dir() and {path.name for path in run_dir.iterdir()} - {partial_of(saved).name, _LOCK, TRIAL}:
        raise ConfigError(f"{run_dir} is not empty, and no run: it holds no config.json; choose another run_dir")
    return run_dir


def enter(config: RunConfig) -> Path:
    """Enter a run directory that is locked: what changed in its configuration is said and written.

    Raises what `check` raises, and StorageError.
    """
    run_dir = check(config)
    if (run_dir / "config.json").is_file():
        _announce(run_dir, config)
        _reopen(run_dir, config)
    write_atomically(run_dir / "config.json", config_files.to_json(config))
    return run_dir


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Make the run directory, and hold it alone: another program that trains in it is refused.

    The lock (flock) belongs to the open file, so the system lets go of it however a process
    ends. Of the processes of one run the first one holds it. A file system may not know locks,
    or only within one machine (some network file systems): the first is said, the second cannot
    be told. An address knows none. Raises StorageError when the directory cannot be written,
    ConfigError when it is held.
    """
    check_writable(run_dir)
    if is_address(run_dir):
        print(f"note: {run_dir} cannot be locked (no address can): let no other program train in it")
        yield
        return
    path = run_dir / _LOCK
    with storing(path):
        file = path.open("a+", encoding="utf-8")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another program"
            raise ConfigError(
                f"{run_dir} is in use by {holder}: wait until it ends, stop it, or choose another run_dir"
            ) from None
        except OSError as error:
            print(f"note: {run_dir} cannot be locked ({error.strerror}): let no other program train in it")
        else:
            with storing(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
                file.flush()
        yield


def _before(run_dir: Path, config: RunConfig) -> RunConfig:
    """The configuration in a run directory; a start that only lies elsewhere now is not another."""
    before, record = read_config(run_dir), _read_start(run_dir)
    if record and config.start_from and _is_same(record["mark"], _mark(path_of(config.start_from), config)):
        before = dataclasses.replace(before, start_from=config.start_from)
    return before


def _reached(run_dir: Path, config: RunConfig) -> dict[str, changes.Reached]:
    return {
        name: changes.Reached(
            latest=max(steps_in(run_dir / name / "checkpoints"), default=None),
            ended=read_done(run_dir, name)["step"] if is_done(run_dir, name) else None,
        )
        for name in stages(config)
    }


def _announce(run_dir: Path, config: RunConfig) -> None:
    if note := earlier_version(run_dir):
        print(f"note: {note}")
    before = dataclasses.replace(read_config(run_dir), run_dir=config.run_dir)
    for line in config_files.differences(before, config).values():
        print(f"changed   {line}")


def _reopen(run_dir: Path, config: RunConfig) -> None:
    """Undo what stages that are to go on did only because they had come to their end.

    Done before the new configuration is written, and the same when it is done again: killed
    in between, the run is still that of the old one, or of the new one once it is given again.
    """
    before, reached = read_config(run_dir), _reached(run_dir, config)
    for name, new in stages(config).items():
        stage, here = stages(before)[name], reached[name]
        if not changes.reopens(stage, new, here):
            continue
        (run_dir / name / "done.json").unlink(missing_ok=True)
        unpin(run_dir / name / "checkpoints")
        logged, evaluated = (here.latest % every != 0 for every in (before.log_every, stage.eval_every))
        MetricsLog(run_dir, (), True).forget_last(name, here.latest, logged, evaluated)
        print(f"{name}: goes on from step {here.latest}")


def read_config(run_dir: Path) -> RunConfig:
    """Raises ConfigError when the directory is no run, of an incompatible version, or was edited into nonsense."""
    check_reachable(run_dir)
    path = config_files.config_of_run(run_dir)
    try:
        config = config_files.from_json(path.read_bytes().decode("utf-8"))
    except ConfigError as error:
        raise ConfigError(f"{path} is not a configuration of this version of fgrpo_jax ({error})") from None
    if problems := problems_of(config, KNOWN):
        raise ConfigError(f"{path} is no configuration: {'; '.join(problems)}")
    return config


def earlier_version(run_dir: Path) -> str:
    """A line that names what a config.json of an earlier version lacks; empty where it lacks nothing."""
    path = run_dir / "config.json"
    if names := config_files.absent(path.read_bytes().decode("utf-8")):
        return f"{path} is of an earlier version, and gets the defaults of {', '.join(names)}"
    return ""


# --------------------------------------------------------------------- finished stages


def is_done(run_dir: Path, name: str) -> bool:
    return (run_dir / name / "done.json").is_file()


def read_done(run_dir: Path, name: str) -> dict[str, Any]:
    """The record of a finished stage: its last step, the best one, and the metric that chose it."""
    return read_json(run_dir / name / "done.json", ("step", "best_step"))


# --------------------------------------------------------------------- the run it started from


def start_dir(run_dir: Path, config: RunConfig) -> Path:
    """Where the run that `start_from` names lies: as recorded, from the run directory on, or as given.

    Recorded, because then the working directory does not matter and two runs that are moved
    together find each other; as given, where the recorded run lies there and no more here.
    """
    given, record = path_of(config.start_from), _read_start(run_dir)
    if record is None:
        return given
    recorded = follow(run_dir, record["run"])
    fits = [_is_same(record["mark"], _mark(place, config)) for place in (given, recorded)]
    return given if fits == [True, False] else recorded


def record_start(run_dir: Path, config: RunConfig) -> None:
    """Note which run this one starts from, and where it lies; nothing where it is gone or another."""
    given, record = path_of(config.start_from), _read_start(run_dir)
    mark = _mark(given, config)
    if mark and (record is None or _is_same(record["mark"], mark)):
        place = relative(given, run_dir)
        write_atomically(run_dir / "start.json", json.dumps({"run": place, "mark": mark}, indent=1) + "\n")


def lacking_start(run_dir: Path, config: RunConfig) -> str:
    """Why the run that this one started from cannot be had; empty where it can."""
    start, record = start_dir(run_dir, config), _read_start(run_dir)
    mark = _mark(start, config)
    if mark is None:
        return f"there is no run with a finished {' and '.join(from_start(config))} stage at {start}"
    if record and not _is_same(record["mark"], mark):
        names = " or ".join(from_start(config))
        return f"{start} is not, or no more, the run that {run_dir} started from: its {names} stage ended otherwise"
    return ""


def _read_start(run_dir: Path) -> dict[str, Any] | None:
    path = run_dir / "start.json"
    return read_json(path, ("run", "mark")) if path.is_file() else None


def _is_same(recorded: dict[str, Any], mark: dict[str, Any] | None) -> bool:
    """Whether two marks are of one run: where more stages read it than when it was recorded, by what both name."""
    return mark is not None and all(mark[name] == value for name, value in recorded.items() if name in mark)


def _mark(start: Path, config: RunConfig) -> dict[str, Any] | None:
    """What tells a start from another: its seed, and how the stages taken from it ended; None: they did not."""
    names = from_start(config)
    if not names or not (start / "config.json").is_file() or not all(is_done(start, name) for name in names):
        return None
    return {"seed": read_config(start).seed, **{name: read_done(start, name) for name in names}}


# --------------------------------------------------------------------- data


def check_data(run_dir: Path, kind: str, fingerprints: dict[str, str], catalogue: Any, write: bool = True) -> None:
    """Record what the run was trained on; refuse to go on with other data under the same name.

    A split that was not there before is added: it does not invalidate anything.
    """
    path = run_dir / "data.json"
    known = read_json(path, _DATA) if path.is_file() else {"fingerprints": {}, "kind": kind}
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
    if write and merged != known:
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
    return read_json(path, _DATA)
