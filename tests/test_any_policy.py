"""Any policy with any objective and credit: two steps of each in the one loop (train.make_step)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from one_step import build, two_steps
from tiny import changed, quick_programs
from tiny_lists import tiny_ranker, write_lists

from fgrpo_jax.data import datasets
from fgrpo_jax.run.experiment import KNOWN, assemble, initial_params
from fgrpo_jax.run.validation import validate

F_GRPO = (("slate", "recall", 1.0), ("rank", "ndcg", 1.0))
GRPO = tuple((phase, reward, 1.0) for phase in ("slate", "rank") for reward in ("recall", "ndcg"))
ONE = (("rank", "ndcg", 1.0),)

SAMPLED = {
    "clipped_pg, F-GRPO": {"objective.name": "clipped_pg", "credit.terms": F_GRPO},
    "clipped_pg, GRPO": {"objective.name": "clipped_pg", "credit.terms": GRPO},
    "credit: exact": {"credit.scheme": "exact", "credit.terms": F_GRPO},
    "credit: labels": {"credit.scheme": "labels", "credit.terms": F_GRPO},
    "group_softmax": {"objective.name": "group_softmax", "objective.weighting": "phase", "credit.terms": ONE},
}
# System -> the stages that imitate, and that sample.
STAGES = {"llm": ("sft", "rl"), "ranker": ("imitation", "fgrpo")}


@pytest.fixture(scope="module")
def experiments(tmp_path_factory):
    """Of both systems."""
    folder = tmp_path_factory.mktemp("ranker")
    (folder / "data").mkdir()
    config = tiny_ranker(write_lists(folder / "data"), folder / "prepared", folder / "run", steps=2)
    validate(config, KNOWN)
    ranker = assemble(config, datasets.load(config.data), folder / "run")
    with quick_programs():
        yield {"llm": build(tmp_path_factory.mktemp("llm")), "ranker": ranker}


@pytest.mark.parametrize("case", ["nll", *SAMPLED])
@pytest.mark.parametrize("system", STAGES)
def test_two_steps(experiments, system, case):
    experiment = experiments[system]
    imitating, sampling = STAGES[system]
    name = imitating if case == "nll" else sampling
    fields = {f"{name}.{field}": value for field, value in SAMPLED.get(case, {}).items()}
    config = changed(experiment.config, fields)
    validate(config, KNOWN)
    experiment = assemble(config, experiment.dataset, Path(config.run_dir))
    state, batch, seen, compiled = two_steps(experiment, name)
    start = initial_params(experiment, experiment.policy(name))
    moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state.params, start)
    assert compiled == 1 and int(state.step) == 2 and max(jax.tree.leaves(moved)) > 0.01
    assert all(np.isfinite(value) for row in seen for value in row.values()) and seen[1]["nonfinite"] == 0
    assert set(np.unique(batch.rollout.phase)) >= ({1, 2} if case != "nll" or system == "llm" else {2})
