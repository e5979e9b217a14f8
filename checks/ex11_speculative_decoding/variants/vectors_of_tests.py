"""All numbers of verify are taken first, the last decision's first, and the tests are one comparison of vectors."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def draw(probabilities: Tensor, u: float) -> int:
    possible = probabilities.nonzero()[:, 0]
    sums = probabilities[possible].cumsum(0)[:-1].contiguous()
    place = torch.searchsorted(sums, torch.tensor(u, dtype=sums.dtype, device=sums.device), right=True)
    return int(possible[place])


def verify(
    draft_tokens: Sequence[int], draft_probs: Tensor, target_probs: Tensor, uniform: Callable[[], float]
) -> list[int]:
    k = len(draft_tokens)
    last, *numbers = (uniform() for _ in range(k + 1))
    u = torch.tensor(numbers[::-1], dtype=torch.float64, device=target_probs.device)
    rows, tokens = torch.arange(k), torch.tensor(draft_tokens, dtype=torch.int64)
    ratios = target_probs[rows, tokens] / draft_probs[rows, tokens]
    good = int((u >= 1 - ratios).long().cumprod(0).sum())
    row = target_probs[good]
    if good < k:
        rest = torch.relu(row - draft_probs[good])
        row = rest / rest.sum() if bool(rest.sum() > 0) else row
    return [*draft_tokens[:good], draw(row, last)]
