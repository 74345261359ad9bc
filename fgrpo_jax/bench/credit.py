"""How much signal the gradient of each scheme of credit has, at equal sampled tokens, on frozen checkpoints.

    python -m fgrpo_jax.bench credit RUN_DIR [--stage rl] [--at STAGE:STEP ...] [--queries N] [--group N] [--draws N]
                                     [--batches N] [--reference N] [--shrinkage X] [--json FILE] [--manual-dir DIR]

Of the same queries, rollouts are drawn again and again, and every scheme gives the gradient of the same rollouts:

    snr      |mean|^2 / variance, both summed over all parameters: of `draws` gradients of queries x group rollouts;
             0 where nothing varies
    unbiased the same less the variance that is left in the mean, variance / draws
    cosine   of one gradient with an estimate from `reference` other draws (0: not shown); schemes that estimate the
             same expectation share the estimate of `exact`; GRPO, GDPO and `labels` each have their own

each a mean over `batches` of training queries of the stage, ± their standard deviation. GRPO and GDPO give every
term of the stage's credit to both phases. Without `--at`, what the stage starts from. One device.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fgrpo_jax.algorithm import advantages, rewards
from fgrpo_jax.algorithm.credit import SCHEMES
from fgrpo_jax.algorithm.objectives import clipped_pg, with_values
from fgrpo_jax.bench.measure import positive
from fgrpo_jax.config import ConfigError, CreditConfig, MeshConfig, StageConfig
from fgrpo_jax.data import datasets
from fgrpo_jax.data.batches import make_batches
from fgrpo_jax.errors import UserError
from fgrpo_jax.files import path_of
from fgrpo_jax.run import directory, experiment, own_rewards
from fgrpo_jax.run.checkpoint import Checkpoints, placed
from fgrpo_jax.run.experiment import Experiment, encode, initial_params, random_key
from fgrpo_jax.run.finished import best_params, frozen_params, source_of
from fgrpo_jax.run.validation import problems_of
from fgrpo_jax.stages import stages
from fgrpo_jax.types import PHASES, Credit, PyTree
from fgrpo_jax.types_of_policies import Policy

OWN = ("grpo", "gdpo", "labels")  # rows whose expectation is no other row's


def rows_of(stage: StageConfig, shrinkage: float) -> dict[str, CreditConfig]:
    """The schemes that are compared, by their names in the table."""
    terms = stage.credit.terms
    rewarded = dict.fromkeys((name, weight) for _, name, weight in terms)
    joint = tuple((phase, name, weight) for phase in PHASES for name, weight in rewarded)
    rows = {"grpo": CreditConfig(joint), "gdpo": CreditConfig(joint, normalise="each"), "fgrpo": CreditConfig(terms)}
    for name, scheme in SCHEMES.items():
        if name != "group":
            own = {"shrinkage": shrinkage} if "shrinkage" in scheme.options else {}
            rows[name] = CreditConfig(terms, scheme=name, **own)
    return rows


def possible(config: Any, name: str, rows: dict[str, CreditConfig]) -> tuple[dict[str, CreditConfig], dict[str, str]]:
    """The rows that this stage could be trained with, and why it could not with the others."""
    found, refused = {}, {}
    for row, credit in rows.items():
        stage = dataclasses.replace(stages(config)[name], credit=credit, steps=max(1, stages(config)[name].steps))
        problems = problems_of(dataclasses.replace(config, **{name: stage}), experiment.KNOWN)
        here = [problem for problem in problems if problem.startswith(f"{name}.")]
        if here:
            refused[row] = here[0]
        else:
            found[row] = credit
    return found, refused


# --------------------------------------------------------------------- gradients


def make_gradients(built: Experiment, policy: Policy, stage: StageConfig, rows: dict[str, CreditConfig]) -> Callable:
    """(params, frozen, query, key) -> (gradients of one draw, flat, [row, parameter]; what the rollouts were like)."""
    config = built.config
    broken = rewards.broken_values(config.reward.broken, config.reward.rules, policy.outcomes)
    source = policy.sources[stage.source](stage)
    credits = {row: own_rewards.credit_of(config, c) for row, c in rows.items()}
    known = policy.rewards | own_rewards.load(config)
    by_choice = any(SCHEMES[c.scheme].value_by for c in credits.values())

    def batch_of(credit: Credit, frozen, query, rollout, lists):
        reward_BGR = rewards.term_rewards(credit, lists, query, frozen, config.reward.k, broken, known)
        batch = advantages.make_batch(query, rollout, reward_BGR, credit, stage.objective.weighting)
        turns = policy.turns(query, rollout) if SCHEMES[credit.scheme].by_item else None
        return SCHEMES[credit.scheme].assign(credit, config.reward.k, broken, batch, lists, turns)

    def slopes(credit: Credit, batch, scores: tuple):
        """Of the loss by what the policy says of every action."""
        plain = clipped_pg()
        if value_by := SCHEMES[credit.scheme].value_by:
            return jax.grad(lambda scores: with_values(plain, value_by)(scores, batch)[0])(scores)
        slope = jax.grad(lambda logp: plain(logp, batch)[0])(scores[0])
        return slope, *(jnp.zeros_like(x) for x in scores[1:])

    @jax.jit
    def gradients(params: PyTree, frozen: PyTree, query: PyTree, key: jax.Array):
        rollout, lists = source(params, frozen, query, key)

        def scores_of(params: PyTree) -> tuple:
            read = policy.choices if by_choice else lambda *args: (policy.logprobs(*args),)
            return read(params, frozen, query, rollout)

        scores, pull = jax.vjp(scores_of, params)
        batches = {row: batch_of(credit, frozen, query, rollout, lists) for row, credit in credits.items()}
        of_rows = [slopes(credit, batches[row], scores) for row, credit in credits.items()]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *of_rows)

        def one(slope: tuple) -> jax.Array:
            return jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in jax.tree.leaves(pull(slope)[0])])

        credit = own_rewards.credit_of(config, CreditConfig(stage.credit.terms))
        reward_BGR = rewards.term_rewards(credit, lists, query, frozen, config.reward.k, broken, known)
        judged_BGR = rewards.outcome_rewards(reward_BGR, credit, lists, broken)
        dead_P = advantages.dead_groups(judged_BGR, credit).mean(0)
        reward_P = rewards.phase_rewards(reward_BGR, credit).mean((0, 1))
        items = (lists.slate >= 0).sum() + (lists.ranking >= 0).sum()
        return jax.lax.map(one, stacked), (dead_P, reward_P, items / lists.outcome.size)

    return gradients


def direction(x: jax.Array) -> jax.Array:
    """Of length 1, or 0 where all is 0."""
    length = jnp.linalg.norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1.0)


def signal(
    gradients: Callable, params: PyTree, frozen: PyTree, query: PyTree, draws: int, reference: int,
    key: Callable[[str, int], jax.Array], own: list[int], shared: int,
) -> tuple[dict[str, np.ndarray], Any]:  # fmt: skip
    """Of one batch of queries: snr, unbiased snr and cosine of each row; and what the rollouts were like.

    own: rows that are compared with the mean of their own reference draws, the others with that of row `shared`.
    """
    of_draw = functools.partial(gradients, params, frozen, query)
    target = None
    if reference:
        total = 0.0
        for i in range(reference):
            total = total + of_draw(key("reference", i))[0]
        which = jnp.asarray([row if row in own else shared for row in range(total.shape[0])])
        target = direction(total[which])
    total, squares, cosine, like = 0.0, 0.0, 0.0, []
    for i in range(draws):
        found, seen = of_draw(key("draw", i))
        total, squares = total + found, squares + (found**2).sum(-1)
        if target is not None:
            cosine = cosine + (direction(found) * target).sum(-1)
        like.append(jax.tree.map(np.asarray, seen))
    squared_mean = np.asarray(((total / draws) ** 2).sum(-1), np.float64)
    variance = (np.asarray(squares, np.float64) - draws * squared_mean) / (draws - 1)
    snr = np.divide(squared_mean, variance, out=np.zeros_like(variance), where=variance > 0)
    found = {"snr": snr, "unbiased": snr - 1 / draws}
    if target is not None:
        found["cosine"] = np.asarray(cosine) / draws
    return found, jax.tree.map(lambda *x: np.mean(x, 0), *like)


# --------------------------------------------------------------------- of a run directory


def params_at(built: Experiment, run_dir: Path, name: str, at: str) -> PyTree:
    """Parameters of a checkpoint, `STAGE:STEP`, or of what stage `name` starts from where that is empty."""
    if not at:
        source = source_of(built.config, run_dir, name)
        return best_params(built, *source) if source else initial_params(built, built.policy(name))
    stage, _, step = at.partition(":")
    if stage not in stages(built.config) or not step.isdecimal():
        raise ConfigError(f"--at {at}: give a stage ({', '.join(stages(built.config))}) and a step, as sft:60")
    policy = built.policy(stage)
    if stages(built.config)[stage].policy != stages(built.config)[name].policy:
        raise ConfigError(f"--at {at}: stage {stage} trains another policy than {name}")
    with Checkpoints(run_dir / stage / "checkpoints", 1, read_only=True) as checkpoints:
        wanted = placed(policy.shapes(), built.shardings(policy))
        return checkpoints.restore_part(int(step), {"params": wanted})["params"]


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for every scheme at every checkpoint."""
    run_dir = path_of(args.run_dir)
    config = directory.read_config(run_dir)
    if args.stage not in stages(config):
        raise ConfigError(f"{run_dir} has no stage {args.stage!r}, only {', '.join(stages(config))}")
    stage = dataclasses.replace(stages(config)[args.stage], batch_queries=args.queries, group_size=args.group)
    if stage.source != "sampled" or stage.objective.name != "clipped_pg":
        raise ConfigError(
            f"--stage {args.stage} has no policy gradient of own samples (source={stage.source!r}, "
            f"objective.name={stage.objective.name!r}): choose one with 'sampled' and 'clipped_pg'"
        )
    data = dataclasses.replace(config.data, manual_dir=args.manual_dir or config.data.manual_dir)
    one = MeshConfig(data=1, fsdp=1, tensor=1)
    config = dataclasses.replace(config, data=data, mesh=one, **{args.stage: stage})
    rows, refused = possible(config, args.stage, rows_of(stage, args.shrinkage))
    for row, why in refused.items():
        print(f"note: no row {row}: {why}")
    if not rows:
        raise ConfigError(f"--stage {args.stage} could be trained with none of the schemes")
    experiment.prepare_process(config)
    dataset = datasets.load(data, catalogue=directory.read_catalogue(run_dir))
    built = experiment.assemble(config, dataset, run_dir)
    policy = built.policy(args.stage)
    gradients = make_gradients(built, policy, stage, rows)
    frozen = frozen_params(built, run_dir, args.stage) | built.base(policy)
    batches = make_batches(dataset, config, args.stage, stage)
    names = list(rows)
    own = [names.index(row) for row in OWN if row in rows]
    shared = names.index("exact" if "exact" in rows else [row for row in names if row not in OWN][-1])
    found = []
    for at in args.at or [""]:
        params = params_at(built, run_dir, args.stage, at)
        measured, like = [], []
        for number in range(args.batches):
            query = encode(built, policy, batches.batch_at(number))

            def key(stream: str, draw: int, number: int = number) -> jax.Array:
                return random_key(config.seed, f"credit {stream} {number}", "rollout", draw)

            seen = signal(gradients, params, frozen, query, args.draws, args.reference, key, own, shared)
            measured.append(seen[0])
            like.append(seen[1])
        dead, reward, items = jax.tree.map(lambda *x: np.mean(x, 0), *like)
        about = {"at": at or "start", "dead": dead.tolist(), "reward": reward.tolist(), "items": float(items)}
        for i, row in enumerate(names):
            values = {name: [float(one[name][i]) for one in measured] for name in measured[0]}
            found.append({"row": row, **about, **values})
        print(table(found[-len(names) :], args), flush=True)
    return found


