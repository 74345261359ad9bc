"""What every single action is credited with: the schemes of `Credit.scheme`.

    group        its phase's reward, less the group's mean (advantages.py): GRPO, GDPO, F-GRPO by their terms
    outcome      the same, but siblings are left out of their own mean, and a ranking is compared with those of slates
                 that found the same (blockwise advantages with an outcome-conditioned baseline, arXiv 2602.10231)
    to_go        reward to go: what its item and later ones bring, less what the siblings' from this place on bring
    to_go_state  the same, less what others had to go in the same state: as many relevant items still to be placed
    exact        the gain of every choice by its probability; what is sampled is only what comes after (see `exact`)
    labels       the gain of every choice by the logarithm of its probability: imitation, in the states that the policy
                 itself came to (see `labels`)

The last four need rewards that are sums over items (rewards.SUMS: recall of the slate, ndcg of the ranking).
All but `group` and `labels` leave a rollout out of its own baseline (siblings are the group's others, a state also
has those of other queries), so the baseline does not depend on the action that it judges and the gradient is unbiased:
that of E[reward of the slate] by the slate's actions plus that of E[reward of the ranking] by the ranking's. `group`
includes it, which scales that gradient by (G - 1) / G; its terms may also give a phase the other's reward, and
normalise="each" or "sum" is no gradient of an expectation. `labels` has no baseline, and another maximum.

A mean over few siblings alike is shrunk towards that over more, which counts as `shrinkage` siblings: over all of them
for rankings of slates alike (outcome), over other queries' rollouts in the same state (to_go_state, exact).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from fgrpo_jax import metrics
from fgrpo_jax.algorithm.advantages import per_action, phase_totals
from fgrpo_jax.algorithm.rewards import SUMS, Broken
from fgrpo_jax.types import TRAINED, Array, Batch, Credit, Lists, Turns

# --------------------------------------------------------------------- baselines


def _others(group: int) -> Array:
    """[G,G,1] bool: another rollout of the group."""
    return ~jnp.eye(group, dtype=bool)[..., None]


def _less_siblings(value_BGX: Array) -> Array:
    """value - mean of the others, as a mean of differences: exactly 0 where all are equal."""
    return (value_BGX[:, :, None] - value_BGX[:, None]).sum(2) / (value_BGX.shape[1] - 1)


def _less_alike(value_BGX: Array, key_BGX: Array, shrinkage: float) -> Array:
    """value - mean of the siblings with the same key, shrunk; exactly 0 where all values are equal."""
    alike_BGHX = (key_BGX[:, :, None] == key_BGX[:, None]) & _others(value_BGX.shape[1])
    less_BGX = jnp.where(alike_BGHX, value_BGX[:, :, None] - value_BGX[:, None], 0.0).sum(2)
    return (less_BGX + shrinkage * _less_siblings(value_BGX)) / (alike_BGHX.sum(2) + shrinkage)


# --------------------------------------------------------------------- of whole phases


def _group(credit: Credit, k: int, broken: Broken, batch: Batch, lists: Lists, turns: Turns | None) -> Batch:
    return batch  # as make_batch gives it


def _outcome(credit: Credit, k: int, broken: Broken, batch: Batch, lists: Lists, turns: Turns | None) -> Batch:
    """Slates are alike where they hold the same gains, in any order; one that broke is like those that broke."""
    total_BGP = phase_totals(batch.reward, credit)
    keeps_BG1 = jnp.asarray(broken.keeps_slate)[lists.outcome][..., None]
    found_BGN = jnp.sort(metrics.take_gains(batch.query.relevance[:, None], lists.slate), -1)
    found_BGN = jnp.where(keeps_BG1, found_BGN, -1.0)
    alike_BGH = (found_BGN[:, :, None] == found_BGN[:, None]).all(-1)
    first_BG1 = jnp.argmax(alike_BGH, -1)[..., None]  # the first slate alike, as its name
    slate_BG1 = _less_siblings(total_BGP[..., :1])
    rank_BG1 = _less_alike(total_BGP[..., 1:], first_BG1, credit.shrinkage)
    advantage_BGP = jnp.concatenate([slate_BG1, rank_BG1], -1)
    return batch.replace(advantage=per_action(advantage_BGP, batch.rollout.phase))


# --------------------------------------------------------------------- item by item


class _Phase(NamedTuple):
    """A phase's list, item by item. X: its places; Y = X + 1: and the end of the longest list."""

    gain: Array  # [B,X,C]: what a candidate brings at a place
    to_go: Array  # [B,G,Y]: what the items from a place on brought
    missing: Array  # [B,G,Y]: relevant items still to be placed; -1 where a list was never begun


