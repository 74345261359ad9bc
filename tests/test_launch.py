"""Memory that is kept, and where nothing is done."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from fgrpo_jax.config import Config
from fgrpo_jax.run import experiment, launch

ROOT = Path(launch.__file__).parents[2]

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

# Page faults of a call of a program that has 100 MB of temporaries: of the first, and the median of ten.
FAULTS = """
import resource, statistics, sys
from fgrpo_jax.run.launch import keep_memory
assert sys.argv[1] == "default" or keep_memory()
import jax, jax.numpy as jnp
program = jax.jit(lambda x: (x[:, None] * x) @ jnp.ones((len(x), 8))).lower(jnp.ones(5000)).compile()
assert program.memory_analysis().temp_size_in_bytes >= 100_000_000
x, faults = jnp.ones(5000), []
for _ in range(14):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    jax.block_until_ready(program(x))
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print([faults[0], statistics.median(faults[4:])])
"""


def faults(memory):
    kept = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    environ = kept | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", FAULTS, memory]
    return json.loads(subprocess.run(command, env=environ, check=True, stdout=subprocess.PIPE).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="memory is kept by the GNU C library")
def test_a_step_takes_no_memory_anew():
    """From the kernel, that is: what one call of XLA frees, the next one uses."""
    large_pages = 100_000_000 / 2**21  # of the usual pages there are 512 times as many
    (first_by_default, by_default), (first, kept) = faults("default"), faults("kept")
    assert by_default > large_pages and kept < large_pages / 4
    if THP.is_file() and "[madvise]" in THP.read_text():
        assert first < first_by_default / 10


class Malloc:
    """A C library that notes what it is told."""

    def __init__(self):
        self.told, self.advised = [], []
        self.malloc, self.free = lambda size: 3 * 2**20, lambda block: None
        self.madvise = lambda *asked: self.advised.append(asked)

    def mallopt(self, name, value):
        self.told.append((name, value))
        return 1


@pytest.fixture
def dispatch():
    """JAX's choice of a thread, put back afterwards."""
    name = "jax_cpu_enable_async_dispatch"
    before = jax.config.read(name)
    yield lambda: jax.config.read(name)
    jax.config.update(name, before)


@pytest.mark.parametrize(
    ("system", "backend", "library", "kept"),
    [
        ("linux", "cpu", Malloc(), True),
        ("linux", "cpu", object(), False),  # another C library
        ("linux", "gpu", Malloc(), False),
        ("darwin", "cpu", Malloc(), False),
    ],
)
def test_memory_is_kept_where_it_can_be(system, backend, library, kept, dispatch, monkeypatch):
    monkeypatch.setattr(launch.sys, "platform", system)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(launch.ctypes, "CDLL", lambda name: library)
    assert launch.keep_memory() == kept
    assert not dispatch()
    if isinstance(library, Malloc):
        assert library.told == [(-4, 0), (-1, -1)] * kept and len(library.advised) == kept
        assert all(start == 4 * 2**20 and size > 2**21 and what == 14 for start, size, what in library.advised)


@pytest.mark.parametrize("keep", [True, False])
def test_the_config_decides(keep, monkeypatch):
    calls = []
    monkeypatch.setattr(experiment, "keep_memory", lambda: calls.append("kept"))
    monkeypatch.setattr(experiment.absl.logging, "set_verbosity", lambda level: None)
    experiment.prepare_process(Config(compilation_cache="", keep_memory=keep))
    assert calls == ["kept"] * keep
