"""A small model that records its calls, attention over contiguous tensors, and what lives of floating-point tensors."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any
from weakref import WeakSet, finalize

import torch
from torch import Tensor, UntypedStorage, nn

from harness.testing import DispatchMode

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
# How far a chosen token's logit may lie below the largest: what rounding may decide.
NEAR = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}
PLACES = 96


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model."""

    layers: int = 2
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 3
    vocabulary: int = 13
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return (
            f"a model of {self.layers} layer(s), {self.heads} query and {self.kv_heads} key-value head(s) of "
            f"{self.head_dim}, {str(self.dtype).removeprefix('torch.')}"
        )


# Where only the schedule counts.
TINY = Sizes(layers=1, heads=1, kv_heads=1, head_dim=4)
# Where the answers count, and other checks have more layers.
SMALL = Sizes(layers=1, heads=2, kv_heads=1)


class Model(nn.Module):
    """A decoder that notes what it is fed. What it answers depends on every token so far, and on its place.

    Attributes:
        calls: of each call that returned, the pairs (position, token) that it was fed.
        tried: how many calls there were, those that failed too.
        error: raised by the next call: at its start, between its layers, or at its end.
    """

    def __init__(self, sizes: Sizes = Sizes(), seed: int = 0) -> None:
        super().__init__()
        self.sizes, self.vocab_size, self.num_layers = sizes, sizes.vocabulary, sizes.layers
        self.num_heads, self.num_kv_heads, self.head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim
        self.calls: list[list[tuple[int, int]]] = []
        self._tries: list[None] = []  # A list, as a module is slow to set numbers.
        self.error: tuple[str, Exception] | None = None
        made = (nn.Parameter(weight.to(sizes.dtype, copy=True)) for weight in weights(sizes, seed))
        self.embed, self.place, self.into, self.out, self.head = made

    @property
    def tried(self) -> int:
        return len(self._tries)

    def fill(self, seed: int) -> None:
        """Gives it other weights: every second one in place, the others as new parameters."""
        known = list(self.named_parameters())
        with torch.no_grad():
            for place, ((name, parameter), weight) in enumerate(zip(known, weights(self.sizes, seed), strict=True)):
                if place % 2:
                    parameter.copy_(weight)
                else:
                    setattr(self, name, nn.Parameter(weight.to(parameter.dtype, copy=True)))

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """[T], [T] -> [T, vocabulary]."""
        self._tries.append(None)
        if self.tried > 300:
            raise AssertionError("the model was called 300 times for a handful of tokens, and there is no end")
        fed = list(zip(positions.tolist(), tokens.tolist(), strict=True))
        stage, error = self.error or ("", None)
        if error is not None:
            self.error = None
        if error is not None and stage == "at its start":
            raise error
        logits = self.logits(tokens, positions, attend, error if stage == "between its layers" else None)
        if error is not None:
            raise error
        self.calls.append(fed)
        return logits

    def logits(self, tokens: Tensor, positions: Tensor, attend: Attend, error: Exception | None = None) -> Tensor:
        """What it computes, without a note of it."""
        x = self.embed[tokens] + self.place[positions]
        heads, kv, dim = self.num_heads, self.num_kv_heads, self.head_dim
        for layer in range(self.num_layers):
            if layer and error is not None:
                raise error
            q, k, v = (x @ self.into[layer]).unflatten(-1, (-1, dim)).split([heads, kv, kv], dim=1)
            attended = attend(layer, q, k, v)
            if attended.shape != q.shape:
                raise AssertionError(f"attend: shape {tuple(attended.shape)} came, {tuple(q.shape)} was wanted")
            x = (x + attended.flatten(1) @ self.out[layer]).tanh()
        return x @ self.head


@cache
@torch.inference_mode(False)
def weights(sizes: Sizes, seed: int) -> list[Tensor]:
    """What a model is filled with, in float64: embed, place, into, out, head."""
    rng = torch.Generator().manual_seed(seed)
    width, out = 10, sizes.heads * sizes.head_dim
    rows = out + 2 * sizes.kv_heads * sizes.head_dim
    shapes = (
        (0.5, (sizes.vocabulary, width)),
        (0.5, (PLACES, width)),
        (0.8, (sizes.layers, width, rows)),
        (0.8, (sizes.layers, out, width)),
        (1.0, (width, sizes.vocabulary)),
    )
    return [scale * torch.randn(shape, generator=rng, dtype=torch.float64) for scale, shape in shapes]


