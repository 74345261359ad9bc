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
from fgrpo_jax.launch import prefer_huge_pages
before = os.environ.get("GLIBC_TUNABLES")
print("started", flush=True)
prefer_huge_pages()
after = os.environ.get("GLIBC_TUNABLES")
print(json.dumps([before, after, sys.argv[1:], os.getpid(), "error" in sys.warnoptions]))
"""

# Page faults of filling 100 MB again and again, in another thread, as XLA does with a step's temporaries.
FAULTS = """
import ctypes, resource, sys, threading
from fgrpo_jax.launch import prefer_huge_pages
prefer_huge_pages()
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

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")


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
def test_a_step_has_fewer_page_faults(tmp_path):
    if not THP.exists() or "[never]" in THP.read_text():
        pytest.skip("the kernel gives no transparent huge pages")
    _, by_default, _ = start(tmp_path, "program.py", program=FAULTS, GLIBC_TUNABLES="")
    if by_default < 10_000:
        pytest.skip(f"{by_default} page faults by default: nothing to see on this machine")
    _, huge, _ = start(tmp_path, "program.py", program=FAULTS)
    assert huge < by_default / 20


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
def test_the_programs_ask_for_them(program):
    """First, under `if __name__ == "__main__"`."""
    last = ast.parse((ROOT / program).read_text()).body[-1]
    assert ast.unparse(last.test) == "__name__ == '__main__'"
    assert ast.unparse(last.body[0]) == "prefer_huge_pages()"
