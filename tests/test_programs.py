"""Every process of a run compiles the same programs, and so does the next start of it."""

import difflib
import json
import re
import sys

import jax
import jax.numpy as jnp
import pytest
from bpe import train_bpe
from helpers import random_params, two_processes
from lowered import ALIKE, configs, programs
from tiny import ITEMS, ROOT, changed
from tiny_lists import write_lists

from fgrpo_jax.config import DataConfig
from fgrpo_jax.data import datasets
from fgrpo_jax.models import decoder, hf

# stablehlo.scatter, of floats, whose combination of two is their sum.
FLOATS_ADDED = re.compile(r"""stablehlo\.scatter"[^\n]*\n\s*\^bb0\([^)]*tensor<b?f\d+>\):\n\s*%\S+ = stablehlo\.add""")
SPEC = decoder.DecoderSpec(
    vocab_size=320, hidden_size=8, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=4, mlp_size=8
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What lowered.py reads: data, a tokenizer and a model."""
    folder = tmp_path_factory.mktemp("lowered")
    (folder / "data").mkdir()
    write_lists(folder / "data")
    tokenizer = train_bpe([*ITEMS, "[1] > [2] > [3]"], SPEC.vocab_size)
    hf.save(folder / "model", SPEC, random_params(SPEC), {"model_type": "qwen3"}, tokenizer)
    datasets.load(DataConfig(name="jsonl", manual_dir=f"{folder}/data", prepared_dir=f"{folder}/prepared"))
    return folder


@pytest.fixture(scope="module")
def lowered(folder):
    """What lowered.py writes in the two processes of one run, whose hash seeds differ."""
    command = [sys.executable, str(ROOT / "tests" / "lowered.py"), str(folder)]
    seeds = ("0", "2")  # under which the set of "recall" and "ndcg" has two orders
    with two_processes(command, devices=2, PYTHONPATH=str(ROOT), PYTHONHASHSEED=seeds) as both:
        errors = [child.communicate(timeout=900)[1] for child in both]
    assert [child.returncode for child in both] == [0, 0], errors[0][-3000:] + errors[1][-3000:]
    return [json.loads((folder / f"{i}.json").read_text()) for i in "01"]


@pytest.mark.parametrize(
    "config", [*sorted({path.stem for path in (ROOT / "configs").glob("*.py")} - set(ALIKE)), "everything"]
)
def test_programs_depend_on_no_hash_seed_and_no_process(lowered, config):
    ours, theirs = (programs[config] for programs in lowered)
    assert ours.keys() == theirs.keys() and len(ours) >= 3 and "greedy" in ours
    for name, text in ours.items():
        assert text.startswith("module @jit_")
        if text != theirs[name]:  # pytest's own difference of two such texts takes minutes
            lines = difflib.unified_diff(text.splitlines(), theirs[name].splitlines(), lineterm="", n=1)
            pytest.fail(f"{config}: {name} differs\n" + "\n".join(line for line, _ in zip(lines, range(20))))


@pytest.mark.parametrize("name", ["synthetic", "smollm2", "goalrank", "everything", "exact"])
def test_on_a_gpu_no_update_adds_in_an_order_that_changes(folder, name):
    """A scatter of floats is made of atomic additions there, and a resumed run would not be the one that went on.

    The text is that for an NVIDIA GPU; none is needed.
    """
    config = configs(folder)["smollm2" if name == "exact" else name]  # whose names have several tokens
    fields = {"mesh.fsdp": 1} | ({"model.attention": "blocks"} if config.SYSTEM == "llm" else {})
    fields |= {"rl.credit.scheme": "exact"} if name == "exact" else {}
    texts = programs(changed(config, fields), ("cuda",))
    assert sum("update" in program for program in texts) >= 2
    for program, text in texts.items():
        assert not FLOATS_ADDED.search(text), program
    assert FLOATS_ADDED.search(jax.jit(lambda x, i: x.at[i].add(1.0)).lower(jnp.zeros(3), jnp.arange(2)).as_text())
