"""The language model that a demo runs: a checkpoint from a folder, or a small one of characters."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Language:
    """A model with its text.

    Args:
        model: a Decoder, as the exercise gives it.
        draft: a smaller Decoder of the same vocabulary.
        encode, decode: text to tokens and back.
        eos_token_id: the token that ends a text, if there is one.
        max_new_tokens: how much to write.
        name: what it is, in a few words.
        prompts: beginnings that suit it.
    """

    model: Any
    draft: Any
    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    eos_token_id: int | None
    max_new_tokens: int
    name: str
    prompts: tuple[str, ...]


def parameters(model: Any) -> int:
    """How many numbers a model has."""
    return sum(parameter.numel() for parameter in model.parameters())


def size(model: Any) -> str:
    """The number of a model's parameters, as people say it."""
    return f"{parameters(model) / 1e6:.1f} M parameters"
