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
from typing import TYPE_CHECKING, NamedTuple

from fgrpo_jax.config import Config, ConfigError, EvalConfig, MeshConfig, TranscriptConfig

if TYPE_CHECKING:
    from fgrpo_jax.evaluation.evaluate import Prediction
    from fgrpo_jax.types import RankingExample


@dataclasses.dataclass(frozen=True)
class Judged:
    """Where the queries and candidates come from."""

    name: str
    """Data set: synthetic, lastfm, musique or jsonl."""
    manual_dir: str
    """Folder with the raw files of the data set (not used by synthetic)."""
    prepared_dir: str
    """Where prepared data sets are kept."""
    prompt_buckets: tuple[int, ...] = ()
    """Padded prompt lengths, ascending; empty: those each policy was trained with."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    split: str
    """Split to evaluate on, as test; empty: eval.split."""
    compare: tuple[str, ...]
    """Other run directories, evaluated on the same candidates as NAME.STAGE."""
    data: Judged
    eval: EvalConfig
    mesh: MeshConfig


def parse(argv: list[str]) -> tuple[Path, Arguments]:
    """The run directory, and the arguments over the run's own configuration."""
    import tyro

    from fgrpo_jax.run.directory import read_config

    run_dir, config = Path("RUN_DIR"), Config()
    if argv and not argv[0].startswith("-"):
        run_dir = Path(argv[0]).expanduser()
        config = read_config(run_dir)
        argv = argv[1:]
    elif not {"-h", "--help"} & set(argv):
        raise ConfigError("give the run directory first: python eval.py RUN_DIR [--split test]")
    default = Arguments(split="", compare=(), data=_source(config), eval=config.eval, mesh=config.mesh)
    prog = "eval.py RUN_DIR"
    return run_dir, tyro.cli(Arguments, default=default, args=argv, prog=prog, description=__doc__)


def _source(config: Config) -> Judged:
    return Judged(config.data.name, config.data.manual_dir, config.data.prepared_dir)


def _judged(config: Config, data: Judged, settings: EvalConfig, mesh: MeshConfig) -> Config:
    """A run's configuration with all that belongs to the evaluation; what its policy sees stays."""
    buckets = data.prompt_buckets or config.data.prompt_buckets
    source = {"name": data.name, "manual_dir": data.manual_dir, "prepared_dir": data.prepared_dir}
    source = dataclasses.replace(config.data, **source, prompt_buckets=buckets)
    return dataclasses.replace(config, data=source, eval=settings, mesh=mesh)


def evaluate_run(run_dir: Path, data=None, settings=None, split: str = "", others=(), mesh=None) -> str:
    """Evaluate every finished stage of a run; the text of its table (empty but on the first host).

    data, settings, mesh: Judged, EvalConfig and MeshConfig in place of the run's own. others:
    further run directories. Raises ConfigError for what is no finished run, DataError for
    unusable data.
    """
    import jax

    from fgrpo_jax.data import datasets
    from fgrpo_jax.data.batches import evaluation_examples
    from fgrpo_jax.evaluation import evaluate, report
    from fgrpo_jax.files import check_writable
    from fgrpo_jax.run import directory
    from fgrpo_jax.run.processes import on_first

    config = directory.read_config(run_dir)
    for note in filter(None, map(directory.earlier_version, (run_dir, *_prefixed(others).values()))):
        _note(note)
    settings = settings or config.eval
    settings = dataclasses.replace(settings, split=split or settings.split)
    data, mesh = data or _source(config), mesh or config.mesh
    if settings.versus == "sft" and config.start_from and directory.lacking_start(run_dir, config):
        settings = dataclasses.replace(settings, versus="rl")  # `_finished` says so
    used = _judged(config, data, settings, mesh)
    stages = _finished(run_dir, "", used, config)
    for prefix, other in _prefixed(others).items():
        theirs = directory.read_config(other)
        _check_limits(other, theirs.transcript, used.transcript)
        stages |= _finished(other, prefix, _judged(theirs, data, settings, mesh), theirs)
    dataset = datasets.load(used.data, catalogue=directory.read_catalogue(run_dir))
    same_data = (data.name, data.manual_dir) == (config.data.name, config.data.manual_dir)
    if same_data:
        is_main = jax.process_index() == 0
        directory.check_data(run_dir, dataset.kind, dataset.fingerprints, dataset.catalogue, is_main)
    examples = evaluation_examples(dataset, used, settings.split)
    train = dataset.splits.get("train", ()) if same_data else _training_split(run_dir, config, dataset)
    predictions, left_out = evaluate.run_baselines(
        settings.baselines, train, dataset.catalogue, dataset.kind, config.seed, examples,
        config.transcript.slate_max, config.transcript.rank_max,
    )  # fmt: skip
    if settings.versus not in (methods := [*predictions, *stages]):
        known = ", ".join(methods)
        raise ConfigError(f"eval.versus={settings.versus!r} is not evaluated here; choose one of {known}")
    on_first(lambda: check_writable(run_dir / "eval"))  # before the time is spent
    predictions |= _predict(stages, dataset, examples)
    if jax.process_index():
        return ""
    evaluation = evaluate.compare(
        examples, predictions, settings.cutoffs, settings.versus, settings.bootstrap, config.seed
    )
    about = report.manifest(
        dataclasses.asdict(dataclasses.replace(used, run_dir="")),
        {"run": config.seed, "bootstrap": config.seed},
        {settings.split: dataset.fingerprints[settings.split]},
        report.git_revision(),
    )
    return report.write_evaluation(run_dir / "eval" / settings.split, evaluation, about, left_out)


