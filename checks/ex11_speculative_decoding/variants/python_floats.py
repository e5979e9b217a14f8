"""Probabilities are sorted, summed and compared as Python's floats; what is certain takes no number."""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def token_probabilities(logits: Tensor, temperature: float = 1.0, top_p: float = 1.0) -> Tensor:
    rows = logits.detach().to(torch.float64).reshape(-1, logits.shape[-1]).tolist()
    flat = [_row(row, temperature, top_p) for row in rows]
    return torch.tensor(flat, dtype=torch.float64, device=logits.device).reshape(logits.shape)


def _row(row: list[float], temperature: float, top_p: float) -> list[float]:
    best = max(row)
    if temperature == 0:
        at = row.index(best)
        return [float(token == at) for token in range(len(row))]
    weights = [math.exp((one - best) / temperature) for one in row]
    if top_p < 1:
        enough, reached = top_p * math.fsum(weights), 0.0
        for token in sorted(range(len(row)), key=lambda token: -weights[token]):
            weights[token] *= reached < enough
            reached += weights[token]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def draw(probabilities: Tensor, u: float) -> int:
    return _draw(probabilities.tolist(), u)


def _draw(row: list[float], u: float) -> int:
    sums = list(itertools.accumulate(row))
    token = bisect.bisect_right(sums, u)
    while token == len(row) or not row[token]:
        token -= 1
    return token


def verify(
    draft_tokens: Sequence[int], draft_probs: Tensor, target_probs: Tensor, uniform: Callable[[], float]
) -> list[int]:
    output: list[int] = []
    for token, q, p in zip(draft_tokens, draft_probs.tolist(), target_probs.tolist(), strict=False):
        if p[token] < q[token] and uniform() >= p[token] / q[token]:
            rest = [max(one - other, 0.0) for one, other in zip(p, q, strict=True)]
            total = math.fsum(rest)
            return [*output, _certain_or_drawn([one / total for one in rest] if total else p, uniform)]
        output.append(token)
    return [*output, _certain_or_drawn(target_probs[-1].tolist(), uniform)]


def _certain_or_drawn(row: list[float], uniform: Callable[[], float]) -> int:
    return row.index(1.0) if 1.0 in row else _draw(row, uniform())
