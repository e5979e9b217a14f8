"""Bench of ex01: time and memory of a layer over the length of the sequence, beside nn.MultiheadAttention."""

from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import nn

from harness.testing import Case, Run, Series

X = "length of the sequence"
REFERENCE = "nn.MultiheadAttention"
CAPTION = "4 rows, d_model 256, 8 heads"
SECONDS = 20
HIGHER_IS_BETTER = ()
BATCH, WIDTH, HEADS = 4, 256, 8
LENGTHS = (64, 128, 256, 512, 1024)


def cases(modules: Mapping[str, ModuleType]) -> Iterable[Case]:
    """Self-attention in evaluation and a training step's forward and backward."""
    layers = {name: module.MultiHeadAttention(WIDTH, HEADS, dropout=0.0) for name, module in modules.items()}
    layers[REFERENCE] = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
    for length in LENGTHS:
        x = torch.randn(BATCH, length, WIDTH)
        yield Case("forward", length, {name: _forward(layer, x) for name, layer in layers.items()}, memory=True)
    for length in LENGTHS:
        x = torch.randn(BATCH, length, WIDTH, requires_grad=True)
        runs = {name: _backward(layer, x) for name, layer in layers.items()}
        yield Case("forward and backward", length, runs, memory=True)


def conclude(measured: Sequence[Series]) -> Iterable[str]:
    """How memory grows with the length."""
    for series in measured:
        line = series.values.get("answer", {})
        if series.metric == "peak bytes" and LENGTHS[-2] in line:
            grows = line[LENGTHS[-1]] / line[LENGTHS[-2]]
            yield f"{series.panel}: twice the length takes {grows:.1f} times the memory in the answer"


def _forward(layer: Any, x: torch.Tensor) -> Run:
    @torch.no_grad()
    def run() -> None:
        layer(x, x, x)

    return run


def _backward(layer: Any, x: torch.Tensor) -> Run:
    def run() -> None:
        layer.zero_grad()
        layer(x, x, x)[0].sum().backward()

    return run