def _phases(credit: Credit, k: int, broken: Broken, batch: Batch, lists: Lists) -> tuple[_Phase, _Phase]:
    pool_BC = batch.query.relevance
    keeps_BG, ok_BG = jnp.asarray(broken.keeps_slate)[lists.outcome], lists.outcome == 0
    total_B1 = (pool_BC > 0).sum(-1)[:, None]
    found_BGN = metrics.take_gains(pool_BC[:, None], lists.slate) > 0
    in_slate_BG = jnp.where(keeps_BG, found_BGN.sum(-1), -1)
    slate = _phase(credit, k, "slate", pool_BC, lists.slate, total_B1, keeps_BG, batch.reward)
    return slate, _phase(credit, k, "rank", pool_BC, lists.ranking, in_slate_BG, ok_BG, batch.reward)


def _phase(
    credit: Credit, k: int, phase: str, pool_BC: Array, list_BGX: Array, most_BG: Array, rewarded_BG: Array,
    reward_BGR: Array,
) -> _Phase:  # fmt: skip
    """most_BG: relevant items that the list could hold."""
    size = list_BGX.shape[-1]
    gain_BXC, penalty_BG = jnp.zeros((len(pool_BC), size, pool_BC.shape[-1])), 0.0
    for r, (of, name, weight) in enumerate(credit.terms):
        if of == phase:
            gain_BXC += weight * SUMS[name].gains(pool_BC, k, size)
            penalty_BG += weight * reward_BGR[..., r]
    there_BGX = list_BGX >= 0
    picked_BGXC = jnp.arange(pool_BC.shape[-1]) == list_BGX[..., None]
    brought_BGX = jnp.where(picked_BGXC, gain_BXC[:, None], 0.0).sum(-1)
    brought_BGX = jnp.where(rewarded_BG[..., None], brought_BGX, 0.0)
    end_BG1 = jnp.where(rewarded_BG, 0.0, penalty_BG)[..., None]
    to_go_BGY = jnp.flip(jnp.cumsum(jnp.flip(jnp.concatenate([brought_BGX, end_BG1], -1), -1), -1), -1)
    relevant_BGX = there_BGX & (metrics.take_gains(pool_BC[:, None], list_BGX) > 0)
    placed_BGY = jnp.pad(jnp.cumsum(relevant_BGX, -1), [(0, 0), (0, 0), (1, 0)])
    missing_BGY = jnp.where(most_BG[..., None] < 0, -1, most_BG[..., None] - placed_BGY)
    return _Phase(gain_BXC, to_go_BGY, missing_BGY)


def _at(value_BGY: Array, place_BGT: Array) -> Array:
    return jnp.take_along_axis(value_BGY, jnp.minimum(place_BGT, value_BGY.shape[-1] - 1), -1)


def _choices_at(value_BGXC: Array, place_BGT: Array) -> Array:
    """[B,G,T,C]: of every candidate at the place of every action; G of the values may be 1."""
    return jnp.take_along_axis(value_BGXC, jnp.minimum(place_BGT, value_BGXC.shape[2] - 1)[..., None], 2)


def _by_phase(batch: Batch, of_phase: tuple[Array, ...]) -> Array:
    """[B,G,T,...]: at every action what belongs to its phase; 0 where untrained."""
    found = jnp.zeros_like(of_phase[0])
    for label, value in zip(TRAINED, of_phase, strict=True):
        mine = (batch.rollout.phase == label).reshape(*batch.rollout.phase.shape, *[1] * (value.ndim - 3))
        found = jnp.where(mine, value, found)
    return found


