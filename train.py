"""Train a policy to choose and rank: config -> stages -> one loop, here.

    python train.py [configs/NAME.py] [--rl.optim.learning-rate 3e-6 ...]

Two stages, `sft` and `rl`, run the same loop: SFT is the loop whose rollouts are written
from the relevance labels and whose objective is the negative log-likelihood; GRPO, F-GRPO
and GDPO are the loop with sampled rollouts and different credit. Stopping it (SIGTERM) saves
and exits 0; the same command resumes, bit for bit.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path


def parse(argv: list[str]):
    """The configuration: a file's `get_config()`, overridden by flags."""
    import tyro

    from fgrpo_jax import config as config_lib
    from fgrpo_jax.run.validation import check_types

    rest = list(argv)
    if rest and not rest[0].startswith("-"):
        path = rest.pop(0)
        default = config_lib.load_file(path)
        check_types(default)
    else:
        default = config_lib.load_file(Path(__file__).with_name("configs") / "synthetic.py")
    return tyro.cli(config_lib.Config, default=default, args=rest, prog="train.py", description=__doc__)


# ===================================================================== the algorithm


def make_step(experiment, policy, stage):
    """The two programs of a step: rollouts with their credit, and the update."""
    import jax

    from fgrpo_jax import shards
    from fgrpo_jax.algorithm import advantages, rewards
    from fgrpo_jax.algorithm.objectives import OBJECTIVES
    from fgrpo_jax.algorithm.update import by_parts, describe, make_optimizer, make_update, state_shardings
    from fgrpo_jax.models.decoder import param_table, shapes
    from fgrpo_jax.run.sharding import replicated
    from fgrpo_jax.types import Credit, map_params

    config, loss = experiment.config, stage.objective
    credit = Credit(stage.credit.terms, stage.credit.normalise)
    broken = rewards.broken_values(config.reward.broken, config.reward.rules, policy.outcomes)

    mesh, table = experiment.mesh, param_table(experiment.spec)
    sample = shards.by_query(mesh, table, policy.rollout)
    logprobs = shards.by_query(mesh, table, functools.partial(by_parts, policy.logprobs, stage.microbatches))

    @jax.jit
    def collect(params, frozen, query, key):
        rollout, lists = sample(params, frozen, query, key)
        reward_BGR = rewards.term_rewards(credit, lists, query, frozen, config.reward.k, broken)
        batch = advantages.make_batch(query, rollout, reward_BGR, credit, loss.weighting)
        if loss.epochs > 1:  # the policy before the first of several updates
            batch = batch.replace(old_logp=logprobs(params, frozen, query, rollout))
        if loss.kl_weight:
            batch = batch.replace(ref_logp=logprobs(frozen["reference"], frozen, query, rollout))
        reward_BGP = rewards.phase_rewards(reward_BGR, credit)
        dead_BP = advantages.dead_groups(reward_BGR, credit)
        seen = describe(lists, batch, reward_BGP, dead_BP, policy.outcomes)
        return batch, seen if stage.source == "sampled" else {}

    objective = OBJECTIVES[loss.name](
        ratio=loss.ratio, clip_low=loss.clip_low, clip_high=loss.clip_high, kl_weight=loss.kl_weight
    )
    o = stage.optim
    optimizer = make_optimizer(
        o.learning_rate, stage.steps * loss.epochs, o.warmup_steps * loss.epochs, o.decay, o.b1, o.b2, o.eps,
        o.weight_decay, o.clip_norm, map_params(lambda p: p.decay, table),
    )  # fmt: skip
    over_shards = functools.partial(shards.summed, mesh, table)
    update = make_update(policy, objective, optimizer, stage.microbatches, loss.epochs, over_shards)
    elsewhere = replicated(mesh)
    places = state_shardings(optimizer, shapes(experiment.spec), experiment.param_shardings, elsewhere)
    update = jax.jit(update, donate_argnums=0, out_shardings=(places, elsewhere))
    return collect, update, optimizer, places


