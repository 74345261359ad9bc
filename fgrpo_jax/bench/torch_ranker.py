"""The generator of lists once more, in PyTorch: written from its description, sharing no code with the other.

The same parameters give the same logits (a test compares them), so times of the two may be compared too: both
encode and project a pool once per query, whatever the number of lists, and sample with a cache of keys and
values. A query is a dict of tensors with the names of RankerQuery; what this knows of the sizes is an object
with the fields of RankerSpec. Needs the `parity` extra. Axes as in types; X: lists' steps of a query, G*T.
"""

import functools

import numpy as np
import torch
import torch.nn.functional as F


def parameters(params):
    """A nested dict of arrays -> the same of trainable tensors."""
    if isinstance(params, dict):
        return {name: parameters(value) for name, value in params.items()}
    return torch.tensor(np.asarray(params, np.float32), requires_grad=True)


def tensors(query):
    """A RankerQuery of arrays -> a dict of tensors, whose indices and counts are long."""
    made = {name: torch.tensor(np.asarray(x)) for name, x in vars(query).items()}
    return {name: x if x.is_floating_point() else x.long() for name, x in made.items()}


def leaves(params):
    return [x for v in params.values() for x in (leaves(v) if isinstance(v, dict) else [v])]


def norm(x, scale, eps):
    return F.rms_norm(x, (x.shape[-1],), scale, eps)


def layer_of(layers, i):
    return {name: value[i] for name, value in layers.items()}


def heads(x, w):
    """[...,S,D] -> [...,heads,S,E]."""
    return (x @ w.flatten(1)).unflatten(-1, w.shape[1:]).transpose(-3, -2)


def block(spec, w, x, attention):
    """One layer: x [...,S,D]; attention(q, k, v) -> [...,heads,S,E], given those of x."""
    normed = norm(x, w["attn_norm"], spec.norm_eps)
    attended = attention(*(heads(normed, w[name]) for name in "qkv"))
    x = x + attended.transpose(-3, -2).flatten(-2) @ w["o"].flatten(0, 1)
    normed = norm(x, w["mlp_norm"], spec.norm_eps)
    return x + (F.silu(normed @ w["gate"]) * (normed @ w["up"])) @ w["down"]


def encode(spec, params, query):
    """The pool's encodings [B,C,D]: history and pool as one sequence, in which the history sees no pool."""
    size_h, size_c = query["history"].shape[1], query["candidates"].shape[1]
    place = torch.arange(size_h)
    there = place < query["history_len"][:, None]
    recency = (query["history_len"][:, None] - 1 - place).clamp(min=0)
    history = params["items"][query["history"]] + params["recency"][recency]
    items = params["items"][query["candidates"]]
    mean = (params["items"][query["history"]] * there[..., None]).sum(1) / query["history_len"].clamp(min=1)[:, None]
    match = (
        F.rms_norm(items, (items.shape[-1],), None, spec.norm_eps) * norm(mean, params["match"], spec.norm_eps)[:, None]
    )
    pool = items + params["candidate"] + match
    pool = pool + query["popularity"][..., None] * params["popularity"]
    if spec.sees_retrieval:
        pool = pool + query["retrieval"][..., None] * params["retrieval"]
    present = torch.arange(size_c) < query["n_candidates"][:, None]
    keys = torch.cat([there, present], 1)[:, None].expand(-1, size_h + size_c, -1).clone()
    keys[:, :size_h, size_h:] = False
    if spec.causal_history:
        keys[:, :size_h, :size_h] &= place <= place[:, None]
    keys |= torch.eye(size_h + size_c, dtype=torch.bool)  # what is padding sees itself: no row may be empty
    x = torch.cat([history, pool], 1)
    for i in range(spec.num_layers):
        attention = functools.partial(F.scaled_dot_product_attention, attn_mask=keys[:, None])
        x = block(spec, layer_of(params["layers"], i), x, attention)
    return norm(x[:, size_h:], params["norm"], spec.norm_eps), present


def project(spec, params, pool):
    """What the steps of lists attend to in the pool [B,C,D]: keys and values [B,heads,C,E] of every layer."""
    layers = [layer_of(params["list_layers"], i) for i in range(spec.list_layers)]
    normed = [norm(pool, w["attn_norm"], spec.norm_eps) for w in layers]
    return [(w, heads(x, w["k"]), heads(x, w["v"])) for w, x in zip(layers, normed)]


