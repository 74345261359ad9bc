"""Train for a long time, and see that memory stays flat, no file stays open and nothing is missing at the end.

    python tests/soak.py                  # 10,000 steps of a tiny model, some minutes
    python tests/soak.py --steps 100000

A run of `rl` in a process of its own, `python train.py`, that logs every 10 steps, saves every 50 and evaluates
every 100. Twice a second its resident memory and its open files are read from /proc (Linux). The first fifth of
the steps warms up; the rest is cut into eight windows:

    memory        mean of each window; the largest is at most 5 % above the smallest
    open files    least number in each window, so without those of a save under way; all are the same
    threads       likewise; at most 5 % more than in the first window, for pools fill up

Afterwards: a row in metrics.jsonl for every logged step and every evaluation, in order; the latest checkpoints
and the best; done.json and the evaluation. Prints figures, and ends with 1 where one of these does not hold.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"

from tiny import ROOT, changed, config_file, tiny_config, write_world

from fgrpo_jax.run.checkpoint import steps_in

LOG, SAVE, EVALUATE, KEEP = 10, 50, 100, 2
WARM, WINDOWS, FLAT = 0.2, 8, 1.05
PAGE = os.sysconf("SC_PAGE_SIZE") / 2**20


class Sample(NamedTuple):
    step: int
    mebibytes: float
    files: int
    threads: int


# --------------------------------------------------------------------- watching


def watch(child, log):
    """Samples of a child, until it ends."""
    samples = []
    while child.poll() is None:
        time.sleep(0.5)
        try:
            resident = int(Path(f"/proc/{child.pid}/statm").read_text().split()[1]) * PAGE
            files, threads = (len(os.listdir(f"/proc/{child.pid}/{kind}")) for kind in ("fd", "task"))
        except (OSError, IndexError):  # it has just ended
            continue
        samples.append(Sample(_step(log), resident, files, threads))
    return samples


def _step(log):
    """The step of the last whole row; -1 before there is one."""
    if not log.is_file():
        return -1
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 10_000))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else -1


def windows(samples, steps):
    """Samples of each window of the steps after the warm-up, up to the last step."""
    first, size = WARM * steps, (1 - WARM) * steps / WINDOWS
    found = [[s for s in samples if first + i * size <= s.step < first + (i + 1) * size] for i in range(WINDOWS)]
    if not all(found):
        raise SystemExit(f"a window of {size:.0f} steps went by without a sample: ask for more --steps")
    return found


def grown(samples, steps):
    """Prints what the process took, and says what has grown."""
    cut = windows(samples, steps)
    means = [statistics.mean(s.mebibytes for s in window) for window in cut]
    files, threads = ([min(getattr(s, name) for s in window) for window in cut] for name in ("files", "threads"))
    middles = [i * (1 - WARM) * steps / WINDOWS for i in range(WINDOWS)]
    slope = 1024 * statistics.linear_regression(middles, means).slope
    ratio, most = max(means) / min(means), max(s.mebibytes for s in samples)
    print(f"MiB in each window: {' '.join(f'{mean:.1f}' for mean in means)}; {100 * (ratio - 1):.2f} % apart")
    print(f"  {slope:+.2f} KiB a step, {SAVE * slope:+.0f} a checkpoint; {most:.1f} MiB at most, evaluating at the end")
    print(f"open files in each window: {' '.join(map(str, files))}; {max(s.files for s in samples)} at most")
    print(f"threads in each window: {' '.join(map(str, threads))}; {max(s.threads for s in samples)} at most")
    held = {"memory": ratio <= FLAT, "open files": len({*files}) == 1, "threads": max(threads) <= FLAT * threads[0]}
    return [f"{name} did not stay the same" for name, flat in held.items() if not flat]


# --------------------------------------------------------------------- what is left


def missing(run_dir, steps):
    """What a run of so many steps should have left and did not."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    evaluated = {row["step"]: row["eval/ndcg@2"] for row in rows if "eval/ndcg@2" in row}
    logged = [row["step"] for row in rows if "loss" in row]
    best = max(evaluated, key=lambda step: (evaluated[step], -step))
    done = json.loads((run_dir / "rl" / "done.json").read_text())
    kept = {best, *range(steps, 0, -SAVE)[:KEEP]}
    table = (run_dir / "eval" / "validation" / "table.txt").read_text()
    holds = {
        "rows of training": logged == list(range(LOG, steps + 1, LOG)),
        "rows of evaluations": list(evaluated) == list(range(0, steps + 1, EVALUATE)),
        "done.json": (done["step"], done["best_step"], done["best"]) == (steps, best, evaluated[best]),
        "checkpoints": {*steps_in(run_dir / "rl" / "checkpoints")} == kept,
        "the evaluation": table.startswith("12 queries") and "rl" in table.split(),
    }
    print(f"{len(logged)} rows of training, {len(evaluated)} of evaluations; checkpoints of steps {sorted(kept)}")
    return [f"{name}: not what {steps} steps leave" for name, well in holds.items() if not well]


# --------------------------------------------------------------------- all of it


def soak(folder, steps):
    (folder / "data").mkdir(parents=True)
    write_world(folder / "data", train=120)
    config = changed(
        tiny_config(folder / "data", folder / "prepared", folder / "run", rl_steps=steps),
        {
            "rl.eval_every": EVALUATE, "rl.optim.learning_rate": 1e-3, "checkpoint.every": SAVE,
            "checkpoint.keep": KEEP, "log_every": LOG, "keep_memory": True,
        },
    )  # fmt: skip
    command = [sys.executable, str(ROOT / "train.py"), config_file(config, folder / "config.py")]
    began = time.monotonic()
    with (folder / "said.txt").open("w") as said:
        child = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT)
        try:
            samples = watch(child, folder / "run" / "metrics.jsonl")
        finally:
            child.kill()
            child.wait()
    if child.returncode:
        raise SystemExit(f"the run ended with {child.returncode}:\n{(folder / 'said.txt').read_text()[-3000:]}")
    print(f"{steps} steps in {time.monotonic() - began:.0f} s, {len(samples)} samples")
    return grown(samples, steps) + missing(folder / "run", steps)


def main(arguments):
    if arguments.steps < 1000 or arguments.steps % EVALUATE:
        raise SystemExit(f"--steps has to be a multiple of {EVALUATE}, and 1000 at least")
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        problems = soak(Path(arguments.folder or folder), arguments.steps)
    print("\n".join(problems) or "flat, and nothing is missing")
    return bool(problems)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--folder", help="where to work, kept; default: a temporary one, removed")
    sys.exit(main(parser.parse_args()))
