"""Sequences of some lengths, contiguous and in blocks, and what attention over them gives."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.testing import DispatchMode, Subject, is_tensor

from .reference import causal, contiguous


@dataclass
class Case:
    """Sequences of some lengths, contiguous and in blocks of a pool.

    Args:
        context, queries: lengths of the sequences, and how many of their last tokens ask.
        heads: (H, Hkv, Dh).
        scale, offset: of q and k; offset is added to each.
        fill: what all slots hold that no context names.
        further: what table entries hold that no context names.
        spare: columns of the table beyond the longest sequence's.
        turned: the last key of each sequence has the other sign.
    """

    rng: torch.Generator
    context: tuple[int, ...]
    queries: tuple[int, ...]
    heads: tuple[int, int, int] = (4, 2, 3)
    block_size: int = 4
    dtype: torch.dtype = torch.float64
    scale: float = 1.0
    offset: tuple[float, float] = (0.0, 0.0)
    fill: float = 0.0
    further: int = 0
    spare: int = 2
    turned: bool = False
    more_blocks: int = 3
    given: dict[str, Tensor] = field(init=False)
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        h, kv, dim = self.heads
        counts = [math.ceil(length / self.block_size) for length in self.context]
        blocks = torch.randperm(sum(counts) + self.more_blocks, generator=self.rng)
        keys, values = (
            torch.full((len(blocks), self.block_size, kv, dim), self.fill, dtype=torch.float64) for _ in range(2)
        )
        tables = torch.full((len(counts), max(counts) + self.spare), self.further)
        self.parts, first = [], 0
        for row, (length, asked, count) in enumerate(zip(self.context, self.queries, counts, strict=True)):
            table = blocks[first : first + count]
            first += count
            tables[row, :count] = table
            k, v = (torch.randn(length, kv, dim, generator=self.rng, dtype=torch.float64) for _ in range(2))
            q = torch.randn(asked, h, dim, generator=self.rng, dtype=torch.float64)
            q, k = q * self.scale + self.offset[0], k * self.scale + self.offset[1]
            if self.turned:
                k[-1] *= -1
            places = torch.arange(length)
            for pool, own in ((keys, k), (values, v)):
                pool[table[places // self.block_size], places % self.block_size] = own
            self.parts.append((q, k, v))
        q = torch.cat([part[0] for part in self.parts])
        floats = {"q": q, "keys": keys, "values": values}
        self.given = {name: tensor.to(self.dtype) for name, tensor in floats.items()}
        self.given |= {"block_tables": tables}
        self.given |= {"context_lens": torch.tensor(self.context), "query_lens": torch.tensor(self.queries)}

    def expected(self, part: int | None = None) -> Tensor:
        """Attention over contiguous tensors, in float64; of one sequence, or of all."""
        if part is None:
            return torch.cat([self.expected(number) for number in range(len(self.parts))])
        q, k, v = (tensor.to(self.dtype).double() for tensor in self.parts[part])
        return contiguous(q, k, v, causal([len(k)], [len(q)]))

    def to(self, device: torch.device) -> "Case":
        self.given = {name: tensor.to(device) for name, tensor in self.given.items()}
        return self

    def __str__(self) -> str:
        return f"paged_attention, context_lens {list(self.context)}, query_lens {list(self.queries)}"


def attended(subject: Subject, case: Case) -> Tensor:
    """What paged_attention gives, a tensor."""
    return is_tensor(subject.paged_attention(**case.given), "paged_attention")


def strided(x: Tensor) -> Tensor:
    """The same numbers, by other strides."""
    return torch.stack((x, x), -1)[..., 0]


class Writes(DispatchMode):
    """Follows what is written to some tensors while it is on, behind their backs too (`x.data.mul_`).

    Attributes:
        names: those that were written to.
    """

    def __init__(self, given: dict[str, Tensor]) -> None:
        super().__init__()
        self.names: set[str] = set()
        self._places = {tensor.untyped_storage().data_ptr(): name for name, tensor in given.items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.is_mutable:
            for place, argument in enumerate(func._schema.arguments):
                value = args[place] if place < len(args) else kwargs.get(argument.name)
                if argument.alias_info and argument.alias_info.is_write and isinstance(value, Tensor):
                    name = self._places.get(value.untyped_storage().data_ptr())
                    self.names |= {name} if name else set()
        return func(*args, **kwargs)
