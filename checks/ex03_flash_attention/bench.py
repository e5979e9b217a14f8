"""Bench of ex03: time and memory of the operation on q, k, v over the length, beside torch's own and the standard form.

On a CPU the scratch memory inside torch's fused kernel is not seen.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.testing import Case, Run, Series

X = "length of the sequence"
REFERENCE = "F.sdpa"
HEADS, HEAD_SIZE = 8, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
BLOCK = 256  # Large tiles keep the matrix products busy; the class's default of 64 costs about twice the time.
STANDARD_UP_TO = 4096  # Beyond it the standard form takes several gigabytes.

Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]


def cases(modules: Mapping[str, ModuleType]) -> Iterable[Case]:
    """Attention of one batch row, forward alone and with backward, causal and not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ways: dict[str, Attend] = {name: _blockwise(module) for name, module in modules.items()}
    ways |= {"standard": _standard, REFERENCE: _fused}
    for training in (False, True):
        for causal in (False, True):
            panel = f"{'forward and backward' if training else 'forward'}{', causal' if causal else ''}"
            for length in LENGTHS:
                given = [torch.randn(1, HEADS, length, HEAD_SIZE, device=device) for _ in range(4)]
                runs = {
                    name: _run(way, given, causal, training)
                    for name, way in ways.items()
                    if name != "standard" or length <= STANDARD_UP_TO
                }
                # The longest training steps take seconds: their memory is not worth another one.
                yield Case(panel, length, runs, memory=not training or length < LENGTHS[-1])


def conclude(measured: Sequence[Series]) -> Iterable[str]:
    """The answer's time as a ratio of torch's own, and how many times faster than the standard form it is."""
    for which in ("forward", "forward and backward"):
        panels = (which, f"{which}, causal")
        ratios = [
            seconds / one.values[REFERENCE][length]
            for one in measured
            if one.metric == "seconds" and one.panel in panels
            for length, seconds in one.values.get("answer", {}).items()
            if length >= 1024 and length in one.values.get(REFERENCE, {})
        ]
        if ratios:
            yield (
                f"{which}: from N = 1024 on, the answer takes {statistics.median(ratios):.2f} times the time of "
                f"{REFERENCE} in the median (1.35 is claimed), at most {max(ratios):.2f} times (1.5 is claimed)"
            )
        for one in measured:
            times = {name: line[4096] for name, line in one.values.items() if 4096 in line}
            if one.metric == "seconds" and one.panel in panels and times.keys() >= {"answer", "standard", REFERENCE}:
                answer, fused = (times["standard"] / times[name] for name in ("answer", REFERENCE))
                yield (
                    f"{one.panel}: at N = 4096, the answer is {answer:.1f} times faster than the standard form (2.5 is "
                    f"claimed), {REFERENCE} {fused:.1f} times"
                )


def _run(way: Attend, given: Sequence[Tensor], causal: bool, training: bool) -> Run:
    q, k, v = (x.detach().requires_grad_(training) for x in given[:3])

    def run() -> None:
        with torch.set_grad_enabled(training):
            output = way(q, k, v, causal)
            if training:
                torch.autograd.grad(output, (q, k, v), given[3])

    return run


def _blockwise(module: Any) -> Attend:
    attention = module.FlashAttention(HEADS * HEAD_SIZE, HEADS, BLOCK)

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        output: Tensor = attention.flash_attention_forward(q, k, v, causal=causal)[0]
        return output

    return attend


def _standard(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    scores = q @ k.mT * HEAD_SIZE**-0.5
    if causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(above, -torch.inf)
    output: Tensor = scores.softmax(-1) @ v
    return output


def _fused(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    output: Tensor = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return output