# --------------------------------------------------------------------- which policies


class Finished(NamedTuple):
    """A stage to evaluate: `place` holds its checkpoints, `run_dir` the tokenizer."""

    config: Config
    run_dir: Path
    place: Path
    name: str
    instruction: str  # first line(s) of the prompts it was trained on


def _prefixed(others) -> dict[str, Path]:
    """Other run directories by what their rows begin with."""
    found = {}
    for other in map(Path, others):
        prefix = f"{other.resolve().name}."
        if prefix in found or not re.fullmatch(r"[\w.+-]+", prefix):
            raise ConfigError(
                f"compare {other}: its rows are called after it; rename it, to something unique without spaces"
            )
        found[prefix] = other
    return found


def _check_limits(other: Path, theirs: TranscriptConfig, ours: TranscriptConfig) -> None:
    """Methods are compared at the same list lengths; how their transcripts are written may differ."""
    limits = [(t.slate_max, t.rank_max) for t in (theirs, ours)]
    if limits[0] != limits[1]:
        raise ConfigError(
            f"compare {other}: its slates and rankings hold up to {limits[0]} items, those of this run "
            f"{limits[1]}, so they cannot be compared"
        )


def _finished(run_dir: Path, prefix: str, used: Config, config: Config) -> dict[str, Finished]:
    """Every finished stage of a run by its name in the table, and the one that `start_from` names.

    config: the run's own; used: with what belongs to the evaluation. The start is shown what this
    run shows, for it is where this run's `rl` began; a run that was moved without it does without.
    """
    from fgrpo_jax.data.datasets import builder_class
    from fgrpo_jax.run import directory

    places = {"sft": run_dir, "rl": run_dir}
    if config.start_from:
        places["sft"] = directory.start_dir(run_dir, config)
        if lacking := directory.lacking_start(run_dir, config):
            del places["sft"]
            versus = f"; differences are taken to {used.eval.versus}" if not prefix else ""
            _note(f"no row {prefix}sft, the start of {prefix}rl: {lacking}{versus}")
    done = {name: place for name, place in places.items() if directory.is_done(place, name)}
    if not done:
        raise ConfigError(f"{run_dir} has no finished stage yet: let train.py run to its end")
    instruction = config.prompt.instruction or builder_class(config.data.name).instruction
    return {prefix + name: Finished(used, run_dir, place, name, instruction) for name, place in done.items()}


def _note(text: str) -> None:
    import jax

    if jax.process_index() == 0:
        print(f"note: {text}")


def _training_split(run_dir: Path, config: Config, dataset):
    """What baselines count in when other data are evaluated: the training data of the run."""
    from fgrpo_jax.data import datasets
    from fgrpo_jax.run.directory import read_fingerprints

    if "train" in dataset.splits and dataset.fingerprints["train"] == read_fingerprints(run_dir).get("train"):
        return dataset.splits["train"]
    try:
        return datasets.load(config.data).splits.get("train", ())
    except datasets.DataError as error:
        _note(f"baselines that count in the run's training data are left out: it cannot be read ({error})")
        return ()


# --------------------------------------------------------------------- what they say


def _predict(stages: dict[str, Finished], dataset, examples) -> dict[str, list]:
    """Greedy predictions with the best parameters of every stage, as indices into `examples`."""
    from fgrpo_jax.data.batches import evaluation_examples
    from fgrpo_jax.run import experiment as experiment_lib
    from fgrpo_jax.run.directory import read_kind
    from fgrpo_jax.run.finished import best_params

    found, built = {}, {}
    for method, stage in stages.items():
        if stage.run_dir not in built:  # the stages of a run share one compiled program
            seen = dataset._replace(kind=read_kind(stage.run_dir), instruction=stage.instruction)
            experiment = experiment_lib.assemble(stage.config, seen, stage.run_dir)
            shown = evaluation_examples(seen, stage.config, stage.config.eval.split)
            built[stage.run_dir] = experiment, experiment_lib.Predictor(experiment), shown
        experiment, predict, shown = built[stage.run_dir]
        predictions = predict(best_params(experiment, stage.place, stage.name), shown)
        found[method] = list(map(_reindexed, examples, shown, predictions))
    return found


def _reindexed(example: RankingExample, shown: RankingExample, prediction: Prediction) -> Prediction:
    """A prediction about the candidates in the order shown, as indices into those of `example`."""
    place = {item: i for i, (item, _) in enumerate(example.candidates)}
    index = [place[item] for item, _ in shown.candidates]
    slate, ranking = (tuple(index[c] for c in items) for items in (prediction.slate, prediction.ranking))
    return prediction._replace(slate=slate, ranking=ranking)


def main(argv: list[str]) -> int:
    try:
        run_dir, arguments = parse(argv)
    except ConfigError as error:
        return _refuse(error)
    from fgrpo_jax.data.datasets import DataError
    from fgrpo_jax.models.hf_config import ModelFilesError
    from fgrpo_jax.run.directory import read_config
    from fgrpo_jax.run.experiment import KNOWN, prepare_process
    from fgrpo_jax.run.validation import check_evaluation

    try:
        config = read_config(run_dir)
        a = arguments
        check_evaluation(_judged(config, a.data, a.eval, a.mesh), KNOWN)
        prepare_process(config)
        print(evaluate_run(run_dir, a.data, a.eval, a.split, a.compare, a.mesh))
    except (ConfigError, DataError, ModelFilesError, OSError) as error:
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
