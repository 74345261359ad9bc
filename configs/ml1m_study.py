"""Credit on MovieLens-1M: 100 candidates, the next five films wanted and worth their rating; or 20 with the next one.

    python train.py configs/ml1m_study.py:hundred --data.manual-dir ml        # or another of POOLS; README: Logs of
                                                                              # interactions
    python train.py configs/ml1m_study.py:hundred+grpo --data.manual-dir ml   # `rl` anew, with another credit

A credit is one of configs/synthetic_study.py:FROM_SFT. For another seed: --seed, --start-from a run of that seed, and
--run-dir. A model of 0.3 million parameters from scratch; five minutes for each of SFT (nine for `converged`) and `rl`
on one CPU core.
"""

import dataclasses

from configs.next_item import get_config as next_item
from configs.synthetic_study import FROM_SFT
from fgrpo_jax.config import Config, ConfigError, DataConfig, EvalConfig, InteractionsConfig, OptimConfig

# Candidates, relevant ones, what each is worth. converged is hundred after SFT that learnt what it can, of all training
# queries, which `rl` sees again.
POOLS = {"hundred": (100, 5, "rating"), "converged": (100, 5, "rating"), "twenty": (20, 1, "one")}


def get_config(variant: str = "hundred") -> Config:
    pool, plus, credit = variant.partition("+")
    if pool not in POOLS or (plus and credit not in FROM_SFT):
        raise ConfigError(
            f"there is no variant {variant!r}, only {', '.join(POOLS)}, and these with a credit, as hundred+grpo: "
            f"{', '.join(FROM_SFT)}"
        )
    base = next_item()
    size, targets, gain = POOLS[pool]
    logs = InteractionsConfig(
        text=("title",), rating="rating", min_rating=4.0, gain=gain, kcore=5, targets=targets, windows=8, min_history=5
    )
    # Patience would end SFT where validation is flat for a while; all starts are to be equally far.
    sft = dict(steps=1500, batch_queries=64, eval_every=250, patience=0, subset=(0.0, 0.5))
    config = dataclasses.replace(
        base,
        run_dir=f"runs/ml1m/{variant}",
        data=DataConfig(
            name="interactions",
            manual_dir="ml",
            prompt_buckets="auto",
            pool_size=size,
            history_max=20,
            interactions=logs,
        ),
        sft=dataclasses.replace(base.sft, **sft),
        rl=dataclasses.replace(
            base.rl,
            steps=400,
            batch_queries=64,
            eval_every=100,
            subset=(0.5, 1.0),
            optim=OptimConfig(learning_rate=5e-4, decay="linear"),
        ),
        eval=EvalConfig(split="test", train_queries=1000, metrics=("recall", "hit", "ndcg")),
    )
    if pool == "converged":
        sft = dataclasses.replace(config.sft, steps=5000, eval_every=500, subset=(0.0, 1.0))
        config = dataclasses.replace(config, sft=sft, rl=dataclasses.replace(config.rl, subset=(0.0, 1.0)))
    if not plus:
        return config
    start = {"start_from": f"runs/ml1m/{pool}", "sft": dataclasses.replace(config.sft, steps=0)}
    config = FROM_SFT[credit](dataclasses.replace(config, **start))
    if credit == "labels":  # of four times the queries
        optim = dataclasses.replace(config.rl.optim, learning_rate=1e-3)
        config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, optim=optim))
    if credit == "more_sft":  # 1,200 steps would take as long as the other credits
        config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, steps=2000, eval_every=250))
    return config
