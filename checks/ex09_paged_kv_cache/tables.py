"""A cache of the learner's, beside what each of its slots is to hold."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.testing import Close, Subject

LAYERS, KV_HEADS, DIM = 3, 2, 5


@dataclass
class Known:
    """A cache of the learner's, and which token each of its slots is to hold: an entry is a number that names it."""

    subject: Subject
    num_blocks: int
    block_size: int
    cache: Any = field(init=False)
    rows: dict[int, list[int]] = field(default_factory=dict)
    stamp: int = 0
    tokens: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.cache = self.subject.PagedKVCache(
            LAYERS, self.num_blocks, self.block_size, KV_HEADS, DIM, dtype=torch.float64
        )
        # Key of each token in each layer; its value is the negative.
        self.tokens = torch.arange(1.0, 1 + LAYERS * 150 * KV_HEADS * DIM, dtype=torch.float64)
        self.tokens = self.tokens.view(LAYERS, 150, KV_HEADS, DIM)

    def add(self, sequence: int, count: int) -> None:
        """append, and write to the new slots in all layers."""
        start = self.cache.length(sequence)
        self.cache.append(sequence, count)
        new = list(range(self.stamp, self.stamp + count))
        self.stamp += count
        self.rows[sequence] = self.rows.get(sequence, []) + new
        if count:
            for layer in range(LAYERS):
                k = self.tokens[layer, new]
                self.cache.write(layer, sequence, start, k, -k)

    def fork(self, parent: int, child: int, length: int) -> None:
        self.cache.fork(parent, child, length)
        self.rows[child] = self.rows[parent][:length]

    def free(self, sequence: int) -> None:
        self.cache.free(sequence)
        self.rows.pop(sequence, None)

    def holds(self, close: Close, call: str) -> None:
        """Every sequence has its slots, and its own tokens in them; no blocks are lost."""
        used: set[int] = set()
        for sequence, row in self.rows.items():
            table, length = self.cache.block_table(sequence), self.cache.length(sequence)
            used.update(table)
            assert length == len(row), f"length({sequence}) after {call}: {length} came, {len(row)} was wanted"
            blocks = -(-len(row) // self.block_size)
            assert len(table) == blocks, (
                f"block_table({sequence}) after {call}: {table} came, {blocks} blocks of {self.block_size} slots were "
                f"wanted for {len(row)} tokens"
            )
            if row:
                where = [table[p // self.block_size] * self.block_size + p % self.block_size for p in range(len(row))]
                wanted = self.tokens[:, row]
                for name, sign in (("keys", 1), ("values", -1)):
                    came = getattr(self.cache, name).flatten(1, 2)[:, where] * sign
                    if not torch.equal(came, wanted):
                        what = f"{name} of sequence {sequence} after {call}"
                        close(came, wanted, f"{what}: [layers, positions, Hkv, Dh]", hint=self.whose(came, wanted))
        free = self.cache.allocator.num_free
        assert free == self.num_blocks - len(used), (
            f"allocator.num_free after {call}: {free} came, {self.num_blocks - len(used)} was wanted"
        )

    def whose(self, came: Tensor, wanted: Tensor) -> str:
        """Where what came is not a sequence's own."""
        bad = (came != wanted).flatten(2).any(2)  # [layers, positions]
        layers, positions = (bad.any(dim).nonzero().flatten().tolist() for dim in (1, 0))
        return f"layers {layers}, positions {positions}: not what was written there for this sequence"


def state(known: Known) -> tuple[Any, ...]:
    """What can be seen of a cache."""
    cache = known.cache
    sequences = range(-1, 6)
    tables = [cache.block_table(one) for one in sequences], [cache.length(one) for one in sequences]
    return *tables, [cache.allocator.ref_count(b) for b in range(known.num_blocks)], cache.allocator.num_free
