"""A program started again: same arguments, same process, once."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import json, os, sys
from fgrpo_jax.launch import prefer_huge_pages
before = os.environ.get("GLIBC_TUNABLES")
print("started", flush=True)
prefer_huge_pages()
print(json.dumps([before, sys.argv[1:], os.getpid()]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux")
@pytest.mark.parametrize("given, times, found", [(None, 2, "glibc.malloc.hugetlb=1"), ("", 1, "")])
def test_a_program_starts_again_at_most_once(tmp_path, given, times, found):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    environ = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environ |= {} if given is None else {"GLIBC_TUNABLES": given}
    process = subprocess.Popen(
        [sys.executable, "-W", "error", path, "--an", "argument with space"],
        env=environ, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    *starts, line = process.communicate()[0].splitlines()
    assert process.returncode == 0 and starts == ["started"] * times
    assert json.loads(line) == [found, ["--an", "argument with space"], process.pid]
