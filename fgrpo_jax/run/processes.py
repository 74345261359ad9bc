"""The processes of a run: how they find each other, agree, and end where one of them does.

One process for each host of a pod, all with the same command. Nothing here does anything where
a run has one process only.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import re
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from fgrpo_jax.config import ConfigError
from fgrpo_jax.data.datasets import DataError
from fgrpo_jax.types import PyTree

_COORDINATOR, _PROCESSES, _PROCESS = "FGRPO_COORDINATOR", "FGRPO_NUM_PROCESSES", "FGRPO_PROCESS_ID"
_DETECT = "FGRPO_DISTRIBUTED"

_SILENCE = 40  # seconds without a sign of life after which JAX takes a process for gone (its default: 100)
_LAST = 3600  # seconds that others wait at their end for process 0, which writes the evaluation (JAX: 300)
_PATIENCE = 10  # seconds that a failing process gives the others to fail too
_ROUND = 1000  # milliseconds
_RESUME = "run the same command on all hosts: it resumes from the last checkpoint"


# --------------------------------------------------------------------- the beginning


def initialize_distributed(environ: Mapping[str, str] = os.environ) -> bool:
    """Join the other processes of a run, where the environment says that there are some.

    FGRPO_COORDINATOR=host:port, FGRPO_NUM_PROCESSES and FGRPO_PROCESS_ID, all three: join
    explicitly. FGRPO_DISTRIBUTED=auto: let JAX find the cluster (TPU pods, SLURM, MPI).
    None of them: one process, nothing happens and False is returned.

    Must come before the first use of a device. Raises ConfigError when the variables
    contradict each other or some are missing.
    """
    given = {name: environ[name] for name in (_COORDINATOR, _PROCESSES, _PROCESS) if name in environ}
    detect = environ.get(_DETECT, "")
    if detect not in ("", "auto"):
        raise ConfigError(f"{_DETECT}={detect!r}: the only value is 'auto'; leave it unset for one process")
    if detect and given:
        raise ConfigError(f"{_DETECT}=auto finds the cluster itself: unset {', '.join(given)}, or unset it")
    if not given and not detect:
        return False
    where = {} if detect else _explicit(given)
    jax.distributed.initialize(**where, heartbeat_timeout_seconds=_SILENCE, shutdown_timeout_seconds=_LAST)
    if jax.process_count() > 1:
        _watch()
    return True


def _explicit(given: Mapping[str, str]) -> dict[str, str | int]:
    if missing := [name for name in (_COORDINATOR, _PROCESSES, _PROCESS) if name not in given]:
        raise ConfigError(f"{', '.join(given)} without {', '.join(missing)}: set all three or none")
    try:
        processes, process = int(given[_PROCESSES]), int(given[_PROCESS])
    except ValueError:
        raise ConfigError(f"{_PROCESSES} and {_PROCESS} must be whole numbers, not {dict(given)}") from None
    if not 0 <= process < processes:
        raise ConfigError(f"{_PROCESS}={process} must be from 0 to {_PROCESSES} - 1 = {processes - 1}")
    return {"coordinator_address": given[_COORDINATOR], "num_processes": processes, "process_id": process}


# --------------------------------------------------------------------- what all have to agree on


def check_same(told: Mapping[str, str]) -> None:
    """Refuse to begin where processes would compute different things, and wait for each other or add them up.

    told: by name, as "configuration", what has to be the same text everywhere; the same names everywhere.
    Raises ConfigError, in all processes, that says which of them were told otherwise than process 0.
    """
    if jax.process_count() == 1:
        return
    mine = [np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8) for text in told.values()]
    everyones = multihost_utils.process_allgather(np.stack(mine))  # [process, name, 32]
    for name, differs in zip(told, (everyones != everyones[0]).any(-1).T, strict=True):
        if others := np.flatnonzero(differs).tolist():
            raise ConfigError(
                f"process {', '.join(map(str, others))} of {len(everyones)}: another {name} than process 0; "
                "give the same command on all hosts, with the same code and files"
            )


def code() -> str:
    """The text of this package, of which hosts may have different revisions."""
    package = Path(__file__).parent
    return "".join(f"{path.relative_to(package)}\n{path.read_text()}" for path in sorted(package.rglob("*.py")))


def note(text: str) -> None:
    """Say something once."""
    if jax.process_index() == 0:
        print(f"note: {text}")


def warn(text: str) -> None:
    """Say something once, on standard error."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)


