"""Evaluate a run beside the baselines, on the same frozen candidates.

    python eval.py RUN_DIR [--split test] [--data.manual-dir DIR] [--compare RUN_DIR2 ...]

Writes RUN_DIR/eval/SPLIT/ and prints its table. The best checkpoint on validation of every
finished stage is decoded greedily; the same inputs give the same bytes.

The queries and the candidates belong to the evaluation. How a policy is shown them (history,
prompt, identifiers, order) belongs to the run that trained it, so a compared run scores what it
scores alone. Baselines read what RUN_DIR's policy is shown.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import NamedTuple

from fgrpo_jax.errors import ModelFilesError, UserError
from fgrpo_jax.run.command import Arguments, Judged, parse_evaluation, parse_or_exit, refuse, source_of_data

if __name__ == "__main__":  # before what takes seconds to import, so that --help and a typing error answer at once
    COMMAND = parse_or_exit(parse_evaluation, sys.argv[1:], __doc__)

import jax

from fgrpo_jax import policies
from fgrpo_jax.config import ConfigError, EvalConfig, MeshConfig, RunConfig
from fgrpo_jax.config_files import as_dict
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import evaluation_examples
from fgrpo_jax.evaluation import evaluate, report
from fgrpo_jax.evaluation.evaluate import Prediction
from fgrpo_jax.evaluation.report_page.browser import Step, chosen
from fgrpo_jax.evaluation.report_page.page import Beside
from fgrpo_jax.files import check_writable, path_of, read_rows, resolved
from fgrpo_jax.run import directory
from fgrpo_jax.run import experiment as experiments
from fgrpo_jax.run.finished import nothing_finished
from fgrpo_jax.run.judge import Opened, fits_of, parameters_of, predict, rewards_of
from fgrpo_jax.run.processes import note, on_first
from fgrpo_jax.run.prompting import answered
from fgrpo_jax.run.transcripts import steppable, transcripts
from fgrpo_jax.run.validation import check_evaluation
from fgrpo_jax.stages import from_start, stages
from fgrpo_jax.types import RankingExample


def _judged(config: RunConfig, data: Judged, settings: EvalConfig, mesh: MeshConfig) -> RunConfig:
    """A run's configuration with all that belongs to the evaluation; what its policy sees stays."""
    buckets = data.prompt_buckets or config.data.prompt_buckets
    source = {"name": data.name, "manual_dir": data.manual_dir, "prepared_dir": data.prepared_dir, "pool": data.pool}
    source = dataclasses.replace(config.data, **source, prompt_buckets=buckets)
    return dataclasses.replace(config, data=source, eval=settings, mesh=mesh)


def evaluate_run(run_dir: Path, data=None, settings=None, split: str = "", others=(), mesh=None) -> str:
    """Evaluate every finished stage of a run; the text of its table (empty but on the first host).

    data, settings, mesh: Judged, EvalConfig and MeshConfig in place of the run's own. others:
    further run directories. Raises ConfigError for what is no finished run, DataError for
    unusable data.
    """
    config = directory.read_config(run_dir)
    for line in filter(None, map(directory.earlier_version, (run_dir, *_prefixed(others).values()))):
        note(line)
    data = data or source_of_data(config)
    used, finished = _chosen(run_dir, config, data, settings or config.eval, split, others, mesh or config.mesh)
    settings, rows = used.eval, _rows(finished)
    methods = [*settings.baselines, *settings.prompted, *finished, *rows]
    if settings.versus not in methods:
        raise ConfigError(f"eval.versus={settings.versus!r} is not evaluated here; choose one of {', '.join(methods)}")
    dataset, same_data = _dataset(run_dir, config, used)
    examples = evaluation_examples(dataset, used, settings.split)
    train = dataset.splits.get("train", ()) if same_data else _training_split(run_dir, config, dataset)
    predictions, left_out = evaluate.run_baselines(
        settings.baselines, train, dataset.catalogue, dataset.kind, config.seed, examples,
        *config.limits(),
    )  # fmt: skip
    if settings.versus in left_out:
        raise ConfigError(f"eval.versus={settings.versus!r} makes no sense here ({left_out[settings.versus]})")
    on_first(lambda: check_writable(run_dir / "eval"))  # before the time is spent
    places = {"": run_dir, **_prefixed(others)}
    logs = {prefix: read_rows(place / "metrics.jsonl") for prefix, place in places.items()}
    runs = _opened(finished, dataset)
    predictions |= _answers(runs[""], settings, examples)
    said, costs = _said(runs, rows, examples)
    predictions |= said
    rewards = rewards_of(runs[""], predictions)
    fits = {prefix + name: found for prefix, one in runs.items() for name, found in fits_of(one).items()}
    errors = {name: evaluate.errors_of(examples, found, max(settings.cutoffs)) for name, found in said.items()}
    stepped = _stepped(runs, examples, chosen(errors, settings.transcripts))
    if jax.process_index():
        return ""
    evaluation = evaluate.compare(
        examples, predictions, settings.cutoffs, settings.versus, settings.bootstrap, config.seed, settings.metrics,
        rewards, config.reward.k,
    )  # fmt: skip
    evaluation.summary.update(costs)
    about, beside = _about(used, dataset), Beside(logs, stepped if settings.transcripts else None)
    return report.write_evaluation(run_dir / "eval" / settings.split, evaluation, about, left_out, fits, beside)