def table(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """For people: one checkpoint."""
    about = rows[0]
    dead, reward = about["dead"], about["reward"]
    lines = [
        f"{args.run_dir} at {about['at']}: {args.queries} queries x {args.group} rollouts of {about['items']:.1f} "
        f"items, {args.draws} draws, {args.batches} batches",
        f"dead groups: slate {dead[0]:.0%}, rank {dead[1]:.0%}; reward: slate {reward[0]:.3f}, rank {reward[1]:.3f}",
    ]
    columns = [name for name in ("snr", "unbiased", "cosine") if name in about]
    lines.append(f"{'':12}" + "".join(f"{name:>16}" for name in columns))
    for row in rows:
        cells = (f"{np.mean(row[name]):.3f} ±{np.std(row[name]):.3f}" for name in columns)
        lines.append(f"{row['row']:12}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines) + "\n"


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m fgrpo_jax.bench credit", description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", metavar="RUN_DIR")
    parser.add_argument("--stage", default="rl", help="whose credit, queries and start; default: rl")
    parser.add_argument("--at", nargs="*", default=[], metavar="STAGE:STEP", help="checkpoints; default: its start")
    parser.add_argument("--queries", type=positive, default=64, metavar="N", help="of a batch")
    parser.add_argument("--group", type=positive, default=8, metavar="N", help="rollouts of a query")
    parser.add_argument("--draws", type=positive, default=24, metavar="N", help="gradients of a batch; at least 2")
    parser.add_argument("--batches", type=positive, default=3, metavar="N", help="of other queries")
    parser.add_argument("--reference", type=int, default=0, metavar="N", help="draws behind the estimate; 0: none")
    parser.add_argument("--shrinkage", type=float, default=1.0, metavar="X", help="as credit.shrinkage")
    parser.add_argument("--manual-dir", default="", metavar="DIR", help="where the data lie now")
    parser.add_argument("--json", metavar="FILE", help="write everything measured")
    args = parser.parse_args(argv)
    if args.draws < 2 or args.group < 2 or args.reference < 0:
        parser.error("--draws and --group must be at least 2, --reference not negative")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    try:
        found = measure(args)
        if args.json:
            Path(args.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
