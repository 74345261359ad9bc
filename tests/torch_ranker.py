"""The generator of lists once more, in PyTorch: written from its description, sharing no code with the other.

The same parameters give the same logits. A query is a dict of tensors with the names of RankerQuery; what
this knows of the sizes is an object with the fields of RankerSpec.
"""

import numpy as np
import torch
import torch.nn.functional as F


def parameters(params):
    """A nested dict of arrays -> the same of trainable tensors."""
    if isinstance(params, dict):
        return {name: parameters(value) for name, value in params.items()}
    return torch.tensor(np.asarray(params, np.float32), requires_grad=True)


def leaves(params):
    return [x for v in params.values() for x in (leaves(v) if isinstance(v, dict) else [v])]


def norm(x, scale, eps):
    return F.rms_norm(x, (x.shape[-1],), scale, eps)


def layer_of(layers, i):
    return {name: value[i] for name, value in layers.items()}


def heads(x, w):
    """[N,S,D] -> [N,heads,S,E]."""
    return torch.einsum("nsd,dhe->nhse", x, w)


def block(spec, w, x, context, mask):
    """One layer: x [N,T,D] attends to `context` (keys and values, [N,heads,S,E]); mask [N or 1,T,S]."""
    normed = norm(x, w["attn_norm"], spec.norm_eps)
    q = heads(normed, w["q"])
    k, v = context(heads(normed, w["k"]), heads(normed, w["v"]))
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    x = x + torch.einsum("nhse,hed->nsd", attended, w["o"])
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
        x = block(spec, layer_of(params["layers"], i), x, lambda k, v: (k, v), keys)
    return norm(x[:, size_h:], params["norm"], spec.norm_eps), present


def logits(spec, params, query, actions):
    """[B,G,T,C]: of every candidate at every step of the lists `actions` [B,G,T], not masked."""
    pool, present = encode(spec, params, query)
    batch, group, steps = actions.shape
    pool_each = pool.repeat_interleave(group, 0)  # [B*G,C,D]: a copy for every list
    rows = actions.reshape(batch * group, steps)
    fed = torch.gather(pool_each, 1, rows[:, :-1, None].expand(-1, -1, pool.shape[-1]))
    start = params["start"].expand(batch * group, 1, -1)
    x = torch.cat([start, fed], 1) + params["step"][:steps]
    before = torch.ones(steps, steps, dtype=torch.bool).tril().expand(batch * group, -1, -1)
    seen = present.repeat_interleave(group, 0)[:, None].expand(-1, steps, -1)
    mask = torch.cat([seen, before], -1)
    for i in range(spec.list_layers):
        w = layer_of(params["list_layers"], i)
        normed_pool = norm(pool_each, w["attn_norm"], spec.norm_eps)
        k_pool, v_pool = heads(normed_pool, w["k"]), heads(normed_pool, w["v"])
        x = block(spec, w, x, lambda k, v, a=k_pool, b=v_pool: (torch.cat([a, k], 2), torch.cat([b, v], 2)), mask)
    state = norm(x, params["list_norm"], spec.norm_eps)
    return (state @ pool_each.mT / spec.hidden_size**0.5).reshape(batch, group, steps, -1), present


def logprobs(spec, params, query, actions):
    """[B,G,T]: of the actions, over the candidates that were not used before."""
    logit, present = logits(spec, params, query, actions)
    used = F.one_hot(actions, logit.shape[-1]).cumsum(2) - F.one_hot(actions, logit.shape[-1]) > 0
    masked = logit.masked_fill(used | ~present[:, None, None], -torch.inf)
    return torch.log_softmax(masked, -1).gather(-1, actions[..., None])[..., 0]


@torch.no_grad()
def sample(spec, params, query, group, rng=None):
    """Lists [B,G,T], each step computed from the whole list so far; the most probable items without `rng`."""
    batch = query["candidates"].shape[0]
    actions = torch.zeros(batch, group, spec.list_length, dtype=torch.long)
    for t in range(spec.list_length):
        logit, present = logits(spec, params, query, actions)
        closed = (~present)[:, None].expand(-1, group, -1).clone()
        closed |= F.one_hot(actions[..., :t], closed.shape[-1]).sum(2) > 0
        logit = logit[:, :, t].masked_fill(closed, -torch.inf)
        if rng is None:
            actions[..., t] = logit.argmax(-1)
        else:
            chance = torch.softmax(logit, -1).reshape(batch * group, -1)
            actions[..., t] = torch.multinomial(chance, 1, generator=rng).reshape(batch, group)
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
