"""What several test files use."""

import contextlib
import functools
import os
import socket
import subprocess
import sys
import textwrap

import jax
import pytest
from tiny import quick_programs

from fgrpo_jax.errors import ModelFilesError
from fgrpo_jax.evaluation import report
from fgrpo_jax.evaluation.report_page import training
from fgrpo_jax.models import decoder
from fgrpo_jax.run.stage import Stage

# Programs of tests run a few times only: most of the time would go into optimising them.
WISHES = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def _known_options():
    """Those of the wishes that this version of XLA knows."""
    known = {}
    for name, value in WISHES.items():
        try:
            jax.jit(lambda: 0, compiler_options={name: value})()
        except jax.errors.JaxRuntimeError:
            continue
        known[name] = value
    return known


def quick_jit(function, **options):
    """`jax.jit` that compiles quickly to slow code; only for the outermost function."""
    return jax.jit(function, compiler_options=_known_options(), **options)


def random_params(spec, seed=0):
    """Of a decoder. Called as it is, its `init` compiles a program for every operation."""
    return quick_jit(decoder.init, static_argnums=0)(spec, jax.random.key(seed))


def simulated(devices):
    """XLA_FLAGS of a process with so many simulated devices."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"


def environments(count, devices):
    """What makes `count` processes on this machine one run, of so many simulated devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": simulated(devices),
        "FGRPO_COORDINATOR": f"localhost:{port}",
        "FGRPO_NUM_PROCESSES": str(count),
    }
    return [common | {"FGRPO_PROCESS_ID": str(i)} for i in range(count)]


@contextlib.contextmanager
def two_processes(command, devices=1, **environ):
    """Children that run the same command as the processes of one run; none outlives the block.

    environ: for both, or a tuple with a value for each.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = []
    try:
        for i, env in enumerate(environments(2, devices)):
            env |= {name: value[i] if isinstance(value, tuple) else value for name, value in environ.items()}
            children.append(subprocess.Popen(command, env=os.environ | env, **pipes))
        yield children
    finally:
        for child in children:
            child.kill()
            child.communicate()


def run_on_8_devices(script):
    """Words that a script prints in a process with 8 simulated devices, whose programs are compiled quickly."""
    quick = {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    env = {**os.environ, "XLA_FLAGS": simulated(8), **quick}
    script = textwrap.dedent(script)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.split()


@contextlib.contextmanager
def recorded_states():
    """(stage, step) -> the train state after it, of whatever is trained inside."""
    found, on_step = {}, Stage.on_step

    def record(self, state, metrics, examples, stopping):
        found[self.name, self._step + 1] = jax.device_get(state)
        return on_step(self, state, metrics, examples, stopping)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stage, "on_step", record)
        yield found


@contextlib.contextmanager
def quick_runs(curves=False):
    """Inside, what is compiled runs a few times only, and no report says how fast (unless `curves`)."""
    with pytest.MonkeyPatch.context() as patch, quick_programs():
        patch.setattr(report, "git_revision", lambda: "a commit")  # which may be made meanwhile
        if not curves:
            patch.setattr(training, "section", lambda logs: "")
        yield


def refusal(call, *args, **kwargs):
    """The text, one line, of the ModelFilesError that a call ends with."""
    with pytest.raises(ModelFilesError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)