def _to_go(credit: Credit, k: int, broken: Broken, batch: Batch, lists: Lists, turns: Turns) -> Batch:
    phases = _phases(credit, k, broken, batch, lists)
    advantages = tuple(_at(_less_siblings(p.to_go), turns.place) for p in phases)
    return batch.replace(advantage=_by_phase(batch, advantages))


def _values(p: _Phase, place: slice, missing_BGX: Array, shrinkage: float) -> Array:
    """[B,G,X]: reward to go from these places on with so many relevant items missing, as others had it; 0 for none.

    The mean over siblings in that state, shrunk towards that over the rollouts of the other queries in it, which
    where there are none is that over all siblings at the place.
    """
    to_go_BHX, state_BHX = p.to_go[..., place], p.missing[..., place]
    other_GH1 = _others(to_go_BHX.shape[1])

    def mean(sum_BGX: Array, count_BGX: Array, towards_BGX: Array, weight: float) -> Array:
        return (sum_BGX + weight * towards_BGX) / (count_BGX + weight)

    def of_other_queries(of_states_BHXM: Array) -> Array:
        own_BXM = of_states_BHXM.sum(1)
        others_B1XM = (own_BXM.sum(0) - own_BXM)[:, None]
        return jnp.take_along_axis(others_B1XM, jnp.maximum(missing_BGX, 0)[..., None], -1)[..., 0]

    states_BHXM = (state_BHX[..., None] == jnp.arange(p.gain.shape[-1] + 1)).astype(jnp.float32)
    siblings_BGX = jnp.where(other_GH1, to_go_BHX[:, None], 0.0).sum(2) / (to_go_BHX.shape[1] - 1)
    sum_BGX, count_BGX = map(of_other_queries, (states_BHXM * to_go_BHX[..., None], states_BHXM))
    prior_BGX = mean(sum_BGX, count_BGX, siblings_BGX, 1.0)
    alike_BGHX = (missing_BGX[:, :, None] == state_BHX[:, None]) & other_GH1
    alike_sum_BGX = jnp.where(alike_BGHX, to_go_BHX[:, None], 0.0).sum(2)
    value_BGX = mean(alike_sum_BGX, alike_BGHX.sum(2), prior_BGX, shrinkage)
    return jnp.where(missing_BGX > 0, value_BGX, 0.0)


def _to_go_state(credit: Credit, k: int, broken: Broken, batch: Batch, lists: Lists, turns: Turns) -> Batch:
    def advantage(p: _Phase) -> Array:
        return _at(p.to_go - _values(p, slice(None), p.missing, credit.shrinkage), turns.place)

    return batch.replace(advantage=_by_phase(batch, tuple(map(advantage, _phases(credit, k, broken, batch, lists)))))


def exact(credit: Credit, k: int, broken: Broken, batch: Batch, lists: Lists, turns: Turns) -> Batch:
    """Every choice's gain by its own probability; the score function only for what comes after.

    Naming candidate a at place x has the value Q(a) = its gain there + V, V the reward to go that others had from
    place x + 1 on with as many relevant items missing as there would be. With G the realised reward to go, the
    gradient is

        sum_t [ sum_a Q(a) grad pi(a) + (G_t - Q(a_t)) grad log pi(a_t) ],

    whose expectation does not depend on V, as V does not on a_t: unbiased. With one relevant candidate d it is
    (w_t - b_t) grad pi(d) + 1{a_t is not d} (G_{t+1} - b_t) grad log pi(a_t) up to the place of d and 0 after it: w_t
    the gain of d, b_t = V where d is still missing. It has an expectation over actions as expected policy gradients
    have (arXiv 1706.05374), with Q half known and half from others' rollouts in place of a learned critic.

    A token that leaves several candidates possible has the mean of their values, a literal 0; where only literals
    can follow, V at this place is a baseline. Batch.value holds Q, and objectives.with_values adds the sum over a.
    """
    values, baselines, to_go = [], [], []
    for p in _phases(credit, k, broken, batch, lists):
        pool_B11C = batch.query.relevance[:, None, None]
        now_BGX, after = p.missing[..., :-1], slice(1, None)
        missed_BGX = _values(p, after, now_BGX, credit.shrinkage)
        hit_BGX = _values(p, after, now_BGX - 1, credit.shrinkage)
        value_BGXC = p.gain[:, None] + jnp.where(pool_B11C > 0, hit_BGX[..., None], missed_BGX[..., None])
        at_BGTC = _choices_at(value_BGXC, turns.place)
        named_BGT = jnp.where(turns.named, at_BGTC, 0.0).sum(-1) / jnp.maximum(turns.named.sum(-1), 1)
        here_BGT = _at(_values(p, slice(None), p.missing, credit.shrinkage), turns.place)
        values.append(at_BGTC)
        baselines.append(jnp.where(turns.open, named_BGT, here_BGT))
        to_go.append(_at(p.to_go, turns.place))
    advantage_BGT = _by_phase(batch, tuple(to_go)) - _by_phase(batch, tuple(baselines))
    return batch.replace(advantage=advantage_BGT, value=_by_phase(batch, tuple(values)))


