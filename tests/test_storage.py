"""A full disk, files that may not be written, two programs in one run directory: one line, and nothing is lost."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import pytest
from helpers import quick_runs
from tiny import ROOT, changed, config_file, contents, rows, run_training, tiny_config, write_world

import eval as evaluation
from fgrpo_jax import files
from fgrpo_jax.config import ConfigError
from fgrpo_jax.files import StorageError, write_atomically
from fgrpo_jax.run import directory as run


@pytest.fixture(scope="module", autouse=True)
def quickly():
    with quick_runs():
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run nobody disturbs."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "data").mkdir()
    write_world(folder / "data")
    config = tiny_config(folder / "data", folder / "prepared", folder / "run", sft_steps=5)
    assert run_training(config) == 0
    return config, folder / "run"


def environment(**more):
    cache = jax.config.jax_compilation_cache_dir
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": cache}
    return {**os.environ, **quick, **more}


# --------------------------------------------------------------------- what cannot be written


FULL = """
    import resource, sys
    sys.path.append({root!r})
    import train
    for limit in {limits}:  # the same command again and again, while no file may be larger
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        print("returned", train.main([{config!r}]), file=sys.stderr, flush=True)
"""


def test_a_full_disk_stops_a_run_that_goes_on_once_there_is_room(made, tmp_path):
    """Files may grow a bit larger each time, and with them the places where it stops."""
    config, whole = made
    config = changed(config, {"run_dir": str(tmp_path / "run")})
    limits = (100, 6000, 7000, 20_000)
    names = {"root": str(ROOT), "limits": limits, "config": config_file(config, tmp_path / "c.py")}
    script = textwrap.dedent(FULL).format(**names)
    env = environment(PYTHONWARNINGS="ignore")  # JAX's, of its cache of programs
    child = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert child.returncode == 0, child.stderr[-3000:]
    said = [line for line in child.stderr.splitlines() if line.startswith(("error: ", "returned "))]
    assert [line for line in said if line.startswith("returned")] == ["returned 2"] * len(limits), said
    stopped_at = [line.removeprefix(f"error: {tmp_path}/run/").split(" could")[0] for line in said[::2]]
    expected = ["config.json", "sft/checkpoints", "sft/checkpoints", "eval/validation"]
    assert stopped_at == expected, said
    assert all(
        line.endswith(
            " could not be written (File too large): what was complete before is whole; mend it, and give the same "
            "command again"
        )
        for line in said[::2]
    )
    left = [path for path in (tmp_path / "run").rglob("*") if "partial" in path.name and path.is_file()]
    assert not left
    assert run_training(config) == 0
    assert rows(tmp_path / "run") == rows(whole)
    assert (tmp_path / "run" / "sft" / "done.json").read_bytes() == (whole / "sft" / "done.json").read_bytes()
    assert contents(tmp_path / "run" / "eval") == contents(whole / "eval")


WAITING = """
    import runpy, sys, threading, time
    from fgrpo_jax import config
    from fgrpo_jax.run import validation
    def refuse(*arguments):
        threading.Thread(target=time.sleep, args=(500,)).start()
        raise config.ConfigError("it cannot be")
    validation.validate = refuse
    sys.argv = [{program!r}]
    runpy.run_path({program!r}, run_name="__main__")