def causal(lengths: Sequence[int], queries: Sequence[int] | None = None) -> Tensor:
    """What the last queries of some sequences may not see of all their tokens, one sequence after the other: [T, S]."""
    queries = lengths if queries is None else queries
    hidden = torch.ones(sum(queries), sum(lengths), dtype=torch.bool)
    row = column = 0
    for length, count in zip(lengths, queries, strict=True):
        hidden[row : row + count, column : column + length] = torch.ones(count, length).triu(length - count + 1).bool()
        row, column = row + count, column + length
    return hidden


def contiguous(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor) -> Tensor:
    """Attention over keys and values that lie one after the other: q [T, H, Dh]; k, v [S, Hkv, Dh]; hidden [T, S]."""
    group = q.shape[1] // k.shape[1]
    keys, values = k.repeat_interleave(group, 1).permute(1, 2, 0), v.repeat_interleave(group, 1).transpose(0, 1)
    scores = (q.transpose(0, 1) @ keys) / math.sqrt(q.shape[-1])  # [H, T, S]
    return (scores.masked_fill(hidden, -math.inf).softmax(-1) @ values).transpose(0, 1)


@torch.no_grad()
def wrong_tokens(
    model: Model, answers: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> Iterator[tuple[int, int, int]]:
    """Of prompts and their answers, the tokens that are not the most probable ones after those before them: which
    answer, the place in it, and what was wanted. All at once, over contiguous tensors, without the learner's code.
    """
    rows = [[*prompt, *came[:-1]] for prompt, came in answers if came]
    if not rows:
        return
    hidden = causal([len(row) for row in rows])
    tokens = torch.tensor([min(max(token, 0), model.vocab_size - 1) for row in rows for token in row])
    positions = torch.tensor([place for row in rows for place in range(len(row))])
    logits = model.logits(tokens, positions, partial(unlayered, hidden))
    short = (logits.amax(-1, keepdim=True) - logits).tolist()
    start = 0
    for number, (prompt, came) in enumerate(answers):
        for place, token in enumerate(came):
            gaps = short[start + len(prompt) - 1 + place]
            if not (0 <= token < len(gaps)) or not gaps[token] <= NEAR[model.sizes.dtype]:
                yield number, place, gaps.index(min(gaps))
        start += len(prompt) + len(came) - 1 if came else 0


def unlayered(hidden: Tensor, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of any layer over contiguous tensors."""
    return contiguous(q, k, v, hidden)


def alone(model: Model, prompt: Sequence[int], count: int) -> list[int]:
    """What a prompt gets alone, without a cache."""
    tokens = list(prompt)
    for _ in range(count):
        attend = partial(unlayered, causal([len(tokens)]))
        with torch.no_grad():
            logits = model.logits(torch.tensor(tokens), torch.arange(len(tokens)), attend)
        tokens.append(int(logits[-1].argmax()))
    return tokens[len(prompt) :]


class Floats(DispatchMode):
    """Follows the floating-point storages that are made while it is on, for as long as they live.

    Attributes:
        made: bytes made in all.
        alive: bytes that live.
    """

    def __init__(self) -> None:
        super().__init__()
        self.made = self.alive = 0
        self._seen: WeakSet[UntypedStorage] = WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for given in (*args, *kwargs.values()):
            self._note(given)
        result = func(*args, **kwargs)
        for made in result if isinstance(result, (list, tuple)) else (result,):
            if type(made) is Tensor and made.is_floating_point() and made.untyped_storage() not in self._seen:
                size = made.untyped_storage().nbytes()
                self.made, self.alive = self.made + size, self.alive + size
                finalize(made.untyped_storage(), self._forget, size).atexit = False
            self._note(made)
        return result

    def _note(self, value: Any) -> None:
        if isinstance(value, Tensor):
            self._seen.add(value.untyped_storage())
        elif isinstance(value, (list, tuple)):
            for one in value:
                self._note(one)

    def _forget(self, size: int) -> None:
        self.alive -= size
