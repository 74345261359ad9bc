"""Look at a data set before training on it: `python -m fgrpo_jax.data check`.

    python -m fgrpo_jax.data check [configs/NAME.py] [--data.name interactions --data.manual-dir DIR ...]

The arguments are those of train.py. Prints what was found in the raw files, sizes of the splits, baselines, what is
suspicious (rules that know nothing of the query and find the answers: evaluation/suspicions.py), lengths of prompts
with the buckets to use, and three prompts with the transcripts to imitate. Exit code 2 where the data cannot be used.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from fgrpo_jax import policies
from fgrpo_jax.config import ConfigError, RunConfig
from fgrpo_jax.data import datasets
from fgrpo_jax.errors import UserError
from fgrpo_jax.evaluation import inspection
from fgrpo_jax.run.command import parse_training, refuse
from fgrpo_jax.run.experiment import KNOWN
from fgrpo_jax.run.validation import check_data

PROG, SHOWN = "python -m fgrpo_jax.data check", 3


def main(argv: list[str]) -> int:
    try:
        if not argv or argv[0] != "check":
            raise ConfigError(f"give the command: {PROG} [configs/NAME.py] [--data.manual-dir DIR ...]")
        config = parse_training(argv[1:], __doc__, PROG)
        check_data(config, KNOWN)
        for line in report(config):
            print(line, flush=True)
    except (UserError, OSError) as error:
        return refuse(error)
    return 0


def report(config: RunConfig) -> Iterator[str]:
    """The lines, as they become known. Raises ConfigError and DataError."""
    started = time.perf_counter()
    dataset = datasets.load(config.data)
    yield f"data set {dataset.name} ({dataset.kind}), read in {time.perf_counter() - started:.1f} s"
    yield from (f"note: {note.text}" for note in dataset.notes)
    yield from ["", *inspection.sizes(dataset)]
    if dataset.sampled_negatives:
        yield f"(training pools are filled up to data.pool_size={config.data.pool_size} by drawn negatives)"
    lines, scores, metric = inspection.baselines(config, dataset)
    yield from ["", "baselines", *lines]
    found = inspection.suspicions(config, dataset, scores, metric)
    yield from ["", "suspicions", *(found or ["none"])]
    yield from ["", "prompts", *_prompts(config, dataset)]
    yield f"\n{time.perf_counter() - started:.1f} s"


def _prompts(config: RunConfig, dataset: datasets.Dataset) -> Iterator[str]:
    seen = policies.preview(config, dataset, SHOWN)
    if seen is None:
        yield f"a {config.SYSTEM} reads items, not text: there are none"
        return
    middle, most = np.quantile(seen.lengths, (0.5, 0.9), method="inverted_cdf").tolist()
    yield f"tokens: half up to {middle:,}, nine tenths up to {most:,}, the longest that may occur {seen.longest:,}"
    yield f"buckets: --data.prompt-buckets {' '.join(map(str, seen.buckets))}   (what auto chooses)"
    one = f"   (--transcript.identifier-width {seen.widest}: one width for all pools)" * (seen.widest > 1)
    yield f"identifiers: up to {seen.widest} token{'s' * (seen.widest > 1)}{one}"
    if cut := config.prompt.text_tokens:
        yield f"texts: {seen.cut:,} of {seen.of:,} are cut to prompt.text_tokens={cut}"
    for number, (prompt, transcript) in enumerate(seen.shown, 1):
        yield from ["", f"--- prompt {number}", prompt, f"--- its target, with fill: {transcript}"]
