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
SETTING = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1099511627776:glibc.malloc.arena_max=1"

PROGRAM = """
import json, os, sys
from fgrpo_jax.launch import tune_malloc
before = os.environ.get("GLIBC_TUNABLES")
print("started", flush=True)
tune_malloc()
print(json.dumps([before, sys.argv[1:], os.getpid(), "error" in sys.warnoptions]))
"""

# Page faults of filling 100 MB again and again, in another thread, as XLA does with a step's temporaries.
FAULTS = """
import ctypes, resource, sys, threading
from fgrpo_jax.launch import tune_malloc
tune_malloc()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def step():
    block = libc.malloc(100_000_000)
    libc.memset(block, 1, 100_000_000)
    libc.free(block)

def steps():
    step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="malloc is set up on Linux")


def start(folder, *command, tunables=None, program=PROGRAM):
    """What the program in `folder` printed before its last line, that line read, and its process."""
    (folder / "program.py").write_text(program)
    environ = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environ |= {} if tunables is None else {"GLIBC_TUNABLES": tunables}
    environ["PYTHONPATH"] = os.pathsep.join((str(folder), str(ROOT)))
    process = subprocess.Popen(
        [sys.executable, "-W", "error", *command, "--an", "argument with space"],
        cwd=folder, env=environ, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    *starts, line = process.communicate()[0].splitlines()
    assert process.returncode == 0
    return starts, json.loads(line), process.pid


@pytest.mark.parametrize("command", [("program.py",), ("-m", "program")])
@pytest.mark.parametrize("given, times, found", [(None, 2, SETTING), ("", 1, "")])
def test_a_program_starts_again_at_most_once(tmp_path, command, given, times, found):
    starts, said, pid = start(tmp_path, *command, tunables=given)
    assert starts == ["started"] * times
    assert said == [found, ["--an", "argument with space"], pid, True]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="set up for the GNU C library")
def test_memory_is_kept_from_step_to_step(tmp_path):
    """24,000 pages of 4 kB are touched by every step; by default they are page faults."""
    _, by_default, _ = start(tmp_path, "program.py", tunables="", program=FAULTS)
    _, kept, _ = start(tmp_path, "program.py", program=FAULTS)
    assert by_default > 100 and kept < 10


@pytest.mark.parametrize(
    "host",
    [
        "import runpy, sys; sys.argv[0] = 'program.py'; runpy.run_path('program.py', run_name='__main__')",
        "import pdb, runpy; runpy.run_path('program.py', run_name='__main__')",
        "import runpy, sys; sys.executable = ''; runpy.run_path('program.py', run_name='__main__')",
    ],
)
def test_what_hosts_a_program_is_not_started_again(tmp_path, host):
    (tmp_path / "host.py").write_text(host)
    starts, (before, *_), _ = start(tmp_path, "host.py")
    assert starts == ["started"] and before is None


def test_a_debugger_is_not_started_again(tmp_path):
    """Its module is there before the program runs; the command line is the program's own."""
    (tmp_path / "sitecustomize.py").write_text("import pdb\n")
    starts, (before, *_), _ = start(tmp_path, "program.py")
    assert starts == ["started"] and before is None


@pytest.mark.parametrize("program", ["train.py", "eval.py", "fgrpo_jax/bench.py"])
def test_the_programs_ask_for_them(program):
    """First, under `if __name__ == "__main__"`."""
    last = ast.parse((ROOT / program).read_text()).body[-1]
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    assert ast.unparse(last.body[0]) == "tune_malloc()"
