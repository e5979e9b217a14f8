"""Speculative decoding writes one text after the other, beside plain decoding with the same cache."""

import threading
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from harness.language import Language, Run

DRAFT_TOKENS = 4
TEXTS = 3


def contestants(module: ModuleType, language: Language, prompts: Sequence[str]) -> Mapping[str, Run]:
    """The learner's speculative decoding, and their cache fed token by token."""
    chosen = [language.encode(prompt) for prompt in prompts[:TEXTS]]
    return {"yours": Speculating(module, language, chosen), "plain": Plain(module, language, chosen)}


class Plain:
    """Greedy decoding with CachedModel: every token is a call of the target."""

    def __init__(self, module: ModuleType, language: Language, prompts: Sequence[list[int]]) -> None:
        self.module, self.language, self.prompts, self.tokens = module, language, prompts, 0
        self.texts = [list(prompt) for prompt in prompts]
        self.number, self.calls = 0, 0
        self.cache: Any = None

    def step(self) -> bool:
        """One token."""
        if self.number == len(self.prompts):
            return False
        text, prompt = self.texts[self.number], self.prompts[self.number]
        if self.cache is None:
            self.cache = self.module.CachedModel(self.language.model)
        logits: Tensor = self.cache.feed(text if len(text) == len(prompt) else text[-1:])
        text.append(int(logits[-1].argmax()))
        self.calls += 1
        self.tokens += 1
        if text[-1] == self.language.eos_token_id or len(text) - len(prompt) == self.language.max_new_tokens:
            self.number, self.cache = self.number + 1, None
        return True

    def rows(self) -> Sequence[tuple[str, str]]:
        """The texts, prompts first."""
        counts = (len(text) - len(prompt) for text, prompt in zip(self.texts, self.prompts, strict=True))
        return [
            (f"{count:3} tokens", self.language.decode(text)) for count, text in zip(counts, self.texts, strict=True)
        ]

    def figures(self) -> Mapping[str, str]:
        """What a token costs."""
        return {"calls per token": f"{self.calls / max(1, self.tokens):.2f}"}


class Speculating(Plain):
    """speculative_generate at temperature 0, in a thread that waits after each call of the target."""

    def __init__(self, module: ModuleType, language: Language, prompts: Sequence[list[int]]) -> None:
        super().__init__(module, language, prompts)
        self.draft = Counted(language.draft)
        self.target = Turns(language.model, self.draft)
        self.thread: threading.Thread | None = None
        self.error: Exception | None = None

    def step(self) -> bool:
        """One round."""
        if self.thread is None:
            self.thread = threading.Thread(target=self._generate, daemon=True)
            self.thread.start()
        else:
            self.target.resume.release()
        self.target.paused.acquire()
        if self.error is not None:
            raise self.error
        if self.number < len(self.texts) and len(self.target.known) > len(self.prompts[self.number]):
            self.texts[self.number] = list(self.target.known)
        self.tokens = sum(len(text) for text in self.texts) - sum(len(prompt) for prompt in self.prompts)
        self.calls = self.target.calls
        return self.number < len(self.prompts)

    def figures(self) -> Mapping[str, str]:
        """What a token costs, and how many of the proposed ones were taken."""
        waits = self.number < len(self.prompts)  # The last round is not judged yet.
        proposed = self.draft.calls - waits * self.target.proposed
        accepted = max(0, self.tokens - self.calls + waits)
        return {**super().figures(), "draft tokens": f"{DRAFT_TOKENS}", "accepted": f"{accepted} of {proposed}"}

    def _generate(self) -> None:
        try:
            with torch.no_grad():
                for number, prompt in enumerate(self.prompts):
                    self.target.fed, self.target.known = [], []
                    made = self.module.speculative_generate(
                        self.target,
                        self.draft,
                        prompt,
                        self.language.max_new_tokens,
                        num_draft_tokens=DRAFT_TOKENS,
                        eos_token_id=self.language.eos_token_id,
                    )
                    self.texts[number] = [*prompt, *made.tokens]
                    self.number = number + 1
        except Exception as error:
            self.error = error
        self.target.paused.release()


class Counted(nn.Module):
    """A model as it is given, whose calls are counted."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.calls = model, 0
        self.vocab_size, self.num_layers = model.vocab_size, model.num_layers
        self.num_heads, self.num_kv_heads, self.head_dim = model.num_heads, model.num_kv_heads, model.head_dim

    def forward(self, tokens: Tensor, positions: Tensor, attend: Any) -> Tensor:
        """As the model's."""
        self.calls += 1
        logits: Tensor = self.model(tokens, positions, attend)
        return logits


class Turns(Counted):
    """A target that waits behind each call until it may go on; what it is fed tells which text stands by then."""

    def __init__(self, model: Any, draft: Counted) -> None:
        super().__init__(model)
        self.draft, self.fed, self.known, self.proposed, self.seen = draft, list[int](), list[int](), 0, 0
        self.paused, self.resume = threading.Semaphore(0), threading.Semaphore(0)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Any) -> Tensor:
        """As the model's; the last tokens are those that the draft has just proposed."""
        self.proposed, self.seen = self.draft.calls - self.seen, self.draft.calls
        self.fed = [*self.fed[: int(positions[0])], *tokens.tolist()]  # With the proposals that were taken.
        self.known = self.fed[: len(self.fed) - self.proposed]
        logits = super().forward(tokens, positions, attend)
        self.paused.release()
        self.resume.acquire()
        return logits