def _about(used: RunConfig, dataset: datasets.Dataset) -> dict[str, object]:
    """What the evaluation is of: it is written beside the numbers."""
    split = used.eval.split
    return report.manifest(
        as_dict(dataclasses.replace(used, run_dir="")),
        {"run": used.seed, "bootstrap": used.seed},
        {split: dataset.fingerprints[split]},
        report.git_revision(),
        [note.text for note in dataset.notes],
    )


def _dataset(run_dir: Path, config: RunConfig, used: RunConfig) -> tuple[datasets.Dataset, bool]:
    """What to evaluate on, and whether these are the data of the run, which then must not have changed."""
    dataset = datasets.load(used.data, catalogue=directory.read_catalogue(run_dir))
    same = all(getattr(used.data, name) == getattr(config.data, name) for name in ("name", "manual_dir", "pool"))
    if same:
        is_main = jax.process_index() == 0
        directory.check_data(run_dir, dataset.kind, dataset.fingerprints, dataset.catalogue, is_main)
    return dataset, same


# --------------------------------------------------------------------- which policies


def _chosen(
    run_dir: Path, config: RunConfig, data: Judged, settings: EvalConfig, split: str, others, mesh: MeshConfig
) -> tuple[RunConfig, dict[str, Finished]]:
    """The run's configuration with what belongs to the evaluation; the finished stages to evaluate, by their rows."""
    settings = dataclasses.replace(settings, split=split or settings.split)
    reads = policies.selected(config).get(settings.versus, (settings.versus,))
    if set(reads) & set(from_start(config)) and directory.lacking_start(run_dir, config):
        here = next(name for name, stage in stages(config).items() if stage.steps)
        settings = dataclasses.replace(settings, versus=here)  # `_finished` says so
    used = _judged(config, data, settings, mesh)
    finished = _finished(run_dir, "", used, config)
    for prefix, other in _prefixed(others).items():
        theirs = directory.read_config(other)
        _check_limits(other, theirs.limits(), used.limits())
        finished |= _finished(other, prefix, _judged(theirs, data, settings, mesh), theirs)
    return used, finished


class Finished(NamedTuple):
    """A stage to evaluate: `place` holds its checkpoints, `run_dir` the tokenizer."""

    config: RunConfig
    run_dir: Path
    place: Path
    name: str
    instruction: str  # of the data set it was trained on


def _prefixed(others) -> dict[str, Path]:
    """Other run directories by what their rows begin with."""
    found = {}
    for other in map(path_of, others):
        prefix = f"{resolved(other).name}."
        if prefix in found or not re.fullmatch(r"[\w.+-]+", prefix):
            raise ConfigError(
                f"compare {other}: its rows are called after it; rename it, to something unique without spaces"
            )
        found[prefix] = other
    return found


def _check_limits(other: Path, theirs: tuple[int, int], ours: tuple[int, int]) -> None:
    """Methods are compared at the same list lengths; how their lists are made may differ."""
    if theirs != ours:
        raise ConfigError(
            f"compare {other}: its slates and rankings hold up to {theirs} items, those of this run "
            f"{ours}, so they cannot be compared"
        )


def _finished(run_dir: Path, prefix: str, used: RunConfig, config: RunConfig) -> dict[str, Finished]:
    """Every finished stage of a run by its name in the table, and those taken from `start_from`.

    config: the run's own; used: with what belongs to the evaluation. The start is shown what this
    run shows, for it is where this run's stages began; a run that was moved without it does without.
    """
    elsewhere = from_start(config)
    places = {name: run_dir for name in stages(config) if name not in elsewhere}
    if elsewhere and (lacking := directory.lacking_start(run_dir, config)):
        versus = f"; differences are taken to {used.eval.versus}" if not prefix else ""
        rows = " and ".join(prefix + name for name in elsewhere)
        note(f"no row {rows}, which this run started from: {lacking}{versus}")
    elif elsewhere:
        start = directory.start_dir(run_dir, config)
        places = {name: start if name in elsewhere else run_dir for name in stages(config)}
    done = {name: place for name, place in places.items() if directory.is_done(place, name)}
    if not done:
        raise nothing_finished(run_dir)
    instruction = datasets.builder_class(config.data.name).instruction
    return {prefix + name: Finished(used, run_dir, place, name, instruction) for name, place in done.items()}


