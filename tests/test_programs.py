"""Every process of a run compiles the same programs, and so does the next start of it."""

import difflib
import json
import os
import socket
import subprocess
import sys

import pytest
from bpe import train_bpe
from tiny import ITEMS, ROOT, write_world

from fgrpo_jax import datasets
from fgrpo_jax.config import DataConfig


@pytest.fixture(scope="module")
def lowered(tmp_path_factory):
    """What lowered.py writes in the two processes of one run, whose hash seeds differ."""
    folder = tmp_path_factory.mktemp("lowered")
    (folder / "data").mkdir()
    write_world(folder / "data")
    train_bpe([*ITEMS, "[1] > [2] > [3]"], 320).save_pretrained(folder / "tokenizer")
    datasets.load(DataConfig(name="jsonl", manual_dir=f"{folder}/data", prepared_dir=f"{folder}/prepared"))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "tests" / "lowered.py"), str(folder)]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "FGRPO_COORDINATOR": f"localhost:{port}",
        "FGRPO_NUM_PROCESSES": "2",
    }
    both = []
    for i, seed in (("0", "0"), ("1", "2")):  # under which the set of "recall" and "ndcg" has two orders
        own = {"FGRPO_PROCESS_ID": i, "PYTHONHASHSEED": seed}
        both.append(subprocess.Popen([*command, f"{folder}/{i}.json"], env=env | own, stderr=subprocess.PIPE, text=True))
    try:
        errors = [child.communicate(timeout=300)[1] for child in both]
    finally:
        for child in both:
            child.kill()
            child.communicate()
    assert [child.returncode for child in both] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    return [json.loads((folder / f"{i}.json").read_text()) for i in "01"]


@pytest.mark.parametrize("config", [*sorted(path.stem for path in (ROOT / "configs").glob("*.py")), "everything"])
def test_programs_depend_on_no_hash_seed_and_no_process(lowered, config):
    ours, theirs = (programs[config] for programs in lowered)
    assert ours.keys() == theirs.keys() and {"rl collect", "rl update", "greedy"} <= ours.keys()
    for name, text in ours.items():
        assert text.startswith("module @jit_")
        if text != theirs[name]:  # pytest's own difference of two such texts takes minutes
            lines = difflib.unified_diff(text.splitlines(), theirs[name].splitlines(), lineterm="", n=1)
            pytest.fail(f"{config}: {name} differs\n" + "\n".join(line for line, _ in zip(lines, range(20))))