def attend(present, k_pool, v_pool, q, k, v, before):
    """Of steps to their query's pool and to their list's own steps, one softmax over both.

    present [B,C]; k_pool, v_pool [B,heads,C,E]; q [B,G,heads,T,E]; k, v [B,G,heads,S,E]; before [T,S] or None.
    """
    batch, group, _, steps, width = q.shape
    q = q / width**0.5
    of_query = q.transpose(1, 2).flatten(2, 3)  # [B,heads,X,E]
    scores = (of_query @ k_pool.mT).masked_fill(~present[:, None, None], -torch.inf)
    scores = scores.unflatten(2, (group, steps)).transpose(1, 2)  # [B,G,heads,T,C]
    own = q @ k.mT
    own = own if before is None else own.masked_fill(~before, -torch.inf)
    weights = torch.softmax(torch.cat([scores, own], -1), -1)
    of_pool, of_own = weights.split([scores.shape[-1], own.shape[-1]], -1)
    read = (of_pool.transpose(1, 2).flatten(2, 3) @ v_pool).unflatten(2, (group, steps)).transpose(1, 2)
    return read + of_own @ v


def score(spec, params, pool, x):
    """Logits [B,G,T,C] of states x [B,G,T,D]."""
    state = norm(x, params["list_norm"], spec.norm_eps).flatten(1, 2)
    return (state @ pool.mT / spec.hidden_size**0.5).unflatten(1, x.shape[1:3])


def take(pool, actions):
    """Encodings [B,G,T,D] of the items of lists [B,G,T]."""
    index = actions.flatten(1)[..., None].expand(-1, -1, pool.shape[-1])
    return torch.gather(pool, 1, index).unflatten(1, actions.shape[1:])


def logits(spec, params, query, actions):
    """[B,G,T,C]: of every candidate at every step of the lists `actions` [B,G,T], not masked."""
    pool, present = encode(spec, params, query)
    batch, group, steps = actions.shape
    start = params["start"].expand(batch, group, 1, -1)
    x = torch.cat([start, take(pool, actions[..., :-1])], 2) + params["step"][:steps]
    before = torch.ones(steps, steps, dtype=torch.bool).tril()
    for w, k_pool, v_pool in project(spec, params, pool):
        x = block(spec, w, x, functools.partial(attend, present, k_pool, v_pool, before=before))
    return score(spec, params, pool, x), present


def logprobs(spec, params, query, actions):
    """[B,G,T]: of the actions, over the candidates that were not used before."""
    logit, present = logits(spec, params, query, actions)
    used = F.one_hot(actions, logit.shape[-1]).cumsum(2) - F.one_hot(actions, logit.shape[-1]) > 0
    masked = logit.masked_fill(used | ~present[:, None, None], -torch.inf)
    return torch.log_softmax(masked, -1).gather(-1, actions[..., None])[..., 0]


@torch.no_grad()
def sample(spec, params, query, group, rng=None):
    """Lists [B,G,T], an item at a time with the keys and values of those before; the most probable without `rng`."""
    pool, present = encode(spec, params, query)
    layers = project(spec, params, pool)
    batch, size = present.shape
    width = spec.hidden_size // spec.num_heads
    own = [pool.new_empty(2, batch, group, spec.num_heads, spec.list_length, width) for _ in layers]
    closed = (~present)[:, None].repeat(1, group, 1)
    actions = torch.zeros(batch, group, spec.list_length, dtype=torch.long)
    fed = params["start"].expand(batch, group, 1, -1)
    for t in range(spec.list_length):
        x = fed + params["step"][t]
        for (w, k_pool, v_pool), cache in zip(layers, own):

            def attention(q, k, v, cache=cache, k_pool=k_pool, v_pool=v_pool):
                cache[0, ..., t : t + 1, :], cache[1, ..., t : t + 1, :] = k, v
                return attend(present, k_pool, v_pool, q, *cache[..., : t + 1, :], None)

            x = block(spec, w, x, attention)
        logit = score(spec, params, pool, x)[:, :, 0].masked_fill(closed, -torch.inf)
        if rng is None:
            pick = logit.argmax(-1)
        else:
            pick = torch.multinomial(torch.softmax(logit, -1).flatten(0, 1), 1, generator=rng).view(batch, group)
        actions[..., t] = pick
        closed.scatter_(2, pick[..., None], True)
        fed = take(pool, pick[..., None])
    return actions


def group_softmax(logp, reward, sigma=0.0):
    """GoalRank's loss of log-probabilities [B,G,T] and rewards [B,G], averaged over all groups."""
    kept = reward.amax(1) - reward.amin(1) > sigma
    spread = reward.std(1, correction=0, keepdim=True)
    score = (reward - reward.mean(1, keepdim=True)) / torch.where(spread > 0, spread, 1.0)
    each = -(torch.softmax(score, 1) * logp.sum(-1)).sum(1)
    return torch.where(kept, each, 0.0).mean()


def training_step(spec, params, optimizer, query, actions, reward):
    """One update by GoalRank's loss on a group of lists; returns the loss."""
    optimizer.zero_grad()
    loss = group_softmax(logprobs(spec, params, query, actions), reward)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(leaves(params), 1.0)
    optimizer.step()
    return float(loss.detach())