def _training_split(run_dir: Path, config: RunConfig, dataset):
    """What baselines count in when other data are evaluated: the training data of the run."""
    if "train" in dataset.splits and dataset.fingerprints["train"] == directory.read_fingerprints(run_dir).get("train"):
        return dataset.splits["train"]
    try:
        return datasets.load(config.data).splits.get("train", ())
    except datasets.DataError as error:
        note(f"baselines that count in the run's training data are left out: it cannot be read ({error})")
        return ()


# --------------------------------------------------------------------- what they say


def _by_run(finished: dict[str, Finished]) -> dict[str, dict[str, Finished]]:
    """The stages of each run by their names, by what its rows begin with; nothing of this one's."""
    runs: dict[str, dict[str, Finished]] = {}
    for method, one in finished.items():
        runs.setdefault(method.removesuffix(one.name), {})[one.name] = one
    return runs


def _rows(finished: dict[str, Finished]) -> dict[str, tuple[str, str]]:
    """The selections that the finished stages allow, by row: what the run's rows begin with, and the selection."""
    rows = {}
    for prefix, stages_of in _by_run(finished).items():
        config = next(iter(stages_of.values())).config
        for name, read in policies.selected(config).items():
            if lacking := [other for other in read if other not in stages_of]:
                note(f"no row {prefix}{name}: it reads {' and '.join(lacking)}, not finished here")
            else:
                rows[prefix + name] = (prefix, name)
    return rows


def _opened(finished: dict[str, Finished], dataset) -> dict[str, Opened]:
    """The runs by what their rows begin with."""
    runs = {}
    for prefix, stages_of in _by_run(finished).items():
        first = next(iter(stages_of.values()))
        seen = dataset._replace(kind=directory.read_kind(first.run_dir), instruction=first.instruction)
        shown = evaluation_examples(seen, first.config, first.config.eval.split)
        places = {name: one.place for name, one in stages_of.items()}
        runs[prefix] = Opened(experiments.assemble(first.config, seen, first.run_dir), places, shown)
    return runs


def _said(runs, rows, examples) -> tuple[dict[str, list[Prediction]], dict[str, dict[str, int]]]:
    """Of every row that is no baseline: predictions, as indices into `examples`; and what one costs, by kind."""
    predictions, costs = {}, {"parameters": {}, "flops": {}}
    for prefix, one in runs.items():
        selected = [name for where, name in rows.values() if where == prefix]
        found, flops = predict(one, selected)
        for name, predicted in found.items():
            predictions[prefix + name] = list(map(_reindexed, examples, one.shown, predicted))
        for kind, counts in (("parameters", parameters_of(one, selected)), ("flops", flops)):
            costs[kind] |= {prefix + name: count for name, count in counts.items()}
    return predictions, costs


def _stepped(runs, examples, queries) -> dict[str, dict[int, list[Step]]]:
    """The transcripts of these queries by row, step by step, as indices into `examples`."""
    found = {}
    for prefix, one in runs.items() if queries else ():
        index = {q: _places(examples[q], one.shown[q]) for q in queries}
        for name in steppable(one):
            steps = zip(queries, transcripts(one, name, queries), strict=True)
            found[prefix + name] = {q: [step.about(index[q]) for step in of_query] for q, of_query in steps}
    return found


def _places(example: RankingExample, shown: RankingExample) -> list[int]:
    """Where `example` has the candidates that are shown, in their order."""
    place = {item: i for i, (item, _) in enumerate(example.candidates)}
    return [place[item] for item, _ in shown.candidates]


def _answers(run: Opened, settings: EvalConfig, examples) -> dict[str, list[Prediction]]:
    """The rows that eval.prompted asks for; none, which is said, where what the run started from cannot be asked."""
    try:
        found = answered(run.experiment, settings.prompted, run.shown)
    except (ModelFilesError, ConfigError) as error:
        if settings.versus in settings.prompted:
            raise
        note(f"no row {' and '.join(settings.prompted)}: {error}")
        return {}
    return {name: list(map(_reindexed, examples, run.shown, predicted)) for name, predicted in found.items()}


def _reindexed(example: RankingExample, shown: RankingExample, prediction: Prediction) -> Prediction:
    """A prediction about the candidates in the order shown, as indices into those of `example`."""
    index = _places(example, shown)
    slate, ranking = (tuple(index[c] for c in items) for items in (prediction.slate, prediction.ranking))
    return prediction._replace(slate=slate, ranking=ranking)


def main(argv: list[str]) -> int:
    try:
        return start(*parse_evaluation(argv, __doc__))
    except UserError as error:
        return refuse(error)


def start(run_dir: Path, arguments: Arguments) -> int:
    a = arguments
    try:
        config = directory.read_config(run_dir)
        check_evaluation(_judged(config, a.data, a.eval, a.mesh), experiments.KNOWN)
        experiments.prepare_process(config)
        print(evaluate_run(run_dir, a.data, a.eval, a.split, a.compare, a.mesh))
    except (UserError, OSError) as error:
        return refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(start(*COMMAND))
