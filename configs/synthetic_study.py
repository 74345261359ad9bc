"""What a credit scheme, more imitation, or another world changes in the default run (configs/synthetic.py).

    python train.py                                            # first: its SFT is where VARIANTs of credit start
    python train.py configs/synthetic_study.py:VARIANT

Variants in FROM_SFT train `rl` anew from runs/synthetic; the others, WHOLE, train from the beginning; wanted_6+grpo
trains `rl` anew from runs/study/wanted_6. For another seed: --seed, --start-from a run of that seed, and --run-dir.
"""

import dataclasses
import runpy
from pathlib import Path

from fgrpo_jax.config import Config, ConfigError, CreditConfig, ObjectiveConfig

_JOINT = (("slate", "recall", 1.0), ("slate", "ndcg", 1.0), ("rank", "recall", 1.0), ("rank", "ndcg", 1.0))


def _credit(**fields):
    return lambda c: dataclasses.replace(c, rl=dataclasses.replace(c.rl, credit=CreditConfig(**fields)))


def _labels(config: Config) -> Config:
    """It needs no group, so the same number of rollouts is of four times the queries."""
    rl = _credit(scheme="labels")(config).rl
    wide = dict(batch_queries=4 * rl.batch_queries, group_size=rl.group_size // 4)
    return dataclasses.replace(config, rl=dataclasses.replace(rl, **wide))


def _more_sft(config: Config) -> Config:
    """Imitation goes on, on the queries that F-GRPO would see; 400 steps take about as long as its 250."""
    nll = ObjectiveConfig(name="nll")
    optim = dataclasses.replace(config.rl.optim, learning_rate=2e-3)
    sft = dict(source="logged", group_size=1, batch_queries=64, steps=400, eval_every=100)
    return dataclasses.replace(config, rl=dataclasses.replace(config.rl, objective=nll, optim=optim, **sft))


def _sft_in_order(config: Config) -> Config:
    """Imitation alone, of slates that begin with what is wanted in the order of gain, on all queries, and for about as
    long as both stages take."""
    target = dataclasses.replace(config.sft.target, fill="first")
    sft = dataclasses.replace(config.sft, target=target, subset=(0.0, 1.0), steps=700)
    return dataclasses.replace(config, sft=sft, rl=dataclasses.replace(config.rl, steps=0))


def _world(**fields):
    def change(config: Config) -> Config:
        world = dataclasses.replace(config.data.synthetic, **fields)
        # Of two words each: 80 candidates make 192 tokens, and all prompts of a world are equally long.
        tokens = config.data.prompt_buckets[0] + 2 * (world.pool - config.data.synthetic.pool)
        data = dataclasses.replace(config.data, synthetic=world, prompt_buckets=(tokens,))
        return dataclasses.replace(config, data=data)

    return change


def _less_sft(steps: int):
    return lambda c: dataclasses.replace(c, sft=dataclasses.replace(c.sft, steps=steps, eval_every=steps))


FROM_SFT = {
    "as_it_is": lambda config: config,
    "grpo": _credit(terms=_JOINT),
    "gdpo": _credit(terms=_JOINT, normalise="each"),
    **{scheme: _credit(scheme=scheme) for scheme in ("outcome", "to_go", "to_go_state", "exact")},
    "labels": _labels,
    "more_sft": _more_sft,
}
WHOLE = {
    **{f"interests_{n}": _world(interests=n) for n in (1, 2, 4)},
    **{f"pool_{n}": _world(pool=n) for n in (40, 60)},
    **{f"wanted_{n}": _world(wanted=(n, n)) for n in (2, 6, 10)},
    **{f"misplaced_{n}": _world(misplaced=n) for n in (0.2, 0.5)},
    **{f"start_{n}": _less_sft(n) for n in (50, 100)},
    "sft_in_order": _sft_in_order,
}
VARIANTS = FROM_SFT | WHOLE


def get_config(variant: str = "as_it_is") -> Config:
    whole, plus, credit = ("", "+", variant) if variant in FROM_SFT else variant.partition("+")
    if (variant not in FROM_SFT and whole not in WHOLE) or (plus and credit not in FROM_SFT):
        raise ConfigError(
            f"there is no variant {variant!r}, only {', '.join(VARIANTS)}, and one of the worlds with a "
            "credit, as wanted_6+grpo"
        )
    config = runpy.run_path(str(Path(__file__).with_name("synthetic.py")))["get_config"]()
    config = dataclasses.replace(config, run_dir=f"runs/study/{variant}")
    if whole:
        config = WHOLE[whole](config)
    if not plus:
        return config
    start = f"runs/study/{whole}" if whole else "runs/synthetic"
    return FROM_SFT[credit](dataclasses.replace(config, start_from=start, sft=dataclasses.replace(config.sft, steps=0)))
