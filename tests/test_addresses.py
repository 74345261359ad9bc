"""Runs, prepared data and exports at gs:// addresses, in an emulator of the store on this machine."""

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from helpers import two_processes
from tiny import ROOT, changed, config_file, contents, quick_programs, tiny_config, write_world

import eval as evaluation
import train
from fgrpo_jax import files
from fgrpo_jax.config import ConfigError
from fgrpo_jax.data.datasets import DataError, load
from fgrpo_jax.evaluation import report, seeds
from fgrpo_jax.export import export
from fgrpo_jax.files import StorageError, path_of
from fgrpo_jax.run import directory
from fgrpo_jax.run.checkpoint import Checkpoints, placed, steps_in
from fgrpo_jax.run.stage import Stage

if MISSING := [name for name in ("gcp_storage_emulator", "gcsfs") if importlib.util.find_spec(name) is None]:
    pytest.skip(f"NOTHING at an address is tested: no {', '.join(MISSING)} here", allow_module_level=True)

STARTING = 60  # seconds that the emulator may take
STOPPED = ("rl", 3)  # a step that is not saved anyway


@pytest.fixture(scope="module", autouse=True)
def store():
    """An empty bucket, `gs://pod`; the environment says where it is."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    here = f"http://localhost:{port}"
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([sys.executable, str(ROOT / "tests" / "gcs_emulator.py"), str(port)], **silent)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as ending:
        ending.callback(server.wait)
        ending.callback(server.kill)
        patch.setenv("STORAGE_EMULATOR_HOST", here)
        patch.setenv("TENSORSTORE_GCS_HTTP_URL", here)
        patch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "any")  # TensorStore's
        patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # or gcsfs asks for the kind of the bucket
        patch.setattr(report, "git_revision", lambda: "a commit")  # which may be made meanwhile
        _await(server, port)
        with quick_programs():
            yield


def _await(server, port):
    end = time.monotonic() + STARTING
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("localhost", port)):
            return
        time.sleep(0.1)
    raise TimeoutError("the emulator does not start")


def run_training(config, folder):
    return train.main([config_file(config, folder / "config.py")])


def fetched(address, folder):
    """What is at an address, by its path there."""
    files.fetch(path_of(address), folder)
    return contents(folder)


def without_clock(text):
    clock = ("queries_per_s", "tokens_per_s")
    return [{n: v for n, v in json.loads(line).items() if n not in clock} for line in text.splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run here, which nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "data").mkdir()
    write_world(folder / "data")
    config = tiny_config(folder / "data", folder / "prepared", folder / "run", sft_steps=5, rl_steps=4)
    assert run_training(config, folder) == 0
    return config, folder / "run"


@pytest.fixture(scope="module")
def there(whole, tmp_path_factory):
    """The same run at an address, stopped and resumed."""
    config = changed(whole[0], {"run_dir": "gs://pod/runs/there", "data.prepared_dir": "gs://pod/prepared"})
    on_step = Stage.on_step

    def stop(self, *args, **kwargs):
        going_on = on_step(self, *args, **kwargs)
        if (self.name, self._step + 1) == STOPPED:
            os.kill(os.getpid(), signal.SIGTERM)
        return going_on

    folder = tmp_path_factory.mktemp("there")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "on_step", stop)
        assert run_training(config, folder) == 0
    assert not directory.is_done(path_of(config.run_dir), "rl")
    assert steps_in(f"{config.run_dir}/rl/checkpoints") == [0, 2, 3]
    assert run_training(config, folder) == 0
    return config


# --------------------------------------------------------------------- a run


def test_a_run_stopped_and_resumed_there_is_the_one_made_here(whole, there, tmp_path):
    here, found = contents(whole[1]), fetched(there.run_dir, tmp_path / "copy")
    assert without_clock(found["metrics.jsonl"]) == without_clock(here["metrics.jsonl"])
    del here[".lock"]
    kept = [name for name in here if "/checkpoints/" not in name]
    assert kept == [name for name in found if "/checkpoints/" not in name]
    told_where = {"config.json", "metrics.jsonl", "eval/validation/manifest.json"}  # and how fast
    told_where.add("eval/validation/report.html")
    assert [name for name in kept if found[name] != here[name] and name not in told_where] == []


def test_an_evaluation_there_replaces_the_older_one(whole, there, capsys):
    folder = path_of(there.run_dir) / "eval" / "test"
    assert evaluation.main([there.run_dir, "--split", "test"]) == 0
    (folder / "older.run.trec").write_text("")
    assert evaluation.main([there.run_dir, "--split", "test", "--compare", str(whole[1])]) == 0
    names = {path.name for path in folder.iterdir()}
    assert "run.rl.run.trec" in names and "older.run.trec" not in names and "manifest.json" in names
    scores = json.loads((folder / "metrics.json").read_text())["methods"]
    assert scores["run.rl"] == scores["rl"]  # of the run that was made here
    entry = (f"{there.run_dir}:rl",)
    assert len(seeds.read(*entry, "test", ("ndcg@2",))) == 9


def test_it_goes_on_when_it_is_copied_here(there, tmp_path, capsys):
    files.fetch(path_of(there.run_dir), tmp_path / "copy")
    config = changed(there, {"run_dir": str(tmp_path / "copy"), "data.prepared_dir": str(tmp_path / "prepared")})
    assert run_training(changed(config, {"rl.steps": 6}), tmp_path) == 0
    assert "rl: goes on from step 4\n" in capsys.readouterr().out


def test_a_run_starts_from_one_there(there, tmp_path, capsys):
    """The other one is noted where it lies from here, or by its address."""
    fields = {"start_from": there.run_dir, "sft.steps": 0, "rl.steps": 1, "eval.versus": "sft"}
    for run_dir, place in (("gs://pod/runs/second", "../there"), (str(tmp_path / "second"), there.run_dir)):
        assert run_training(changed(there, fields | {"run_dir": run_dir}), tmp_path) == 0
        assert json.loads((path_of(run_dir) / "start.json").read_text())["run"] == place
        assert evaluation.main([run_dir]) == 0
        assert "note: no row" not in capsys.readouterr().out


def test_it_is_exported_there(whole, there, tmp_path):
    export(there.run_dir, "gs://pod/exported")
    export(str(whole[1]), str(tmp_path / "out"))
    assert fetched("gs://pod/exported", tmp_path / "copy") == contents(tmp_path / "out")


def test_two_processes_train_there(whole, tmp_path):
    config = changed(
        whole[0], {"run_dir": "gs://pod/runs/two", "data.prepared_dir": "gs://pod/two", "mesh.data": 2, "rl.steps": 0}
    )
    quick = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    command = [sys.executable, str(ROOT / "train.py"), config_file(config, tmp_path / "config.py")]
    with two_processes(command, **quick) as both:
        said = [child.communicate(timeout=300)[1] for child in both]
    assert [child.returncode for child in both] == [0, 0], said
    found = fetched(config.run_dir, tmp_path / "copy")
    losses = [  # of SFT
        [row["loss"] for row in without_clock(text) if row["stage"] == "sft" and "loss" in row]
        for text in (found["metrics.jsonl"], (whole[1] / "metrics.jsonl").read_bytes())
    ]
    np.testing.assert_allclose(*losses, rtol=1e-4, atol=1e-6)


# --------------------------------------------------------------------- checkpoints


STATE = {"w": np.arange(6.0, dtype=np.float32), "b": {"c": np.int32(3)}}


def save(place, steps, keep=1, metrics=()):
    with Checkpoints(place, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, jax.tree.map(lambda x: jax.numpy.asarray(x + step), STATE), {"k": step}, None)
        checkpoints.wait()
        return checkpoints.steps()


def test_older_checkpoints_go():
    save("gs://pod/kept", (1, 2, 3, 4), keep=2)
    assert steps_in("gs://pod/kept") == [3, 4]
    assert {path.name for path in path_of("gs://pod/kept").iterdir()} == {"3", "4"}


@pytest.mark.parametrize("left", ["commit", "half"], ids=["killed while saving", "killed while deleting"])
def test_half_a_checkpoint_is_none(left):
    """Nobody reads it, the next process sweeps it, and its step can be saved again."""
    place = path_of(f"gs://pod/{left}")
    save(place, (1, 2), keep=2)
    (place / "2" / "commit_success.txt").unlink()
    if left == "half":
        (place / "2" / "state" / "manifest.ocdbt").unlink()
    with Checkpoints(place, 2, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1] and (place / "2").is_dir()
    assert save(place, (2,), keep=2) == [1, 2]
    with Checkpoints(place, 2, read_only=True) as checkpoints:
        wanted = placed(STATE, jax.tree.map(lambda x: jax.numpy.asarray(x).sharding, STATE))
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y + 2), checkpoints.restore(2, wanted), STATE)


def test_a_process_killed_between_leaves_no_checkpoint_that_reads_as_whole(monkeypatch):
    """What makes it complete goes first."""
    place = path_of("gs://pod/killed")
    save(place, (1, 2), keep=2)
    checkpoints = Checkpoints(place, 1)

    def killed(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints._manager, "delete", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(3, {"w": jax.numpy.zeros(2)}, {}, None)
    assert steps_in(place) == [2] and (place / "1" / "meta").is_dir()
    save(place, (3,))
    assert [path.name for path in place.iterdir()] == ["3"]


# --------------------------------------------------------------------- data, and what goes wrong


def test_prepared_data_are_prepared_once(whole, there, monkeypatch):
    from fgrpo_jax.data import builder

    config = changed(whole[0], {"data.prepared_dir": "gs://pod/once"}).data
    first = load(config)
    monkeypatch.setattr(builder, "_prepare", lambda *args: pytest.fail("prepared twice"))
    again = load(config)
    assert again.fingerprints == first.fingerprints == load(there.data).fingerprints
    assert list(again.splits["test"]) == list(first.splits["test"])
    (home,) = path_of("gs://pod/once/jsonl").iterdir()
    (next(home.glob("*/*/dataset_info.json"))).unlink()
    with pytest.raises(DataError, match="the prepared data in .* are damaged or gone"):
        load(config)


def test_what_cannot_be_written_is_one_line(there, tmp_path, capsys):
    assert run_training(changed(there, {"run_dir": "gs://nowhere/run"}), tmp_path) == 2
    assert "error: gs://nowhere/run could not be written (" in capsys.readouterr().err
    with pytest.raises(StorageError, match="gs://nowhere/x could not be written"):
        files.write_atomically(path_of("gs://nowhere/x"), "")


def test_an_address_that_cannot_be_asked_is_one_line(monkeypatch):
    def refuse(self):
        raise ImportError("Please install gcsfs to access Google Storage")

    monkeypatch.setattr(type(path_of("gs://pod/x")), "exists", refuse)
    with pytest.raises(ConfigError, match="gs://pod/x cannot be reached .Please install gcsfs .*pip install gcsfs"):
        directory.read_config(path_of("gs://pod/x"))


@pytest.mark.parametrize(
    ("path", "folder", "seen"),
    [
        ("gs://b/runs/a", "gs://b/runs/c", "../a"),
        ("gs://b/a", "gs://c/d/e", "../../../b/a"),
        ("gs://b/a", "/runs/c", "gs://b/a"),
        ("/runs/a", "gs://b/c", "/runs/a"),
        ("/runs/a", "/runs/c", "../a"),
    ],
)
def test_a_place_seen_from_another(path, folder, seen):
    path, folder = path_of(path), path_of(folder)
    assert files.relative(path, folder) == seen
    assert files.follow(folder, seen) == path


def test_lines_are_added_to_an_object():
    path = path_of("gs://pod/lines")
    for line in ("a\n", "é\n"):
        files.append(path, line)
    assert path.read_bytes().decode() == "a\né\n"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"run_dir": "s3://b/run"}, "run_dir='s3://b/run': only a folder or a gs:// address"),
        ({"data.manual_dir": "gs://b/raw"}, "data.manual_dir='gs://b/raw': no address"),
        ({"model.checkpoint": "gs://b/qwen"}, "model.checkpoint='gs://b/qwen': no address"),
        ({"run_dir": "gs://b/run", "trackers": ("wandb",)}, "write to no address"),
    ],
)
def test_what_lies_at_no_address_is_refused(whole, tmp_path, capsys, fields, message):
    assert run_training(changed(whole[0], fields), tmp_path) == 2
    assert message in capsys.readouterr().err
