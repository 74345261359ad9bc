"""GoalRank's protocol on MovieLens-1M: lists of six films out of fifty that a first stage retrieved.

    python train.py configs/goalrank_ml1m.py --data.manual-dir data/ml-1m [--data.pool closed]

data/ml-1m holds ml-1m.zip.
"""

import dataclasses

from fgrpo_jax.config import DataConfig, EvalConfig, OptimConfig, RewardConfig
from fgrpo_jax.policies.ranker.config import NetworkConfig, ProposalsConfig, RankerConfig, SelectionConfig


def get_config() -> RankerConfig:
    base = RankerConfig()

    def likely(stage, steps):
        optim = OptimConfig(learning_rate=3e-3, warmup_steps=20, decay="cosine", weight_decay=0.05)
        return dataclasses.replace(stage, steps=steps, batch_queries=128, eval_every=100, optim=optim)

    def groups(stage, steps, **fields):
        optim = OptimConfig(learning_rate=2e-3, warmup_steps=20, decay="cosine", weight_decay=0.05)
        sizes = {"steps": steps, "batch_queries": 64, "group_size": 20, "eval_every": 100}
        return dataclasses.replace(stage, **sizes, optim=optim, **fields)

    return dataclasses.replace(
        base,
        run_dir="runs/goalrank_ml1m",
        data=DataConfig(name="goalrank_ml1m", manual_dir="data/ml-1m", history_max=20),
        network=NetworkConfig(hidden_size=64),
        proposals=ProposalsConfig(mix=(("retriever", 2), ("pointwise", 3), ("mmr_pointwise", 2), ("perturbed", 5))),
        selection=SelectionConfig(generators=20, sizes=(1, 3, 20), lists=60),
        reward=RewardConfig(k=6),
        eval=EvalConfig(
            split="test",
            metric="ndcg@6",
            metrics=("hit", "ndcg", "map", "f1", "list_auc", "pool_auc", "diversity"),
            cutoffs=(6,),
            train_queries=1000,
            batch_queries=250,
            baselines=("random", "popularity", "covisitation", "retrieval"),
            versus="goalrank",
        ),
        evaluator=likely(base.evaluator, 400),
        pointwise=likely(base.pointwise, 400),
        dlcm=likely(base.dlcm, 400),
        prm=likely(base.prm, 400),
        imitation=likely(base.imitation, 300),
        generators=likely(base.generators, 300),
        two_phase=likely(base.two_phase, 300),
        goalrank=groups(base.goalrank, 300, starts_from="imitation"),
        grpo=groups(base.grpo, 300, starts_from="imitation"),
        fgrpo=groups(base.fgrpo, 300),
    )
