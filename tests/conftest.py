"""Shared by all tests: the CPU, a cache of compiled programs, and one tiny world."""

import os
import subprocess
import sys

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# The newer code generator of XLA for CPUs takes three times as long as the older one, which is not in every version.
OLDER = "--xla_cpu_use_fusion_emitters=false"
READ_FLAGS = "from jaxlib.xla_client import CompileOptions; CompileOptions().executable_build_options.debug_options"
if OLDER not in (flags := os.environ.get("XLA_FLAGS", "")):  # as it is where a worker of pytest-xdist begins
    env = os.environ | {"XLA_FLAGS": OLDER}
    if subprocess.run([sys.executable, "-c", READ_FLAGS], env=env, stderr=subprocess.DEVNULL).returncode == 0:
        os.environ["XLA_FLAGS"] = f"{flags} {OLDER}"

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_runs, random_params, recorded_states
from ranked import opened
from tiny import run_training, tiny_config, write_world
from tiny_lists import tiny_ranker, write_lists

from fgrpo_jax.models import decoder
from fgrpo_jax.policies.llm.query import Query
from fgrpo_jax.policies.llm.transcript import Grammar


def pytest_configure(config):
    """Programs compiled by an earlier run of the tests are found again."""
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


SPEC = decoder.DecoderSpec(
    vocab_size=32,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    mlp_size=24,
    init_std=0.3,  # far from uniform, so that a wrong mask or position shows
    logit_chunk=8,
)

# Two-token names 10x, a separator and tags of two tokens that all begin with token 3.
GRAMMAR = Grammar(
    separator=(3, 4), slate_close=(3, 5), rank_close=(3, 6), eos=1, slate_min=2, slate_max=3, rank_min=1, rank_max=2
)


@pytest.fixture(scope="session")
def spec():
    return SPEC


@pytest.fixture(scope="session")
def grammar():
    return GRAMMAR


@pytest.fixture(scope="session")
def params(spec):
    """Random weights; the norms are moved away from one, so that leaving one out shows."""
    rng = np.random.default_rng(0)
    made = random_params(spec)
    return jax.tree.map(lambda x: jnp.asarray(x + 0.1 * rng.normal(size=x.shape), x.dtype), made)


@pytest.fixture(scope="session")
def query():
    """B=3, S=8, C=5, W=2: a prompt of one token, one in between, one that fills its bucket.

    The last pool is smaller than slate_max.
    """
    rng = np.random.default_rng(0)
    names = [(10, 11), (10, 12), (13, -1), (14, 10), (15, -1)]
    n_candidates = np.array([5, 4, 2], np.int32)
    identifiers = np.full((3, 5, 2), -1, np.int32)
    for b, n in enumerate(n_candidates):
        identifiers[b, :n] = names[:n]
    relevance = np.array([[0, 2, 0, 1, 0], [1, 0, 0, 1, 0], [0, 1, 0, 0, 0]], np.float32)
    return Query(
        prompt=jnp.asarray(rng.integers(7, 32, (3, 8)), jnp.int32),
        prompt_len=jnp.array([1, 5, 8], jnp.int32),
        identifiers=jnp.asarray(identifiers),
        relevance=jnp.asarray(relevance),
        n_candidates=jnp.asarray(n_candidates),
    )


@pytest.fixture(scope="module")
def states():
    """(stage, step) -> the train state after it, of whatever is trained in this process."""
    with recorded_states() as found:
        yield found


@pytest.fixture(scope="session")
def ranker_run(tmp_path_factory):
    """A ranker's run of every stage: its configuration, and its train states; read by several files, never changed."""
    folder = tmp_path_factory.mktemp("ranker")
    (folder / "data").mkdir()
    config = tiny_ranker(write_lists(folder / "data"), folder / "prepared", folder / "run")
    with quick_runs(), recorded_states() as found:
        assert run_training(config) == 0
    return config, found


@pytest.fixture(scope="session")
def ranked_runs(tmp_path_factory, ranker_run):
    """A run of each system, by its name; never changed."""
    folder = tmp_path_factory.mktemp("rank")
    (folder / "data").mkdir()
    config = tiny_config(write_world(folder / "data"), folder / "prepared", folder / "run", sft_steps=2)
    with quick_runs():
        assert run_training(config) == 0
    return {"llm": config, "ranker": ranker_run[0]}


@pytest.fixture(scope="session")
def rankers(ranked_runs):
    """Every method of these, by system and name."""
    return opened(ranked_runs)


@pytest.fixture(scope="session")
def torch():
    torch = pytest.importorskip("torch", reason="PARITY WITH transformers NOT TESTED: torch is not installed")
    torch.set_num_threads(1)  # the models are tiny; waiting for threads would take longer
    return torch


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Hugging Face directories of small random models, by the families that GGUF files are read of."""
    from write_gguf import directories

    return directories(tmp_path_factory)


@pytest.fixture
def qwen3(folders):
    return folders["qwen3"]