def train_stage(experiment, name: str, stage, start_params, run_dir: Path, log, stop) -> bool:
    """Run one stage to its end, or to a stop signal; False if it was stopped.

    start_params: () -> params, called where no checkpoint is there to resume from, and where
    the frozen reference has to be rebuilt.
    """
    from fgrpo_jax.data.batches import make_batches
    from fgrpo_jax.run.experiment import encode, make_policy, random_key
    from fgrpo_jax.run.stage import Stage

    config = experiment.config
    policy = make_policy(experiment, stage)
    batches = make_batches(experiment.dataset, config, name, stage)
    collect, update, optimizer, places = make_step(experiment, policy, stage)
    with Stage(experiment, name, stage, optimizer, places, start_params, run_dir, log) as keeper:
        state, frozen = keeper.state, keeper.frozen
        for step in keeper.remaining():
            examples = batches.batch_at(step)
            query = encode(experiment, policy, examples)
            batch, seen = collect(state.params, frozen, query, random_key(config.seed, name, "rollout", step))
            state, metrics = update(state, frozen, batch)
            if not keeper.on_step(state, seen | metrics, examples, stopping=stop()):
                break
        return keeper.finished


# ===================================================================== the run


def main(argv: list[str]) -> int:
    from fgrpo_jax.config import ConfigError

    try:
        config = parse(argv)
    except ConfigError as error:
        return _refuse(error)
    from fgrpo_jax.data.datasets import DataError
    from fgrpo_jax.models.hf_config import ModelFilesError
    from fgrpo_jax.run.processes import end_together
    from fgrpo_jax.types import TrainingError

    def attempt() -> int:
        try:
            return run(config)
        except (ConfigError, DataError, ModelFilesError, TrainingError, OSError) as error:
            return _refuse(error)

    return end_together(attempt)


def _refuse(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def run(config) -> int:
    """Everything between a configuration and its evaluation table."""
    from fgrpo_jax.run import directory
    from fgrpo_jax.run import experiment as experiment_lib
    from fgrpo_jax.run.validation import validate

    validate(config, experiment_lib.KNOWN)
    run_dir = directory.check(config)
    import jax

    from fgrpo_jax.config import to_json
    from fgrpo_jax.data import datasets
    from fgrpo_jax.run.processes import check_same, code, initialize_distributed, on_first
    from fgrpo_jax.run.stage import check_training

    initialize_distributed()
    experiment_lib.prepare_process(config)
    dataset = datasets.load(config.data)
    splits = str(sorted(dataset.fingerprints.items()))
    check_same({"configuration": to_json(config), "jax": jax.__version__, "fgrpo_jax": code(), "data": splits})
    experiment = experiment_lib.assemble(config, dataset, run_dir)
    check_training(experiment, run_dir)
    plan = experiment_lib.plan(experiment)
    data = run_dir, dataset.kind, dataset.fingerprints, dataset.catalogue
    directory.check_data(*data, write=False)  # before anything is
    with contextlib.ExitStack() as held:

        def enter():
            held.enter_context(directory.locked(run_dir))
            directory.enter(config)
            directory.check_data(*data)
            print(plan, flush=True)
            experiment_lib.save_description(experiment, run_dir)
            if config.start_from:
                directory.record_start(run_dir, config)

        on_first(enter)
        directory.check_data(*data, write=False)  # on every host
        return _train_and_evaluate(experiment, run_dir)


def _train_and_evaluate(experiment, run_dir: Path) -> int:
    import jax

    from fgrpo_jax.evaluation import report
    from fgrpo_jax.run.checkpoint import preemption
    from fgrpo_jax.run.log import MetricsLog

    config, is_main = experiment.config, jax.process_index() == 0
    log = MetricsLog(run_dir, config.tensorboard, is_main)
    with contextlib.closing(log), preemption() as stop:
        for name, stage in (("sft", config.sft), ("rl", config.rl)):
            finished = not stage.steps or _run_stage(experiment, name, stage, run_dir, log, stop)
            if not finished or stop():
                print(f"stopped in {name}: saved; the same command resumes", flush=True)
                return 0
    if is_main and log.path.is_file():
        report.curves(log.path, run_dir / "curves.png")
    import eval as evaluation

    if table := evaluation.evaluate_run(run_dir):
        print(table, flush=True)
    return 0


def _run_stage(experiment, name: str, stage, run_dir: Path, log, stop) -> bool:
    from fgrpo_jax.run.directory import is_done
    from fgrpo_jax.run.finished import best_params, source_of

    if is_done(run_dir, name):
        return True

    def start_params():
        from fgrpo_jax.run.experiment import initial_params

        source = source_of(experiment.config, run_dir, name)
        return best_params(experiment, *source) if source else initial_params(experiment)

    return train_stage(experiment, name, stage, start_params, run_dir, log, stop)


if __name__ == "__main__":
    if code := main(sys.argv[1:]):
        # At once: after a checkpoint that failed, threads of Orbax wait minutes for what never comes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
