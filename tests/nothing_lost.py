"""Kill runs at random moments, start them again, and see that nothing is lost.

    python tests/nothing_lost.py --kills 100                  # one process
    python tests/nothing_lost.py --kills 20 --processes 2     # two, of four simulated devices each
    python tests/nothing_lost.py --kills 10 --slow 50         # every fsync, rename, mkdir and unlink takes 50 ms
    python tests/nothing_lost.py --kills 10 --system ranker   # an item ranker in place of a language model

A tiny run of several stages is made once without interruption. Further runs of the same configuration
are killed (SIGKILL) and started again until they reach their end, run after run, until there were as
many kills as asked for. Of two processes both are killed, or one, and then the other must end
by itself within a minute and say what to do. Each run is compared with the first one:

    checkpoints     every array of those that the first run kept, and what was saved beside, to the bit
    metrics.jsonl   every row, but for what the clock says
    sft/, rl/, ...  of every stage: done.json, to the byte
    eval/           every file, to the byte, but for report.html, and the git revision in manifest.json

Prints figures, and ends with 1 where something differs or a start does not go well. The first kills
come while programs are compiled for the first time. --slow needs strace (Linux).
"""

import argparse
import collections
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

import absl.logging
from helpers import environments
from run_differences import differences
from tiny import ROOT, changed, config_file, tiny_config, write_world
from tiny_lists import tiny_ranker, write_lists

from fgrpo_jax.stages import stages

LATEST = 60  # seconds within which a process ends that lost another one
HINTS = ("run the same command on all hosts", "Terminating process because the JAX distributed service")
SLOW = "fsync,fdatasync,rename,renameat,renameat2,mkdir,mkdirat,unlink,unlinkat,rmdir"


# --------------------------------------------------------------------- one life of a run


class Life:
    """One start of a run, in one or several processes; what they say goes to files in its folder."""

    def __init__(self, run_dir, cache, processes, slow, last):
        self.run_dir, self.began, self._last = run_dir, time.monotonic(), last
        self._rows = _size(run_dir / "metrics.jsonl")
        self._logs = [run_dir.with_name(f"{run_dir.name}.{i}.txt") for i in range(processes)]
        command = [sys.executable, str(ROOT / "train.py"), f"{run_dir}.py"]
        if slow:
            delay = f"inject={SLOW}:delay_enter={1000 * slow}"
            strace = [
                "strace",
                "-D",
                "-f",
                "-qq",
                "-o",
                os.devnull,
                "--seccomp-bpf",
                "-e",
                f"trace={SLOW}",
                "-e",
                delay,
            ]
            command = [*strace, *command]
        quick = {
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": str(run_dir.with_name(cache)),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
        }
        self.children = []
        for log, env in zip(self._logs, environments(2, devices=4) if processes == 2 else [{}], strict=True):
            with log.open("w") as file:
                child = subprocess.Popen(command, env=os.environ | quick | env, stdout=file, stderr=subprocess.STDOUT)
            self.children.append(child)

    def close(self):
        for child in self.children:
            child.kill()
            child.wait()

    def age(self):
        return time.monotonic() - self.began

    def said(self, i):
        return self._logs[i].read_text(errors="replace")

    def running(self):
        return [child.poll() is None for child in self.children]

    def joined(self):
        return len(self.children) == 1 or all("should another one be lost" in self.said(i) for i in range(2))

    def logged(self):
        return _size(self.run_dir / "metrics.jsonl") > self._rows

    def saving(self):
        return any(self.run_dir.glob("*/checkpoints/*.orbax-checkpoint-tmp*"))

    def trained(self):
        return (self.run_dir / self._last / "done.json").is_file()


def _size(path):
    return path.stat().st_size if path.is_file() else 0


def moments(whole, evaluating):
    """Name -> (what to wait for; seconds from there on, at least and at most). Given: seconds of the first run."""

    def started(life):
        return True

    return {
        "first second": (started, 0.0, 1.0),
        "start-up": (started, 1.0, 0.6 * (whole - evaluating)),
        "any": (started, 0.0, whole),
        "step or validation": (Life.logged, 0.0, 1.0),
        "checkpoint": (Life.saving, 0.0, 0.02),
        "evaluation": (Life.trained, 0.0, evaluating),
        "last second": (Life.trained, max(0.0, evaluating - 1.0), evaluating),
    }


def live(life, wait_for, seconds):
    """Let it live until the moment has come and seconds have passed; whether some process still runs then."""
    while not wait_for(life):
        if not any(life.running()):
            return False
        time.sleep(0.002)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if not any(life.running()):
            return False
        time.sleep(0.002)
    return any(life.running())


def kill(life, rng, found):
    """All its processes, or one of two that have found each other: then the other has to end."""
    chosen = (
        rng.choice([(0, 1), (0,), (1,)]) if len(life.children) == 2 and life.joined() else range(len(life.children))
    )
    for i in chosen:
        life.children[i].kill()
    killed = time.monotonic()
    for i, child in enumerate(life.children):
        try:
            child.wait(LATEST)
        except subprocess.TimeoutExpired:
            raise SystemExit(
                f"process {i} still runs {LATEST} s after the other one was killed:\n{life.said(i)[-3000:]}"
            ) from None
        if i not in chosen and child.returncode != 0:  # 0: it was done before
            found["survivor"].append(time.monotonic() - killed)
            hint = [
                hint
                for hint in HINTS
                if hint in life.said(i).split("should another one be lost", 1)[1].split("\n", 1)[1]
            ]
            if not hint:
                raise SystemExit(f"process {i} ended without a word of what to do:\n{life.said(i)[-3000:]}")
            found["hint"].append(hint[0])


