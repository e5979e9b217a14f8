"""One matrix of scores for all sequences, of which a mask leaves the blocks on the diagonal."""

import torch
from torch import Tensor


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, context_lens: Tensor, query_lens: Tensor
) -> Tensor:
    """Attention with one mask."""
    size, width = keys.size(1), block_tables.size(1)
    places = torch.arange(width * size, device=q.device)
    named = places[None] < context_lens[:, None]  # [S, M · block_size]
    owner, position = named.nonzero(as_tuple=True)  # [P] each
    slots = block_tables[owner, position // size] * size + position % size
    flat = [pool.reshape(-1, *pool.shape[2:])[slots] if pool.is_contiguous() else pool[slots // size, slots % size]
            for pool in (keys, values)]  # fmt: skip
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1).transpose(0, 1) for x in flat)  # [H, P, Dh]
    asks = torch.arange(len(query_lens), device=q.device).repeat_interleave(query_lens)  # [T]
    ends = query_lens.cumsum(0)
    own = context_lens[asks] - (ends[asks] - torch.arange(len(q), device=q.device))
    seen = (asks[:, None] == owner) & (own[:, None] >= position)
    scores = torch.matmul(q.transpose(0, 1) / q.size(-1) ** 0.5, k.transpose(1, 2))
    scores = torch.where(seen, scores, torch.finfo(q.dtype).min)
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * seen
    return torch.matmul(weights / weights.sum(-1, keepdim=True), v).transpose(0, 1)
