"""A proposer and a judge, each with a cache of its own and the tokens that are certain; they keep count."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class _Role:
    cache: CachedModel
    law: Callable[[Tensor], Tensor]
    tokens: list[int]
    calls: int = 0

    def read(self, extra: Sequence[int]) -> Tensor:
        """The probabilities behind each token that was not fed yet."""
        self.calls += 1
        return self.law(self.cache.feed((self.tokens + list(extra))[self.cache.length :]))

    def settle(self, new: list[int]) -> None:
        """New tokens are certain; what was fed beyond those that stay is forgotten."""
        self.tokens = self.tokens + new
        self.cache.rewind(min(self.cache.length, len(self.tokens) - 1))


@dataclass
class _Proposer(_Role):
    laws: list[Tensor] = field(default_factory=list)

    def propose(self, most: int, eos: int | None, uniform: Callable[[], float]) -> list[int]:
        self.laws, found = [], list[int]()
        for _ in range(most):
            self.laws.append(self.read(found)[-1])
            found.append(draw(self.laws[-1], uniform()))
            if found[-1] == eos:
                break
        return found


@dataclass
class _Judge(_Role):
    accepted: int = 0

    def judge(self, proposals: list[int], laws: list[Tensor], uniform: Callable[[], float]) -> list[int]:
        p = self.read(proposals)[-len(proposals) - 1 :]
        q = torch.cat([law[None] for law in laws]) if laws else torch.empty_like(p[1:])
        came = verify(proposals, q, p, uniform)
        self.accepted += len(came) - 1
        return came


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

    def law(logits: Tensor) -> Tensor:
        return token_probabilities(logits, temperature, top_p)

    proposer = _Proposer(CachedModel(draft), law, list(prompt))
    judge = _Judge(CachedModel(target), law, list(prompt))
    left = max_new_tokens
    while left > 0:
        proposals = proposer.propose(min(num_draft_tokens, left - 1), eos_token_id, uniform)
        came = judge.judge(proposals, proposer.laws, uniform)
        if eos_token_id in came:
            came = came[: came.index(eos_token_id) + 1]
            left = len(came)
        left -= len(came)
        proposer.settle(came)
        judge.settle(came)
    return Generation(judge.tokens[len(prompt) :], judge.calls, proposer.calls, judge.accepted)