def labels(credit: Credit, k: int, broken: Broken, batch: Batch, lists: Lists, turns: Turns) -> Batch:
    """What is wanted in every state that the policy came to: the maximum of sum_t sum_a w_t(a) log pi(a | s_t).

    w_t(a) is what candidate a brings at the place of t; one that was named before, or is not in the slate, has no
    probability and counts nothing. Labels of own states are DAgger's (Ross et al., arXiv 1011.0686). A rollout of a
    query that was not trained on is drawn without a look at its labels, so what it named before tells nothing of them;
    SFT's rankings hold what is wanted, and an imitator takes its own words for evidence (arXiv 2110.10819). The maximum
    is therefore pi(a | s) in proportion to E[w_t(a) | query], and greedy decoding names the candidates of greatest
    expected gain: the best list of a reward that is a sum over items (where names have several tokens, of the greatest
    sum over those that share the next one). What is sampled is no better than that proportion, and the gradient is not
    that of an expected reward; it does not fade where pi(a | s) is small, as that of `exact` does.

    Literals have no w, so lengths of lists are not taught, nor where a name ends that begins another one: validation
    asks for lists of one length, and for names that cannot begin each other. Places without gain (beyond `k`), and
    queries without relevant candidates, teach nothing. Batch.value holds w; a group only gives more states.
    """
    gains = [_choices_at(p.gain[:, None], turns.place) for p in _phases(credit, k, broken, batch, lists)]
    return batch.replace(advantage=jnp.zeros_like(batch.advantage), value=_by_phase(batch, tuple(gains)))


def _log(probability: Array) -> Array:
    """0 where there is no choice; down to 1e-30, where the gradient would overflow."""
    return jnp.where(probability > 0, jnp.log(probability + 1e-30), 0.0)


# --------------------------------------------------------------------- the schemes


class Scheme(NamedTuple):
    """assign: (credit, k, broken, batch, lists, turns) -> batch with its advantage (and value), of the global batch.

    options: fields of Credit that only some schemes read, this one among them. by_item: reads turns, and rewards
    that are sums. value_by: what of the probability of a choice its value multiplies; None: gives no values.
    imitates: reads no siblings and no rewards but gains, which must be positive, and teaches no lengths.
    """

    assign: Callable[[Credit, int, Broken, Batch, Lists, Turns | None], Batch]
    options: tuple[str, ...]
    by_item: bool = False
    value_by: Callable[[Array], Array] | None = None
    imitates: bool = False


SCHEMES: dict[str, Scheme] = {
    "group": Scheme(_group, ("normalise",)),
    "outcome": Scheme(_outcome, ("shrinkage",)),
    "to_go": Scheme(_to_go, (), by_item=True),
    "to_go_state": Scheme(_to_go_state, ("shrinkage",), by_item=True),
    "exact": Scheme(exact, ("shrinkage",), by_item=True, value_by=lambda probability: probability),
    "labels": Scheme(labels, (), by_item=True, value_by=_log, imitates=True),
}
