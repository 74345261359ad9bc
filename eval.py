"""Evaluate a run beside the baselines, on the same frozen candidates.

    python eval.py RUN_DIR [--split test] [--data.manual-dir DIR] [--compare RUN_DIR2 ...]

Writes RUN_DIR/eval/SPLIT/ and prints its table. The best checkpoint on validation of every
finished stage is decoded greedily; the same inputs give the same bytes.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from fgrpo_jax.config import Config, ConfigError, DataConfig, EvalConfig


@dataclasses.dataclass(frozen=True)
class Arguments:
    split: str
    """Split to evaluate on: validation or test."""
    compare: tuple[str, ...]
    """Other run directories, evaluated on the same candidates as NAME.STAGE."""
    data: DataConfig
    eval: EvalConfig


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
    default = Arguments(split=config.eval.split, compare=(), data=config.data, eval=config.eval)
    return run_dir, tyro.cli(Arguments, default=default, args=argv, prog="eval.py RUN_DIR", description=__doc__)


def evaluate_run(run_dir: Path, data=None, settings=None, split: str | None = None, others=()) -> str:
    """Evaluate every finished stage of a run; the text of its table.

    data, settings: DataConfig and EvalConfig in place of the run's own. others: further run
    directories. Raises ConfigError for what is no finished run, DataError for unusable data.
    """
    from fgrpo_jax import datasets, evaluate, report
    from fgrpo_jax import run as run_lib
    from fgrpo_jax.data import evaluation_examples

    config = run_lib.read_config(run_dir)
    settings = settings or config.eval
    split = split or settings.split
    used = dataclasses.replace(config, data=data or config.data, eval=settings)
    dataset = datasets.load(used.data, catalogue=run_lib.read_catalogue(run_dir))
    if used.data == config.data:
        run_lib.check_data(run_dir, dataset.fingerprints, dataset.catalogue)
    examples = evaluation_examples(dataset, used, split)
    train = dataset.splits.get("train", ()) if used.data == config.data else _own_training_split(config)
    limits = config.transcript.slate_max, config.transcript.rank_max
    predictions, left_out = evaluate.run_baselines(
        settings.baselines, train, dataset.catalogue, dataset.kind, config.seed, examples, *limits
    )
    predictions |= _stages(used, run_dir, dataset, examples, prefix="")
    for other in others:
        theirs = dataclasses.replace(run_lib.read_config(Path(other)), data=used.data, eval=settings)
        predictions |= _stages(theirs, Path(other), dataset, examples, prefix=f"{Path(other).name}.")
    evaluation = evaluate.compare(
        examples, predictions, settings.cutoffs, settings.versus, settings.bootstrap, config.seed
    )
    about = report.manifest(
        dataclasses.asdict(dataclasses.replace(used, run_dir="")),
        {"run": config.seed, "bootstrap": config.seed},
        {split: dataset.fingerprints[split]},
        report.git_revision(),
    )
    return report.write_evaluation(run_dir / "eval" / split, evaluation, about, left_out)


def _own_training_split(config):
    """What baselines count in when other data are evaluated: the training data of the run."""
    from fgrpo_jax import datasets

    try:
        return datasets.load(config.data).splits.get("train", ())
    except datasets.DataError as error:
        print(f"note: the run's training data cannot be read, baselines that count in it are left out ({error})")
        return ()


def _stages(config, run_dir: Path, dataset, examples, prefix: str) -> dict:
    """Greedy predictions of every finished stage of a run, and of the one it started from."""
    from fgrpo_jax import experiment as experiment_lib
    from fgrpo_jax.config import ConfigError
    from fgrpo_jax.stage import best_params, is_done

    experiment = experiment_lib.assemble(config, dataset, run_dir)
    predict = experiment_lib.Predictor(experiment)
    places = {"sft": Path(config.start_from or run_dir).expanduser(), "rl": run_dir}
    found = {
        prefix + name: predict(best_params(experiment, place, name), examples)
        for name, place in places.items()
        if is_done(place, name)
    }
    if not found:
        raise ConfigError(f"{run_dir} has no finished stage yet: let train.py run to its end")
    return found


def main(argv: list[str]) -> int:
    try:
        run_dir, arguments = parse(argv)
        from fgrpo_jax.experiment import enable_compilation_cache
        from fgrpo_jax.run import read_config

        enable_compilation_cache(read_config(run_dir).compilation_cache)
        print(evaluate_run(run_dir, arguments.data, arguments.eval, arguments.split, arguments.compare))
    except ValueError as error:  # ConfigError and DataError
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
