"""Sequences of equally many queries attend together, over keys that are gathered by whole blocks and padded."""

import math

import torch
from torch import Tensor


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, context_lens: Tensor, query_lens: Tensor
) -> Tensor:
    """Attention of groups of sequences."""
    block_size, output = keys.shape[1], torch.empty_like(q)
    counts = query_lens.tolist()
    rows = torch.arange(len(q), device=q.device).split(counts)
    for n in set(counts):
        chosen = [i for i, count in enumerate(counts) if count == n]
        here = torch.stack([rows[i] for i in chosen])  # [S, n]
        lens = context_lens[chosen, None]  # [S, 1]
        blocks = -(-int(lens.max()) // block_size)
        positions = torch.arange(blocks * block_size, device=q.device)  # [P]
        unknown = positions >= lens  # [S, P]
        tables = block_tables[chosen, :blocks].masked_fill(unknown[:, ::block_size], 0)
        k, v = (pool[tables].flatten(1, 2).masked_fill(unknown[..., None, None], 0.0) for pool in (keys, values))
        grouped = q[here].unflatten(2, (k.shape[2], -1)).permute(0, 2, 3, 1, 4)  # [S, Hkv, H / Hkv, n, Dh]
        scores = grouped @ k.permute(0, 2, 3, 1)[:, :, None] * q.shape[-1] ** -0.5  # [S, Hkv, H / Hkv, n, P]
        hidden = positions > (lens - n + torch.arange(n, device=q.device))[..., None]  # [S, n, P]
        weights = scores.masked_fill(hidden[:, None, None], -math.inf).softmax(dim=-1)
        output[here] = (weights @ v.transpose(1, 2)[:, :, None]).permute(0, 3, 1, 2, 4).flatten(2, 3)
    return output
