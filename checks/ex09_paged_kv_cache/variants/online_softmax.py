"""Attention block by block with a running maximum and sum; the allocator hands out the lowest number, from a heap."""

import heapq
import math
from collections import Counter

import torch
from torch import Tensor


class BlockAllocator:
    """Blocks in a heap, and a counter of those in use."""

    def __init__(self, num_blocks: int) -> None:
        self.num_free = num_blocks
        self.heap = list(range(num_blocks))
        self.used: Counter[int] = Counter()

    def allocate(self) -> int:
        """The lowest free block."""
        if self.num_free == 0:
            raise OutOfBlocksError("no block")
        self.num_free -= 1
        block = heapq.heappop(self.heap)
        self.used[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more."""
        if block not in self.used:
            raise ValueError(f"{block}: not in use")
        self.used[block] += 1

    def free(self, block: int) -> None:
        """One less."""
        if block not in self.used:
            raise ValueError(f"{block}: not in use")
        self.used[block] -= 1
        if self.used[block] == 0:
            del self.used[block]
            heapq.heappush(self.heap, block)
            self.num_free += 1

    def ref_count(self, block: int) -> int:
        """The count."""
        return self.used.get(block, 0)


def paged_attention(
    q: Tensor, keys: Tensor, values: Tensor, block_tables: Tensor, context_lens: Tensor, query_lens: Tensor
) -> Tensor:
    """Each sequence, block after block."""
    out = torch.zeros_like(q)
    size, group, row = keys.shape[1], q.shape[1] // keys.shape[2], 0
    for i in range(len(query_lens)):
        n, length = int(query_lens[i]), int(context_lens[i])
        own = q[row : row + n].unflatten(1, (-1, group))  # [n, Hkv, group, Dh]
        best = own.new_full(own.shape[:3], -math.inf)
        total, sums = torch.zeros_like(best), torch.zeros_like(own)
        at = torch.arange(length - n, length, device=q.device)
        for first in range(0, length, size):
            block, used = int(block_tables[i, first // size]), min(size, length - first)
            k, v = keys[block, :used], values[block, :used]  # [used, Hkv, Dh]
            scores = torch.einsum("nkgd,ukd->nkgu", own, k) / math.sqrt(q.shape[-1])
            late = torch.arange(first, first + used, device=q.device) > at[:, None]
            scores = scores.masked_fill(late[:, None, None], -math.inf)
            top = torch.maximum(best, scores.amax(-1))
            weights, decay = (scores - top[..., None]).exp(), (best - top).exp()
            weights, decay = weights.nan_to_num(0.0), decay.nan_to_num(0.0)
            total = total * decay + weights.sum(-1)
            sums = sums * decay[..., None] + torch.einsum("nkgu,ukd->nkgd", weights, v)
            best = top
        out[row : row + n] = (sums / total[..., None]).flatten(1, 2)
        row += n
    return out