"""


def test_a_run_that_failed_waits_for_no_thread():
    """As those that Orbax leaves after a checkpoint that could not be written."""
    script = textwrap.dedent(WAITING).format(program=str(ROOT / "train.py"))
    child = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (child.returncode, child.stderr) == (2, "error: it cannot be\n")


@pytest.fixture
def full(monkeypatch):
    """No file can be put in its place."""

    def refuse(*paths):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", refuse)


def test_a_file_that_cannot_be_replaced_stays(tmp_path, full):
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(StorageError) as error:
        write_atomically(tmp_path / "config.json", "new")
    assert str(error.value).startswith(f"{tmp_path / 'config.json'} could not be written (No space left on device): ")
    assert contents(tmp_path) == {"config.json": b"old"}


def test_only_what_the_system_refuses_is_called_so():
    """Libraries raise it as errors of their own; a mistake of ours must not look like a full disk."""
    with pytest.raises(StorageError, match="^it could not be written .Disk quota exceeded.: "):
        with files.storing("it", Exception):
            raise ValueError("RESOURCE_EXHAUSTED: Failed writing: Disk quota exceeded [os_error_code='122']")
    for kinds in ((), (Exception,)):
        with pytest.raises(AttributeError, match="no attribute"), files.storing("it", *kinds):
            raise AttributeError("no attribute")


def test_an_evaluation_that_cannot_be_written_leaves_the_old_one(made, full, capsys):
    _, directory = made
    before = contents(directory)
    assert evaluation.main([str(directory), "--eval.bootstrap", "10"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        f"error: {directory / 'eval' / 'validation'} could not be written (No space left on device): "
    )
    assert contents(directory) == before


def test_what_may_not_be_written_is_known_before_anything_is_decoded(made, monkeypatch, capsys):
    _, directory = made

    def refuse(**where):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(files.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(evaluation, "predict", None)
    assert evaluation.main([str(directory)]) == 2
    assert "eval could not be written (Read-only file system)" in capsys.readouterr().err
    assert run_training(changed(made[0], {})) == 2
    assert f"error: {directory} could not be written (Read-only file system)" in capsys.readouterr().err


# --------------------------------------------------------------------- two programs


def test_a_run_directory_is_held_by_one_program(tmp_path, capsys):
    with run.locked(tmp_path / "run"):
        message = f"run is in use by process {os.getpid()} on {socket.gethostname()}: wait until it ends, stop it, or"
        with pytest.raises(ConfigError, match=message):
            with run.locked(tmp_path / "run"):
                raise AssertionError("two hold it")
    with run.locked(tmp_path / "run"):  # let go of
        assert not capsys.readouterr().out


def test_a_killed_program_holds_nothing(tmp_path):
    script = f"""
        import os, signal
        from pathlib import Path
        from fgrpo_jax.run import directory as run
        with run.locked(Path({str(tmp_path)!r})):
            os.kill(os.getpid(), signal.SIGKILL)
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], env=environment(), timeout=120)
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")
    with run.locked(tmp_path):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} ")


def test_a_file_system_without_locks_is_used_and_that_is_said(tmp_path, monkeypatch, capsys):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run.fcntl, "flock", refuse)
    with run.locked(tmp_path), run.locked(tmp_path):
        said = f"note: {tmp_path} cannot be locked (No locks available): let no other program train in it\n"
        assert capsys.readouterr().out == 2 * said


def test_a_second_program_of_two_processes_ends_in_both(made, capsys):
    """The first process cannot enter, and the other is not left waiting for it."""
    config, directory = made
    before = contents(directory)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "train.py"), config_file(config, directory.with_suffix(".py"))]
    several = {"FGRPO_COORDINATOR": f"localhost:{port}", "FGRPO_NUM_PROCESSES": "2"}
    with run.locked(directory):
        both = [
            subprocess.Popen(
                command, env=environment(**several, FGRPO_PROCESS_ID=str(i)), stderr=subprocess.PIPE, text=True
            )
            for i in range(2)
        ]
        try:
            said = [child.communicate(timeout=300)[1] for child in both]
        finally:
            for child in both:
                child.kill()
                child.communicate()
    assert [child.returncode for child in both] == [2, 2], said
    assert f"error: {directory} is in use by process {os.getpid()} " in said[0]
    assert "error: the first process of this run could not start: see what it says\n" in said[1]
    assert {name: text for name, text in contents(directory).items() if name != ".lock"} == {
        name: text for name, text in before.items() if name != ".lock"
    }
    assert json.loads((directory / "sft" / "done.json").read_text())["step"] == 5
