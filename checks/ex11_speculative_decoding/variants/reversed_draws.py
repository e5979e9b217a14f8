"""Inside, tokens are drawn from the last one down; the target's call and its rewind wait until they must be."""

import random
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _from_the_top(row: Tensor, u: float) -> int:
    sums, last = 0.0, 0
    for token in range(len(row) - 1, -1, -1):
        one = float(row[token])
        if one > 0:
            sums, last = sums + one, token
            if u < sums:
                break
    return last


def verify(
    draft_tokens: Sequence[int], draft_probs: Tensor, target_probs: Tensor, uniform: Callable[[], float]
) -> list[int]:
    if not draft_tokens:
        return [_from_the_top(target_probs[0], uniform())]
    token, p, q = draft_tokens[0], target_probs[0], draft_probs[0]
    if p[token] >= q[token] or 1 - uniform() <= p[token] / q[token]:
        return [token, *verify(draft_tokens[1:], draft_probs[1:], target_probs[1:], uniform)]
    rest = torch.where(p > q, p - q, torch.zeros_like(p))
    total = rest.sum()
    return [_from_the_top(rest / total if total > 0 else p, uniform())]


def speculative_generate(
    target: Decoder,
    draft: Decoder,
    prompt: Sequence[int],
    max_new_tokens: int,
    *,
    num_draft_tokens: int = 4,
    temperature: float = 0.0,
    top_p: float = 1.0,
    eos_token_id: int | None = None,
    uniform: Callable[[], float] = random.random,
) -> Generation:
    _refuse(target, draft, prompt, max_new_tokens, num_draft_tokens, temperature, top_p)
    big, small = CachedModel(target), CachedModel(draft)
    output: list[int] = []
    counts = [0, 0, 0]

    def settled(cache: CachedModel) -> list[int]:
        """What the cache lacks of all that is certain, but for wrong tokens that it forgets now."""
        tokens = [*prompt, *output]
        cache.rewind(min(cache.length, len(tokens) - 1))
        return tokens[cache.length :]

    with torch.inference_mode():
        while len(output) < max_new_tokens and eos_token_id not in output:
            proposals: list[int] = []
            q = torch.empty(0, target.vocab_size, dtype=torch.float64, device=next(draft.parameters()).device)
            for place in range(min(num_draft_tokens, max_new_tokens - len(output) - 1)):
                logits = small.feed(proposals[-1:] if place else settled(small))
                q = torch.cat([q, token_probabilities(logits[-1:], temperature, top_p)])
                proposals.append(_from_the_top(q[-1], uniform()))
                if proposals[-1] == eos_token_id:
                    break
            logits = big.feed(settled(big) + proposals)
            p = token_probabilities(logits.flip(0)[: len(proposals) + 1].flip(0), temperature, top_p)
            came = verify(proposals, q, p, uniform)
            counts = [counts[0] + 1, counts[1] + len(proposals), counts[2] + len(came) - 1]
            for token in came:
                output.append(token)
                if token == eos_token_id:
                    break
    return Generation(output, *counts)
