"""What an exercise's demo.py gives, and what is shown of it."""

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Protocol

from harness.language.model import Language


class Run(Protocol):
    """Learners' code that writes texts, a little at a time. `tokens` is how many it has written so far, in all."""

    tokens: int

    def step(self) -> bool:
        """Writes on; False once all is written."""

    def rows(self) -> Sequence[tuple[str, str]]:
        """For each text: some words about it, and the text."""

    def figures(self) -> Mapping[str, str]:
        """Numbers of the moment by name, as people read them."""


class Demo(Protocol):
    """What an exercise's demo.py defines."""

    def contestants(self, module: ModuleType, language: Language, prompts: Sequence[str]) -> Mapping[str, Run]:
        """Runs of the learner's code by name, yours first. They take turns, so that each works as long as the others.

        Args:
            module: the submission.
        """