def on_first(action: Callable[[], None]) -> None:
    """Do something on the first process; every process goes on when it is done.

    Raises there what `action` raises, and ConfigError on the others, so that none waits for it.
    """
    failure = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as error:
            failure = error
    failed = failure is not None
    if jax.process_count() > 1:
        failed = bool(multihost_utils.broadcast_one_to_all(np.bool_(failed)))
    if failure:
        raise failure
    if failed:
        raise ConfigError("the first process of this run could not start: see what it says")


def attempted(encode: Callable[[], PyTree]) -> PyTree | DataError:
    """What it makes, or the DataError it raises: for `alike`."""
    try:
        return encode()
    except DataError as error:
        return error


def alike(mine: PyTree | DataError, blank: PyTree) -> PyTree:
    """This process's rows in the shapes of the whole batch.

    mine: a pytree of numpy arrays `[B of this process, ...]`, or why there is none. blank: the same tree, of
    arrays `[1, ...]` of what each is padded with. The other dimensions become the largest of
    any process's, by one exchange of a few numbers, which waits for the devices.
    Raises DataError in all processes, instead of leaving some waiting, where one has none.
    """
    error = mine if isinstance(mine, DataError) else None
    if jax.process_count() == 1:
        if error:
            raise error
        return mine
    mine = blank if error else mine
    sizes = [size for x in jax.tree.leaves(mine) for size in x.shape[1:]]
    told = multihost_utils.process_allgather(np.array([error is not None, *sizes], np.int32))
    if error:
        raise error
    if len(refusing := np.flatnonzero(told[:, 0])):
        raise DataError(f"process {refusing[0]} cannot encode its queries of this batch, and says there why")
    largest = iter(told[:, 1:].max(0).tolist())
    return jax.tree.map(lambda x, fill: _padded(x, fill, [next(largest) for _ in x.shape[1:]]), mine, blank)


def _padded(x: np.ndarray, fill: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    made = np.full((x.shape[0], *sizes), fill, x.dtype)
    made[tuple(slice(size) for size in x.shape)] = x
    return made


# --------------------------------------------------------------------- the end


def end_together(run: Callable[[], int]) -> int:
    """The exit code of `run`; where it is not 0 in one process only, that process ends here and now.

    For the way out of Python waits at JAX's for all processes, minutes long, while they wait in
    a collective for this one. An exception of `run` is shown, and 1.
    """
    try:
        code = run()
    except Exception:
        if not jax.distributed.is_initialized():
            raise
        traceback.print_exc()
        mine = f"process {jax.process_index()} of {jax.process_count()}"
        print(f"error: {mine} failed (above). If another one was lost, see its output, and {_RESUME}", file=sys.stderr)
        code = 1
    if code and jax.distributed.is_initialized():
        _leave(code)
    return code


def _leave(code: int) -> None:
    """Return once the others leave too and none of them is connected, or end the process."""
    sys.stdout.flush(), sys.stderr.flush()
    try:
        ocp.multihost.get_barrier_sync_fn()(key="leaving", timeout_ms=1000 * _PATIENCE)
        jax.distributed.shutdown()  # or one that ends first would make JAX abort the others
    except jax.errors.JaxRuntimeError:
        os._exit(code)


def _watch() -> None:
    """Have a thread say which process is gone, and end this one, as JAX is about to.

    Where a process has been silent too long, the coordination service, which lives in process 0,
    lets all others abort from a thread that no handler in Python hears. A barrier that nobody
    else reaches ends by the same error, a little earlier. Where process 0 itself is gone, JAX
    aborts at once, and says so.
    """
    wait = ocp.multihost.get_barrier_sync_fn()
    mine = f"process {jax.process_index()} of {jax.process_count()}"
    ending = threading.Event()

    def watch() -> None:
        while not ending.is_set():
            try:
                wait(key=f"{mine} watches", timeout_ms=_ROUND)
            except jax.errors.JaxRuntimeError as error:
                if silent := re.search(r"Task (\d+) heartbeat timeout", str(error)):
                    sys.stdout.flush()
                    message = f"error: process {silent[1]} is gone, so {mine} ends too: see its output, and {_RESUME}"
                    print(message, file=sys.stderr, flush=True)
                    os._exit(1)
                if "DEADLINE_EXCEEDED" not in str(error):
                    return

    def stop() -> None:
        ending.set()
        thread.join()  # Python must not end under a thread that is in C++

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    atexit.register(stop)  # before JAX's own, which ends barriers too
    print(f"{mine}: should another one be lost, this one ends within {_SILENCE} s; then {_RESUME}", flush=True)
