"""Bench of ex42."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from harness.testing import Case, Series

X, REFERENCE = "elements", "x + x"
CAPTION, SECONDS, HIGHER_IS_BETTER = "float32", 1, ()


def cases(modules: Mapping[str, ModuleType]) -> Iterator[Case]:
    """Doubling, beside a sum."""
    for size in (8, 16):
        x = torch.ones(size)
        doublings = {name: module.double for name, module in modules.items()} | {REFERENCE: lambda x: x + x}
        yield Case(
            "doubling", size, {name: partial(_sum, double, x) for name, double in doublings.items()}, memory=True
        )


def _sum(double: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, float]:
    return {"sum": float(double(x).sum())}


def conclude(measured: Sequence[Series]) -> Iterator[str]:
    """What the sums are."""
    yield str(next(one.values["answer"] for one in measured if one.metric == "sum"))