# --------------------------------------------------------------------- all of it


def language_model(folder, processes):
    sft, rl = (20, 40) if processes == 1 else (8, 12)
    data = write_world(folder / "data", train=120)
    return often(tiny_config(data, folder / "prepared", "", sft_steps=sft, rl_steps=rl), processes)


def ranker(folder, processes):
    """Reward model (whose checkpoint likelihood chooses), point-wise network, generators by imitation, GoalRank."""
    data = write_lists(folder / "data", train=120)
    config = tiny_ranker(data, folder / "prepared", "", steps=12 if processes == 1 else 6)
    left_out = {f"{name}.steps": 0 for name in stages(config) if name not in RANKER}
    shown = {"eval.rewards": ("reward_model",), "eval.versus": "g_e", "goalrank.starts_from": "imitation"}
    return often(changed(config, left_out | shown), processes)


RANKER = ("evaluator", "pointwise", "imitation", "generators", "goalrank")
CONFIGS = {"llm": language_model, "ranker": ranker}


def often(config, processes):
    """It logs, evaluates and saves often, and not at the same steps."""
    fields = {f"{name}.eval_every": 5 for name in trained(config)}
    return changed(config, fields | {"checkpoint.every": 3, "log_every": 4, "mesh.fsdp": processes})


def trained(config):
    return [name for name, stage in stages(config).items() if stage.steps]


def first_run(config, folder, arguments):
    """(its directory, seconds it took warm, seconds of them from the last step on); made twice, first to compile."""
    for name in ("compiling", "first"):
        run_dir = prepare(config, folder, name)
        life = Life(run_dir, "xla of the first", arguments.processes, arguments.slow, trained(config)[-1])
        try:
            ended = live(life, Life.trained, 0) and life.age()
            live(life, lambda life: False, 0)
            took = life.age()
            if any(child.returncode for child in life.children):
                raise SystemExit(f"a run that nobody interrupts fails:\n{life.said(0)[-3000:]}")
        finally:
            life.close()
    return run_dir, took, took - ended


def prepare(config, folder, name):
    config_file(changed(config, {"run_dir": str(folder / name)}), folder / f"{name}.py")
    return folder / name


def interrupted(run_dir, arguments, rng, kinds, found, last):
    """Start a run until it reaches its end or there were kills enough, killing it on the way."""
    while True:
        kind = rng.choice(list(kinds)) if len(found["kill"]) < arguments.kills else None
        wait_for, *seconds = kinds[kind] if kind else (lambda life: False, 0, 0)
        life = Life(run_dir, "xla of the others", arguments.processes, arguments.slow, last)
        try:
            if live(life, wait_for, rng.uniform(*seconds)):
                found["kill"].append(kind)
                kill(life, rng, found)
                continue
            if codes := [child.returncode for child in life.children if child.returncode]:
                said = "".join(life.said(i)[-3000:] for i in range(len(life.children)))
                raise SystemExit(f"after {len(found['kill'])} kills a start ends with {codes}:\n{said}")
            return
        finally:
            life.close()


def main(arguments):
    absl.logging.set_verbosity(absl.logging.ERROR)  # Orbax notes what it does not find
    rng, found, began = random.Random(arguments.seed), collections.defaultdict(list), time.monotonic()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="nothing_lost"))
    (folder / "data").mkdir(parents=True)
    config = CONFIGS[arguments.system](folder, arguments.processes)
    first, whole, evaluating = first_run(config, folder, arguments)
    print(f"uninterrupted: {whole:.1f} s, {evaluating:.1f} s of them after the last step", flush=True)
    kinds = moments(whole, evaluating)
    while len(found["kill"]) < arguments.kills:
        before = len(found["kill"])
        run_dir = prepare(config, folder, f"run{len(found['run'])}")
        interrupted(run_dir, arguments, rng, kinds, found, trained(config)[-1])
        found["run"].append(run_dir.name)
        if different := differences(run_dir, first, trained(config)):
            raise SystemExit(f"{run_dir} differs from {first} in {', '.join(different)}")
        print(f"{run_dir.name}: killed {len(found['kill']) - before} times, and equal", flush=True)
        shutil.rmtree(run_dir)
    print(report(found, time.monotonic() - began))
    if not arguments.folder:
        shutil.rmtree(folder)


def report(found, seconds):
    killed = ", ".join(f"{n} {kind}" for kind, n in collections.Counter(found["kill"]).most_common())
    lines = [f"{len(found['kill'])} kills ({killed}) in {len(found['run'])} runs, all equal; {seconds:.0f} s"]
    if found["survivor"]:
        took = found["survivor"]
        middle = statistics.median(took)
        lines.append(
            f"{len(took)} times one of two was killed: the other ended after {middle:.1f} s, {max(took):.1f} at most"
        )
        lines += [f"  {n} times with {hint!r}" for hint, n in collections.Counter(found["hint"]).items()]
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, choices=(1, 2), default=1)
    parser.add_argument("--system", choices=tuple(CONFIGS), default="llm")
    parser.add_argument("--slow", type=int, default=0, metavar="MS")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", help="where to work, kept; default: a temporary one, removed")
    main(parser.parse_args())
