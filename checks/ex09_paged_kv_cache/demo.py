"""The engine writes several texts at once, beside the same engine with one at a time."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from harness.language import Language, Run

BLOCK = 16
BATCH = 8


def contestants(module: ModuleType, language: Language, prompts: Sequence[str]) -> Mapping[str, Run]:
    """The learner's engine with a batch, and with a batch of one."""
    return {"yours": Serving(module, language, prompts, BATCH), "one at a time": Serving(module, language, prompts, 1)}


class Serving:
    """An engine with all prompts submitted. Its pool holds two thirds of what they need, so that some are preempted."""

    def __init__(self, module: ModuleType, language: Language, prompts: Sequence[str], batch: int) -> None:
        self.language, self.tokens = language, 0
        self.prompts = [language.encode(prompt) for prompt in prompts]
        needed = [-(-(len(prompt) + language.max_new_tokens) // BLOCK) for prompt in self.prompts]
        self.blocks = max(*needed, sum(needed) * 2 // 3, 1)
        self.engine: Any = module.Engine(language.model, self.blocks, BLOCK, batch, language.eos_token_id)
        ids = [self.engine.submit(prompt, language.max_new_tokens) for prompt in self.prompts]
        self.written: dict[int, list[int]] = {one: [] for one in ids}

    def step(self) -> bool:
        """One step of the engine."""
        new: dict[int, int] = self.engine.step()
        for one, token in new.items():
            self.written[one].append(token)
        self.tokens += len(new)
        return bool(new)

    def rows(self) -> Sequence[tuple[str, str]]:
        """What each request holds, and its text, the prompt first."""
        return [
            (self._about(one, len(new)), self.language.decode([*prompt, *new]))
            for prompt, (one, new) in zip(self.prompts, self.written.items(), strict=True)
        ]

    def figures(self) -> Mapping[str, str]:
        """The engine's own numbers."""
        now = self.engine.metrics()
        return {
            "batch": f"{now['running']}",
            "waiting": f"{now['waiting']}",
            "blocks": f"{now['blocks_used']} of {self.blocks}",
            "preempted": f"{now['preemptions']}",
            "model calls": f"{now['model_calls']}",
        }

    def _about(self, one: int, count: int) -> str:
        blocks = len(self.engine.cache.block_table(one))
        return f"{count:3} tokens, {blocks:2} blocks"
