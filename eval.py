"""Evaluate a run beside the baselines, on the same frozen candidates.

    python eval.py RUN_DIR [--split test] [--data.manual-dir DIR] [--compare RUN_DIR2 ...]

Writes RUN_DIR/eval/SPLIT/ and prints its table. The best checkpoint on validation of every
finished stage is decoded greedily; the same inputs give the same bytes.
"""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import NamedTuple

from fgrpo_jax.config import Config, ConfigError, DataConfig, EvalConfig, MeshConfig
from fgrpo_jax.launch import keep_memory


@dataclasses.dataclass(frozen=True)
class Arguments:
    split: str
    """Split to evaluate on, as test; empty: eval.split."""
    compare: tuple[str, ...]
    """Other run directories, evaluated on the same candidates as NAME.STAGE."""
    data: DataConfig
    eval: EvalConfig
    mesh: MeshConfig


def parse(argv: list[str]) -> tuple[Path, Arguments]:
    """The run directory, and the arguments over the run's own configuration."""
    import tyro

    from fgrpo_jax.run import read_config

    run_dir, config = Path("RUN_DIR"), Config()
    if argv and not argv[0].startswith("-"):
        run_dir = Path(argv[0]).expanduser()
        config = read_config(run_dir)
        argv = argv[1:]
    elif not {"-h", "--help"} & set(argv):
        raise ConfigError("give the run directory first: python eval.py RUN_DIR [--split test]")
    default = Arguments(split="", compare=(), data=config.data, eval=config.eval, mesh=config.mesh)
    prog = "eval.py RUN_DIR"
    return run_dir, tyro.cli(Arguments, default=default, args=argv, prog=prog, description=__doc__)


def evaluate_run(run_dir: Path, data=None, settings=None, split: str = "", others=(), mesh=None) -> str:
    """Evaluate every finished stage of a run; the text of its table (empty but on the first host).

    data, settings, mesh: DataConfig, EvalConfig and MeshConfig in place of the run's own. others:
    further run directories. Raises ConfigError for what is no finished run, DataError for
    unusable data.
    """
    import jax

    from fgrpo_jax import datasets, evaluate, report
    from fgrpo_jax import run as run_lib
    from fgrpo_jax.data import evaluation_examples

    config = run_lib.read_config(run_dir)
    settings = settings or config.eval
    settings = dataclasses.replace(settings, split=split or settings.split)
    used = dataclasses.replace(config, data=data or config.data, eval=settings, mesh=mesh or config.mesh)
    stages = _finished(run_dir, used, others)
    dataset = datasets.load(used.data, catalogue=run_lib.read_catalogue(run_dir))
    same_data = used.data == config.data
    if same_data:
        is_main = jax.process_index() == 0
        run_lib.check_data(run_dir, dataset.kind, dataset.fingerprints, dataset.catalogue, is_main)
    examples = evaluation_examples(dataset, used, settings.split)
    train = dataset.splits.get("train", ()) if same_data else _training_split(run_dir, config, dataset)
    predictions, left_out = evaluate.run_baselines(
        settings.baselines, train, dataset.catalogue, dataset.kind, config.seed, examples,
        config.transcript.slate_max, config.transcript.rank_max,
    )  # fmt: skip
    if settings.versus not in (methods := [*predictions, *stages]):
        known = ", ".join(methods)
        raise ConfigError(f"eval.versus={settings.versus!r} is not evaluated here; choose one of {known}")
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


class Finished(NamedTuple):
    """A stage to evaluate: `place` holds its checkpoints, `run_dir` the tokenizer."""

    config: Config
    run_dir: Path
    place: Path
    name: str


def _finished(run_dir: Path, used: Config, others) -> dict[str, Finished]:
    """Every finished stage by its name in the table, and the one that `start_from` names."""
    from fgrpo_jax.run import read_config
    from fgrpo_jax.stage import is_done

    runs = {"": (run_dir, used)}
    for other in map(Path, others):
        prefix = f"{other.resolve().name}."
        if prefix in runs or not re.fullmatch(r"[\w.+-]+", prefix):
            raise ConfigError(
                f"compare {other}: its rows are called after it; rename it, to something unique without spaces"
            )
        theirs = read_config(other)
        if theirs.transcript != used.transcript:
            raise ConfigError(f"compare {other}: its lists have other limits or tags, so it cannot be compared")
        theirs = dataclasses.replace(theirs, data=used.data, eval=used.eval, mesh=used.mesh)
        runs[prefix] = (other, theirs)
    found = {}
    for prefix, (folder, config) in runs.items():
        places = {"sft": Path(config.start_from or folder).expanduser(), "rl": folder}
        done = {name: place for name, place in places.items() if is_done(place, name)}
        if not done:
            raise ConfigError(f"{folder} has no finished stage yet: let train.py run to its end")
        found |= {prefix + name: Finished(config, folder, place, name) for name, place in done.items()}
    return found


def _training_split(run_dir: Path, config: Config, dataset):
    """What baselines count in when other data are evaluated: the training data of the run."""
    from fgrpo_jax import datasets
    from fgrpo_jax.run import read_fingerprints

    if "train" in dataset.splits and dataset.fingerprints["train"] == read_fingerprints(run_dir).get("train"):
        return dataset.splits["train"]
    try:
        return datasets.load(config.data).splits.get("train", ())
    except datasets.DataError as error:
        print(f"note: baselines that count in the run's training data are left out: it cannot be read ({error})")
        return ()


def _predict(stages: dict[str, Finished], dataset, examples) -> dict[str, list]:
    """Greedy predictions with the best parameters of every stage."""
    from fgrpo_jax import experiment as experiment_lib
    from fgrpo_jax.stage import best_params

    found, built = {}, {}
    for method, stage in stages.items():
        if stage.run_dir not in built:  # the stages of a run share one compiled program
            experiment = experiment_lib.assemble(stage.config, dataset, stage.run_dir)
            built[stage.run_dir] = experiment, experiment_lib.Predictor(experiment)
        experiment, predict = built[stage.run_dir]
        found[method] = predict(best_params(experiment, stage.place, stage.name), examples)
    return found


def main(argv: list[str]) -> int:
    try:
        run_dir, arguments = parse(argv)
    except ConfigError as error:
        return _refuse(error)
    from fgrpo_jax.datasets import DataError
    from fgrpo_jax.experiment import KNOWN, prepare_process
    from fgrpo_jax.models.hf_config import ModelFilesError
    from fgrpo_jax.run import read_config
    from fgrpo_jax.validation import check_evaluation

    try:
        config = read_config(run_dir)
        check_evaluation(dataclasses.replace(config, data=arguments.data, eval=arguments.eval), KNOWN)
        prepare_process(config.compilation_cache)
        a = arguments
        print(evaluate_run(run_dir, a.data, a.eval, a.split, a.compare, a.mesh))
    except (ConfigError, DataError, ModelFilesError) as error:
        return _refuse(error)
    return 0


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    keep_memory()
    sys.exit(main(sys.argv[1:]))
