"""Several processes: how they begin, and how all end when one is gone."""

import signal
import sys
import textwrap

import pytest
from helpers import two_processes
from tiny import ROOT, config_file, tiny_config, write_world

from fgrpo_jax.config import ConfigError
from fgrpo_jax.run.processes import initialize_distributed


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"FGRPO_COORDINATOR": "a:1"}, "without FGRPO_NUM_PROCESSES, FGRPO_PROCESS_ID"),
        ({"FGRPO_DISTRIBUTED": "yes"}, "only value is 'auto'"),
        ({"FGRPO_DISTRIBUTED": "auto", "FGRPO_PROCESS_ID": "0"}, "unset FGRPO_PROCESS_ID"),
        ({"FGRPO_COORDINATOR": "a:1", "FGRPO_NUM_PROCESSES": "2", "FGRPO_PROCESS_ID": "2"}, "from 0 to"),
        (
            {"FGRPO_COORDINATOR": "a:1", "FGRPO_NUM_PROCESSES": "two", "FGRPO_PROCESS_ID": "1"},
            "whole numbers",
        ),
    ],
)
def test_half_set_environments_are_refused(environ, message):
    with pytest.raises(ConfigError, match=message):
        initialize_distributed(environ)


def test_alone_without_variables():
    assert initialize_distributed({}) is False


TOGETHER = """
    import sys
    from jax.experimental import multihost_utils
    from fgrpo_jax.run import processes
    processes._SILENCE, processes._PATIENCE = 8, 2

    def run():
        processes.initialize_distributed()
        for step in range(10**9):
            multihost_utils.sync_global_devices(f"step {step}")
            if step == 3:
                print("ready", flush=True)
            if step == 6 and __import__("jax").process_index() in FAIL:
                OUTCOME
    sys.exit(processes.end_together(run))
"""


OTHERWISE = """
import os, sys
sys.path.append(sys.argv[1])
import train
from fgrpo_jax.run.processes import end_together
sys.exit(end_together(lambda: train.main([sys.argv[2], *os.environ["OTHER"].split()])))
"""


def together(failing=(), outcome="pass"):
    script = textwrap.dedent(TOGETHER).replace("FAIL", repr(failing)).replace("OUTCOME", outcome)
    return two_processes([sys.executable, "-c", script])


def test_hosts_that_were_told_otherwise_do_not_begin(tmp_path):
    """Both say so, before anything is written."""
    config = tiny_config(write_world(tmp_path), tmp_path / "prepared", tmp_path / "run", rl_steps=2)
    command = [sys.executable, "-c", OTHERWISE, str(ROOT), config_file(config, tmp_path / "config.py")]
    with two_processes(command, OTHER=("", "--rl.optim.learning-rate 1")) as both:
        codes, errors = endings(both)
    assert codes == [2, 2]
    for error in errors:
        assert "error: process 1 of 2: another configuration than process 0; give the same command" in error
    assert not (tmp_path / "run" / "config.json").exists()


def endings(both):
    errors = [child.communicate(timeout=60)[1] for child in both]
    return [child.returncode for child in both], errors


def test_what_fails_everywhere_has_its_own_exit_code():
    with together((0, 1), "return 2") as both:
        assert endings(both)[0] == [2, 2]


def test_one_that_fails_alone_ends_the_other():
    with together((1,), "raise OSError('disk full')") as both:
        codes, errors = endings(both)
    assert codes[0] not in (0, None) and codes[1] == 1
    assert "OSError: disk full" in errors[1] and "error: process 1 of 2 failed (above)" in errors[1]


@pytest.mark.parametrize("gone, how", [(0, signal.SIGKILL), (1, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_one_that_is_gone_ends_the_other(gone, how):
    """By JAX's words, where it is the coordinator."""
    with together() as both:
        for child in both:
            said = iter(child.stdout.readline, "")
            assert "ready\n" in said, child.communicate()[1][-3000:]
        both[gone].send_signal(how)
        error = both[1 - gone].communicate(timeout=60)[1]
    assert both[1 - gone].returncode not in (0, None)
    assert (
        "run the same command on all hosts: it resumes" if gone else "Terminating process because the JAX"
    ) in error, error
