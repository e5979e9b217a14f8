"""Keys and values are views of one tensor; append takes block by block, and gives back what it took."""

from typing import Any

import torch
from torch import Tensor


class BlockAllocator:
    """Counts in an integer tensor."""

    def __init__(self, num_blocks: int) -> None:
        self.counts = torch.zeros(num_blocks, dtype=torch.int64)

    @property
    def num_free(self) -> int:
        """Zeros."""
        return int((self.counts == 0).sum())

    def allocate(self) -> int:
        """The first with a count of 0."""
        free = (self.counts == 0).nonzero()
        if not len(free):
            raise OutOfBlocksError("out of blocks")
        self.counts[free[0, 0]] = 1
        return int(free[0, 0])

    def share(self, block: int) -> None:
        """Adds 1."""
        self.add(block, 1)

    def free(self, block: int) -> None:
        """Takes 1."""
        self.add(block, -1)

    def ref_count(self, block: int) -> int:
        """The count."""
        return int(self.counts[block])

    def add(self, block: int, one: int) -> None:
        """Adds to the count of a block in use."""
        if block not in range(len(self.counts)) or self.counts[block] == 0:
            raise ValueError(f"no block {block} in use")
        self.counts[block] += one


class PagedKVCache:
    """Tables as pairs of blocks and length."""

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: Any = "cpu",
    ) -> None:
        self.allocator = BlockAllocator(num_blocks)
        self.pool = torch.empty(
            (num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim), dtype=dtype, device=device
        )
        self.size = block_size
        self.known: dict[int, tuple[tuple[int, ...], int]] = {}

    @property
    def keys(self) -> Tensor:
        """A view."""
        return self.pool[:, 0]

    @property
    def values(self) -> Tensor:
        """A view."""
        return self.pool[:, 1]

    def append(self, sequence: int, count: int) -> None:
        """Slots, a block at a time."""
        blocks, length = self.known.get(sequence, ((), 0))
        taken: list[int] = []
        try:
            room = -length % self.size
            shared = count > 0 and room > 0 and self.allocator.ref_count(blocks[-1]) > 1
            if shared:
                taken.append(self.allocator.allocate())
            for _ in range(0, count - room, self.size):
                taken.append(self.allocator.allocate())
        except OutOfBlocksError:
            for block in taken:
                self.allocator.free(block)
            raise
        if shared:
            self.pool[:, :, taken[0]].copy_(self.pool[:, :, blocks[-1]])
            self.allocator.free(blocks[-1])
            blocks = blocks[:-1]
        self.known[sequence] = (*blocks, *taken), length + count

    def write(self, layer: int, sequence: int, start: int, k: Tensor, v: Tensor) -> None:
        """Piece by piece, a block each."""
        blocks, _ = self.known[sequence]
        both, done = torch.stack((k, v)).detach(), 0
        while done < len(k):
            block, slot = divmod(start + done, self.size)
            n = min(self.size - slot, len(k) - done)
            self.pool.data[layer, :, blocks[block], slot : slot + n] = both[:, done : done + n]
            done += n

    def fork(self, parent: int, child: int, length: int) -> None:
        """The first blocks."""
        blocks = self.known[parent][0][: (length + self.size - 1) // self.size]
        list(map(self.allocator.share, blocks))
        self.known[child] = blocks, length

    def free(self, sequence: int) -> None:
        """Gives all back."""
        list(map(self.allocator.free, reversed(self.known.pop(sequence, ((), 0))[0])))

    def length(self, sequence: int) -> int:
        """The second of the pair."""
        return self.known.get(sequence, ((), 0))[1]

    def block_table(self, sequence: int) -> list[int]:
        """The first of the pair."""
        return [*self.known.get(sequence, ((), 0))[0]]

    def _slots(self, sequence: int, start: int, stop: int) -> list[int]:
        blocks = self.known[sequence][0]
        return [blocks[p // self.size] * self.size + p % self.size for p in range(start, stop)]
