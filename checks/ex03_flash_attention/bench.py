"""Bench of ex03: time and memory of the operation on q, k, v over the length, beside torch's own and the standard form.

On a CPU the scratch memory inside torch's fused kernel is not seen.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from harness.testing import Case, Run, Series

X = "length of the sequence"
REFERENCE = "F.sdpa"
CAPTION = "one row, 8 heads of 64 dimensions, blocks of 256"
SECONDS = 45
HIGHER_IS_BETTER = ()
HEADS, HEAD_SIZE = 8, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
BLOCK = 256  # Large tiles keep the matrix products busy; the class's default of 64 costs about twice the time.
STANDARD_UP_TO = 4096  # Beyond it the standard form takes several gigabytes.
SHORT_UP_TO = 2048
FLOOR = "products alone"  # the matrix products and exponentials of the same tiles, and nothing else

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
                runs[FLOOR] = partial(_products, given, causal, training)
                # The longest training steps take seconds: their memory is not worth another one.
                memory = not training or length < LENGTHS[-1]
                yield Case(panel, length, runs, memory=memory, long=length > SHORT_UP_TO)


def conclude(measured: Sequence[Series]) -> Iterable[str]:
    """The answer's time as a ratio of torch's own, and how many times faster than the standard form it is."""
    for which in ("forward", "forward and backward"):
        panels = (which, f"{which}, causal")
        for beside, claims in ((REFERENCE, ("1.35 is claimed", "1.5 is claimed")), (FLOOR, ("1.25 is claimed", ""))):
            ratios = [
                seconds / one.values[beside][length]
                for one in measured
                if one.metric == "seconds" and one.panel in panels
                for length, seconds in one.values.get("answer", {}).items()
                if length >= 1024 and length in one.values.get(beside, {})
            ]
            if ratios:
                middle, most = (f"({claim})" if claim else "" for claim in claims)
                yield (
                    f"{which}: from N = 1024 on, the answer takes {statistics.median(ratios):.2f} times the time of "
                    f"{beside} in the median {middle}, at most {max(ratios):.2f} times {most}".rstrip()
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


def _products(given: Sequence[Tensor], causal: bool, training: bool) -> None:
    """What no blockwise attention on these tiles can do without: two products and the exponentials of each pair of
    blocks, and in training the exponentials again with five products.
    """
    q, k, v, grad = (x.detach().flatten(0, 1) for x in given)
    buffer, other = (q.new_empty(q.size(0), BLOCK, BLOCK if used else 0) for used in (True, training))
    output, grads = torch.zeros_like(q), [torch.zeros_like(x) for x in (q, k, v) if training]
    blocks = [slice(start, start + BLOCK) for start in range(0, q.size(1), BLOCK)]
    pairs = [(rows, columns) for rows in blocks for columns in blocks if not causal or columns.start <= rows.start]
    scaled = q * (HEAD_SIZE**-0.5 / 8)  # Small scores: nothing overflows where no maximum is subtracted.
    for rows, columns in pairs:
        torch.bmm(scaled[:, rows], k[:, columns].mT, out=buffer).exp2_()
        output[:, rows].baddbmm_(buffer, v[:, columns])
    for rows, columns in pairs if training else ():
        torch.bmm(scaled[:, rows], k[:, columns].mT, out=buffer).exp2_()
        grads[2][:, columns].baddbmm_(buffer.mT, grad[:, rows])
        torch.bmm(grad[:, rows], v[:, columns].mT, out=other)
        grads[0][:, rows].baddbmm_(other, k[:, columns])
        grads[1][:, columns].baddbmm_(other.mT, q[:, rows])


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
