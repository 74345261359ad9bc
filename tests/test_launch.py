"""A program started again: same arguments, same process, once."""

import ast
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fgrpo_jax import launch

ROOT = Path(launch.__file__).parents[1]
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")

PROGRAM = """
import json, os, sys
from fgrpo_jax.launch import keep_memory
before = os.environ.get("GLIBC_TUNABLES")
print("started", flush=True)
keep_memory()
after = os.environ.get("GLIBC_TUNABLES")
print(json.dumps([before, after, sys.argv[1:], os.getpid(), "error" in sys.warnoptions]))
"""

# Page faults of a call of a program that has 100 MB of temporaries: of the first, and the median of ten.
FAULTS = """
import resource, statistics
from fgrpo_jax.launch import keep_memory
keep_memory()
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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux")


def start(folder, *command, program=PROGRAM, stdin="", **environ):
    """What the program in `folder` printed before its last line, that line read, and its process."""
    (folder / "program.py").write_text(program)
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environ = kept | {"PYTHONPATH": os.pathsep.join((str(folder), str(ROOT))), "JAX_PLATFORMS": "cpu"} | environ
    process = subprocess.Popen(
        [sys.executable, "-W", "error", *command, "--an", "argument with space"],
        cwd=folder, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    *starts, line = process.communicate(stdin)[0].splitlines()
    assert process.returncode == 0
    return starts, json.loads(line), process.pid


@pytest.mark.parametrize("command", [("program.py",), ("-m", "program")])
@pytest.mark.parametrize(
    "environ, times",
    [({}, 2), ({"GLIBC_TUNABLES": ""}, 1), ({"JAX_PLATFORMS": "cuda,cpu"}, 1), ({"JAX_PLATFORMS": "tpu"}, 1)],
)
def test_a_program_starts_again_at_most_once(tmp_path, command, environ, times):
    """The setting is for this process: what it starts must not inherit it."""
    starts, (before, after, arguments, *process), pid = start(tmp_path, *command, **environ)
    assert starts == ["started"] * times
    assert bool(before) == (times == 2) and after == environ.get("GLIBC_TUNABLES")
    assert arguments == ["--an", "argument with space"] and process == [pid, True]


def test_devices_count_where_no_platform_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(launch, "_DEVICES", (str(tmp_path / "accel*"),))
    assert not launch._has_accelerator()
    (tmp_path / "accel0").touch()
    assert launch._has_accelerator()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert not launch._has_accelerator()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set for the GNU C library")
def test_a_step_takes_no_memory_anew(tmp_path):
    """From the kernel, that is: what one call of XLA frees, the next one uses."""
    pages = 100_000_000 / 2**21  # large ones; of small ones there are 512 times as many
    _, (first_by_default, by_default), _ = start(tmp_path, "program.py", program=FAULTS, GLIBC_TUNABLES="")
    assert by_default > pages
    _, (first, kept), _ = start(tmp_path, "program.py", program=FAULTS)
    assert kept < pages / 4
    version = tuple(map(int, platform.libc_ver()[1].split(".")))
    if version >= (2, 35) and THP.is_file() and "[madvise]" in THP.read_text():
        assert first < first_by_default / 10


@pytest.mark.parametrize(
    "host",
    [
        "import runpy, sys; sys.argv[0] = 'program.py'; runpy.run_path('program.py', run_name='__main__')",
        "import pdb, runpy; runpy.run_path('program.py', run_name='__main__')",
        "import runpy, sys; sys.executable = ''; runpy.run_path('program.py', run_name='__main__')",
    ],
)
@pytest.mark.parametrize("command", [("host.py",), ("-m", "host"), ("-m", "host", "program.py")])
def test_what_hosts_a_program_is_not_started_again(tmp_path, host, command):
    (tmp_path / "host.py").write_text(host)
    starts, (before, *_), _ = start(tmp_path, *command)
    assert starts == ["started"] and before is None


def test_a_program_from_standard_input_runs(tmp_path):
    """It is read by then: a second start would find nothing."""
    starts, (before, *_), _ = start(tmp_path, "-", stdin=PROGRAM)
    assert starts == ["started"] and before is None


def test_a_debugger_is_not_started_again(tmp_path):
    """Its module is there before the program runs; the command line is the program's own."""
    (tmp_path / "sitecustomize.py").write_text("import pdb\n")
    starts, (before, *_), _ = start(tmp_path, "program.py")
    assert starts == ["started"] and before is None


@pytest.mark.parametrize("program", ["train.py", "eval.py", "fgrpo_jax/bench.py"])
def test_the_programs_keep_their_memory(program):
    """First, under `if __name__ == "__main__"`."""
    last = ast.parse((ROOT / program).read_text()).body[-1]
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    assert ast.unparse(last.body[0]) == "keep_memory()"
