"""Bench of ex02: how far scores drift with the position, and what turning costs."""

from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch

from harness.testing import Case, Run, Series

X = "position"
REFERENCE = "sinusoidal"
CAPTION = "8 heads of 64 dimensions"
SECONDS = 5
HIGHER_IS_BETTER = ()
DIM, DISTANCE = 64, 16
POSITIONS = (16, 64, 256, 1024, 4096)
DRIFT = f"score of two tokens {DISTANCE} apart"


def cases(modules: Mapping[str, ModuleType]) -> Iterable[Case]:
    """The change of one score as both tokens move, RoPE against what is added; and the time for all positions."""
    query, key = torch.randn(2, DIM, generator=torch.Generator().manual_seed(0))
    for position in POSITIONS:
        runs = {name: _turned(module, query, key, position) for name, module in modules.items()}
        if modules:
            runs[REFERENCE] = _added(list(modules.values())[-1], query, key, position)
        yield Case(DRIFT, position, runs, timed=False)
    for length in POSITIONS:
        x = torch.randn(1, 8, length, DIM)
        ropes = {name: module.RotaryPositionEmbedding(DIM, length) for name, module in modules.items()}
        yield Case("turning all positions", length, {name: _turn(r, x) for name, r in ropes.items()})


def conclude(measured: Sequence[Series]) -> Iterable[str]:
    """The largest drift of each."""
    for series in measured:
        if series.metric == "drift":
            for name, line in series.values.items():
                yield f"{name}: the score moves by up to {max(line.values()):.2g}"


def _turned(module: Any, query: torch.Tensor, key: torch.Tensor, position: int) -> Run:
    rows = position + DISTANCE + 1
    rope = module.RotaryPositionEmbedding(DIM, rows)

    def run() -> Mapping[str, float]:
        q, k = (rope(x.expand(1, 1, rows, DIM))[0, 0] for x in (query, key))
        moved, first = q[position] @ k[position + DISTANCE], q[0] @ k[DISTANCE]
        return {"drift": abs(float(moved - first))}

    return run


def _added(module: Any, query: torch.Tensor, key: torch.Tensor, position: int) -> Run:
    rows = position + DISTANCE + 1

    def run() -> Mapping[str, float]:
        added = module.sinusoidal_position_embedding(rows, DIM)
        q, k = query + added, key + added
        moved, first = q[position] @ k[position + DISTANCE], q[0] @ k[DISTANCE]
        return {"drift": abs(float(moved - first))}

    return run


def _turn(rope: Any, x: torch.Tensor) -> Run:
    @torch.no_grad()
    def run() -> None:
        rope(x)

    return run
