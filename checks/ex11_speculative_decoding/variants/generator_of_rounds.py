"""Rounds are what a generator yields, with all numbers of a round taken before it begins; speedup by a closed form."""

import random
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor


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
    problems = {
        f"vocabularies of {target.vocab_size} and {draft.vocab_size}": target.vocab_size != draft.vocab_size,
        f"the prompt {prompt}": len(prompt) == 0 or min(prompt) < 0 or max(prompt) >= target.vocab_size,
        f"max_new_tokens {max_new_tokens}": max_new_tokens < 1,
        f"num_draft_tokens {num_draft_tokens}": num_draft_tokens < 1,
        f"temperature {temperature}": temperature < 0,
        f"top_p {top_p}": not 0 < top_p <= 1,
    }
    for problem, there in problems.items():
        if there:
            raise ValueError(problem)
    output: list[int] = []
    proposed = accepted = rounds = 0
    for proposals, came in _rounds(
        CachedModel(target),
        CachedModel(draft),
        [*prompt],
        lambda logits: token_probabilities(logits, temperature, top_p),
        lambda: min(num_draft_tokens, max_new_tokens - len(output) - 1),
        eos_token_id,
        uniform,
    ):
        rounds, proposed = rounds + 1, proposed + len(proposals)
        for place, token in enumerate(came):
            output.append(token)
            accepted += place < len(came) - 1
            if token == eos_token_id:
                return Generation(output, rounds, proposed, accepted)
        if len(output) == max_new_tokens:
            break
    return Generation(output, rounds, proposed, accepted)


def _rounds(
    judge: CachedModel,
    proposer: CachedModel,
    tokens: list[int],
    law: Callable[[Tensor], Tensor],
    most: Callable[[], int],
    eos: int | None,
    uniform: Callable[[], float],
) -> Iterator[tuple[list[int], list[int]]]:
    """What is proposed and what comes, round by round, without end."""
    while True:
        k = most()
        numbers = [uniform() for _ in range(2 * k + 1)]
        rows = [law(proposer.feed(tokens[proposer.length :])[-1])] if k else []
        proposals = [draw(row, numbers.pop()) for row in rows]
        while proposals and len(proposals) < k and proposals[-1] != eos:
            rows.append(law(proposer.feed(proposals[-1:])[0]))
            proposals.append(draw(rows[-1], numbers.pop()))
        p = law(judge.feed(tokens[judge.length :] + proposals)[-1 - len(proposals) :])
        q = torch.stack([*rows, p[0]])[: len(rows)]
        came = verify(proposals, q, p, lambda: numbers.pop(0))  # noqa: B023
        tokens = tokens + came
        for cache in (judge, proposer):
            cache.rewind(min(cache.length, len(tokens) - 1))
        yield proposals, came


def expected_speedup(acceptance_rate: float, num_draft_tokens: int, draft_cost: float) -> float:
    a, k = acceptance_rate, num_draft_tokens
    return (k + 1 if a == 1 else (1 - a ** (k + 1)) / (1 - a)) / (1 + k * draft_cost)
