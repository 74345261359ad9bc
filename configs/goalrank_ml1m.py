"""GoalRank's protocol on MovieLens-1M: lists of six films out of fifty that a first stage retrieved.

    python train.py configs/goalrank_ml1m.py          pools as retrieved: 27 % of the films to find are in them
    python train.py configs/goalrank_ml1m.py:closed   the others put in; nobody sees the first stage's scores

data/ml-1m holds ml-1m.zip. In closed pools the first stage gives the answer away (fgrpo_jax/data/goalrank.py), so
networks and proposals are kept from its scores and its order there, and DLCM, which reads that order, is left out.
"""

import dataclasses

from fgrpo_jax.config import ConfigError, DataConfig, EvalConfig, OptimConfig, RewardConfig
from fgrpo_jax.policies.ranker.config import NetworkConfig, ProposalsConfig, RankerConfig, SelectionConfig


def get_config(pool: str = "open") -> RankerConfig:
    if pool not in ("open", "closed"):
        raise ConfigError(f"{pool!r} is not one of open, closed")
    base, is_open = RankerConfig(), pool == "open"
    from_first_stage = (("retriever", 2),) if is_open else (("random", 2),)

    def likely(stage, steps):
        optim = OptimConfig(learning_rate=3e-3, warmup_steps=20, decay="cosine", weight_decay=0.05)
        return dataclasses.replace(stage, steps=steps, batch_queries=128, eval_every=100, optim=optim)

    def groups(stage, steps, **fields):
        optim = OptimConfig(learning_rate=2e-3, warmup_steps=20, decay="cosine", weight_decay=0.05)
        sizes = {"steps": steps, "batch_queries": 64, "group_size": 20, "eval_every": 100}
        return dataclasses.replace(stage, **sizes, optim=optim, **fields)

    return dataclasses.replace(
        base,
        run_dir=f"runs/goalrank_ml1m_{pool}",
        data=DataConfig(name="goalrank_ml1m", manual_dir="data/ml-1m", pool=pool, history_max=20),
        network=NetworkConfig(hidden_size=64, sees_retrieval=is_open),
        proposals=ProposalsConfig(mix=(*from_first_stage, ("pointwise", 3), ("mmr_pointwise", 2), ("perturbed", 5))),
        selection=SelectionConfig(generators=20, sizes=(1, 3, 20), lists=60),
        reward=RewardConfig(k=6),
        eval=EvalConfig(
            split="test",
            metric="ndcg@6",
            metrics=("hit", "ndcg", "map", "f1", "list_auc", "pool_auc", "diversity"),
            cutoffs=(6,),
            train_queries=1000,
            batch_queries=250,
            rewards=("reward_model",),
            baselines=("random", "popularity", "covisitation", "retrieval"),
            versus="goalrank",
        ),
        evaluator=likely(base.evaluator, 400),
        pointwise=likely(base.pointwise, 400),
        dlcm=likely(base.dlcm, 400 if is_open else 0),
        prm=likely(base.prm, 400),
        imitation=likely(base.imitation, 400),
        generators=likely(base.generators, 200),
        two_phase=likely(base.two_phase, 400),
        goalrank=groups(base.goalrank, 300, starts_from="imitation"),
        grpo=groups(base.grpo, 300, starts_from="imitation"),
        fgrpo=groups(base.fgrpo, 300),
    )
