"""Train a policy to choose and rank: config -> stages -> one loop, here.

    python train.py [configs/NAME.py] [--dry-run] [--rl.optim.learning-rate 3e-6 ...]

A configuration lists stages, and all run the same loop: SFT is the loop whose rollouts are written
from the relevance labels and whose objective is the negative log-likelihood; GRPO, F-GRPO and GDPO are
the loop with sampled rollouts and different credit; GoalRank is the loop with sampled and proposed
lists and a learned reward. Stopping it (SIGTERM) saves and exits 0; the same command resumes, bit for bit.
--dry-run tells what would run, with memory, shapes and an example, and runs nothing.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path

from fgrpo_jax.errors import UserError
from fgrpo_jax.run.command import parse_or_exit, parse_run, refuse

if __name__ == "__main__":  # before what takes seconds to import, so that --help and a typing error answer at once
    COMMAND = parse_or_exit(parse_run, sys.argv[1:], __doc__)

import jax

import eval as evaluation
from fgrpo_jax import shards
from fgrpo_jax.algorithm import advantages, rewards
from fgrpo_jax.algorithm.credit import SCHEMES
from fgrpo_jax.algorithm.objectives import OBJECTIVES, options, reads_old_logp, with_values
from fgrpo_jax.algorithm.update import by_parts, describe, make_optimizer, make_update, state_shardings
from fgrpo_jax.config_files import as_dict, to_json
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.run import directory, dry_run, own_rewards
from fgrpo_jax.run import experiment as experiments
from fgrpo_jax.run.checkpoint import preemption
from fgrpo_jax.run.checks import check_training
from fgrpo_jax.run.experiment import encoded_ahead, random_key
from fgrpo_jax.run.log import MetricsLog
from fgrpo_jax.run.processes import check_same, code, end_together, initialize_distributed, on_first
from fgrpo_jax.run.sharding import replicated
from fgrpo_jax.run.stage import Stage
from fgrpo_jax.run.validation import validate
from fgrpo_jax.stages import reference_of, stages
from fgrpo_jax.types import map_params

# ===================================================================== the algorithm


def make_step(experiment, policy, stage):
    """The two programs of a step: rollouts with their credit, and the update.

    Returns them, the optimizer, and where the parts of a train state lie.
    """
    config, loss = experiment.config, stage.objective
    credit = own_rewards.credit_of(config, stage.credit)
    scheme = SCHEMES[credit.scheme]
    broken = rewards.broken_values(config.reward.broken, config.reward.rules, policy.outcomes)

    mesh, table = experiment.mesh, policy.table
    beside = experiment.beside(policy, stage.frozen_from)
    sample = shards.by_query(mesh, table, policy.sources[stage.source](stage), beside)
    by_part = functools.partial(by_parts, policy.logprobs, stage.microbatches)
    logprobs = shards.by_query(mesh, table, by_part, beside)
    others = policy.rewards | own_rewards.load(config)
    earned = functools.partial(rewards.term_rewards, credit, k=config.reward.k, broken=broken, learned=others)
    reward_of = shards.by_query(mesh, table, lambda _, frozen, lists, query: earned(lists, query, frozen), beside)

    at_reference = policy.base.bare if reference_of(stage) == "base" else table
    reference_logprobs = shards.by_query(mesh, at_reference, by_part, beside)
    turns_of = shards.by_query(mesh, table, lambda _, frozen, query, rollout: policy.turns(query, rollout), beside)

    @jax.jit
    def collect(params, frozen, query, key):
        rollout, lists = sample(params, frozen, query, key)
        reward_BGR = reward_of(params, frozen, lists, query)
        batch = advantages.make_batch(query, rollout, reward_BGR, credit, loss.weighting)
        turns = turns_of(params, frozen, query, rollout) if scheme.by_item else None
        batch = scheme.assign(credit, config.reward.k, broken, batch, lists, turns)
        if loss.epochs > 1 and reads_old_logp(loss.name):  # to the policy before the first of several updates
            batch = batch.replace(old_logp=logprobs(params, frozen, query, rollout))
        if loss.kl_weight:
            batch = batch.replace(ref_logp=reference_logprobs(frozen["reference"], frozen, query, rollout))
        reward_BGP = rewards.phase_rewards(reward_BGR, credit)
        dead_BP = advantages.dead_groups(rewards.outcome_rewards(reward_BGR, credit, lists, broken), credit)
        seen = describe(lists, batch, reward_BGP, dead_BP, policy.outcomes, sampled=stage.source == "sampled")
        return batch, seen if stage.source != "logged" else {"tokens_trained": seen["tokens_trained"]}

    objective = OBJECTIVES[loss.name](**{name: getattr(loss, name) for name in options(loss.name)})
    read = policy.logprobs
    if scheme.value_by:
        objective, read = with_values(objective, scheme.value_by), policy.choices
    o = stage.optim
    optimizer = make_optimizer(
        o.learning_rate, stage.steps * loss.epochs, o.warmup_steps * loss.epochs, o.decay, o.b1, o.b2, o.eps,
        o.weight_decay, o.clip_norm, map_params(lambda p: p.decay, table),
    )  # fmt: skip
    over_shards = functools.partial(shards.summed, mesh, table, beside=beside)
    update = make_update(read, objective, optimizer, stage.microbatches, loss.epochs, over_shards)
    state_at = state_shardings(optimizer, policy.shapes(), experiment.shardings(policy), replicated(mesh))
    update = jax.jit(update, donate_argnums=0, out_shardings=(state_at, replicated(mesh)))
    return collect, update, optimizer, state_at


def train_stage(experiment, name: str, run_dir: Path, log, stop) -> bool:
    """Run one stage to its end, or to a stop signal; False if it was stopped."""
    config, stage, policy = experiment.config, stages(experiment.config)[name], experiment.policy(name)
    batches = make_batches(experiment.dataset, config, name, stage)
    collect, update, optimizer, state_at = make_step(experiment, policy, stage)
    with Stage(experiment, name, optimizer, state_at, run_dir, log) as keeper:
        state, frozen = keeper.state, keeper.frozen
        collect, update = keeper.compiling("rollouts", collect), keeper.compiling("the update", update)
        steps = keeper.remaining()
        encoded = encoded_ahead(experiment, policy, map(batches.batch_at, steps))
        for step, (examples, query) in zip(steps, encoded, strict=True):
            batch, seen = collect(state.params, frozen, query, random_key(config.seed, name, "rollout", step))
            state, metrics = update(state, frozen, batch)
            if not keeper.on_step(state, seen | metrics, examples, stopping=stop()):
                break
        return keeper.finished


# ===================================================================== the run


def main(argv: list[str]) -> int:
    try:
        command = parse_run(argv, __doc__)
    except UserError as error:
        return refuse(error)
    return start(*command)


def start(config, dry: bool = False) -> int:
    """The exit code of a run; with several processes of one, of all of them."""

    def attempt() -> int:
        try:
            return run(config, dry)
        except (UserError, OSError) as error:
            return refuse(error)

    return end_together(attempt)


def run(config, dry: bool) -> int:
    """Everything between a configuration and its evaluation table."""
    validate(config, experiments.KNOWN)
    own_rewards.load(config)  # before the data are read
    run_dir = directory.check(config)
    initialize_distributed()
    experiments.prepare_process(config)
    dataset = datasets.load(config.data)
    splits = str(sorted(dataset.fingerprints.items()))
    files = {"fgrpo_jax": code(), "reward.own": own_rewards.text(config), "data": splits}
    check_same({"configuration": to_json(config), "jax": jax.__version__} | files)
    experiment = experiments.assemble(config, dataset, run_dir)
    check_training(experiment, run_dir)
    plan = experiments.plan(experiment)
    if dry:
        on_first(lambda: rehearse(experiment, plan))
        return 0
    data = run_dir, dataset.kind, dataset.fingerprints, dataset.catalogue
    directory.check_data(*data, write=False)  # before anything is
    with contextlib.ExitStack() as held:

        def enter():
            held.enter_context(directory.locked(run_dir))
            directory.enter(config)
            directory.check_data(*data)
            print(plan, flush=True)
            for policy in experiment.policies.values():
                policy.files.save(run_dir)
            if config.start_from:
                directory.record_start(run_dir, config)

        on_first(enter)
        directory.check_data(*data, write=False)  # on every host
        return train_and_evaluate(experiment, run_dir)


def rehearse(experiment, plan: str) -> None:
    """Say what would run; nothing is compiled."""
    for line in (plan, *dry_run.lines(experiment)):
        print(line, flush=True)


def train_and_evaluate(experiment, run_dir: Path) -> int:
    config = experiment.config
    log = MetricsLog(run_dir, config.trackers, jax.process_index() == 0, as_dict(config))
    with contextlib.closing(log), preemption() as stop:
        for name, stage in stages(config).items():
            done = not stage.steps or directory.is_done(run_dir, name)
            done = done or train_stage(experiment, name, run_dir, log, stop)
            if not done or stop():
                print(f"stopped in {name}: saved; the same command resumes", flush=True)
                return 0
    if table := evaluation.evaluate_run(run_dir):
        print(table, flush=True)
    return 0


if __name__ == "__main__":
    if exit_code := start(*COMMAND):
        # At once: after a checkpoint that failed, threads of Orbax wait minutes for what never comes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
