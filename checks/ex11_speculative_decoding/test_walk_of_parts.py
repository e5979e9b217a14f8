"""Walks over calls of CachedModel (11.6) and of token_probabilities (11.1), in which everything is drawn together."""

import contextlib
import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from harness.testing import Aspect, Close, Step, Subject, Walk, is_tensor, walk_check

from .reference import Fault, Small, float64, probabilities, whole


@dataclass
class Caches:
    """Models by what they are, caches of the learner's, and the tokens that each has been fed."""

    subject: Subject
    models: dict[tuple[Any, ...], Small] = field(default_factory=dict)
    caches: dict[tuple[Any, ...], tuple[Any, list[int]]] = field(default_factory=dict)


class Feeding(Walk):
    """Feeding and rewinding of several caches, side by side."""

    aspects: ClassVar[tuple[Aspect, ...]] = (
        Aspect("cache", "11.6", {"": 0, "the second cache": 1, "the third cache": 2}),
        Aspect("fails", "11.6", {"": -1, "after a failed call": 0, "after a call that failed late": 1}, rate=0.3),
        Aspect(
            "refused", "11.6", {"": 0, "after a refused rewind": 99, "after a refused rewind below 0": -3}, rate=0.2
        ),
        Aspect("rewind", "11.6", {"": None, "rewound to 0": 0.0, "rewound by half": 0.5, "rewound by one": 1.0}),
        Aspect("count", "11.6", {"": 1, "two tokens": 2, "five tokens": 5}),
        Aspect("layers", "11.6", {"": 2, "one layer": 1, "three layers": 3}, rate=0.3),
        Aspect("dtype", "11.6", {"": torch.float64, "in float32": torch.float32}, rate=0.2),
        Aspect(
            "mode", "11.6", {"": "", "under no_grad": "no_grad", "under inference_mode": "inference_mode"}, rate=0.3
        ),
        Aspect("kind", "11.6", {"": list, "a tuple": tuple}, rate=0.2),
    )
    otherwise = ""

    def begin(self, subject: Subject) -> Caches:
        """No cache yet."""
        return Caches(subject)

    def step(self, state: Caches, step: Step) -> None:
        """One piece more of one sequence."""
        key = step["layers"], step["dtype"]
        rng = step.rng()
        model = state.models.setdefault(key, Small(rng, step["dtype"], layers=step["layers"]))
        # A cache is used in one mode: what is made in inference_mode stays there.
        inference = step["mode"] == "inference_mode"
        place = (*key, step["cache"], inference)
        with getattr(torch, step["mode"])() if step["mode"] else contextlib.nullcontext():
            if place not in state.caches:
                state.caches[place] = state.subject.CachedModel(model), []
            cache, sequence = state.caches[place]
            if step["refused"]:
                with contextlib.suppress(ValueError):
                    cache.rewind(step["refused"])
            length = self.kept(step["rewind"], len(sequence), step["count"])
            if length != len(sequence):
                cache.rewind(length)
                del sequence[length:]
            tokens = torch.randint(5, (step["count"],), generator=rng).tolist()
            if step["fails"] >= 0:
                model.fails_behind = min(step["fails"], step["layers"] - 1)
                with contextlib.suppress(Fault):
                    cache.feed([*tokens, 0])
                model.fails_behind = -1
            model.calls.clear()
            came = is_tensor(cache.feed(step["kind"](tokens)), "feed(tokens)")

        sequence += tokens
        what = f"feed({tokens}) behind {length} tokens"
        wanted = [(tokens, list(range(length, len(sequence))))]
        assert model.calls == wanted, f"{what}: model calls (tokens, positions) {model.calls} came, {wanted} was wanted"
        assert cache.length == len(sequence), f"{what}: length is {cache.length}, {len(sequence)} was wanted"
        assert not came.requires_grad, f"{what}: the logits ask for gradients"
        exact = Close(1e-9 if step["dtype"] == torch.float64 else 2e-4)
        exact(came, whole(model, sequence)[length:], what)

    def kept(self, share: float | None, held: int, more: int) -> int:
        """How many tokens stay; a sequence has no more than 16."""
        length = held if share is None else max(held - 1, 0) if share == 1.0 else int(held * share)
        return length if length + more < 16 else 0


class Rows(Walk):
    """Rows of logits."""

    aspects: ClassVar[tuple[Aspect, ...]] = (
        Aspect("temperature", "11.1", {"": 1.0, "temperature 0": 0.0, "temperature 0.3": 0.3, "temperature 7": 7}),
        Aspect("top_p", "11.1", {"": 1.0, "top_p 0.837": 0.837, "top_p 0.31": 0.31, "top_p 1": 1}),
        Aspect(
            "dtype",
            "11.1",
            {"": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16},
        ),
        Aspect(
            "shape",
            "11.1",
            {
                "": (5,),
                "one row": (1, 5),
                "rows": (3, 4),
                "[2, 3, 7]": (2, 3, 7),
                "one token": (3, 1),
                "two tokens": (2,),
            },
        ),
        Aspect("layout", "11.1", {"": "", "transposed": "transposed", "expanded": "expanded", "sliced": "sliced"}),
        Aspect(
            "scale", "11.1", {"": (1.0, 0.0), "far above 0": (2.0, 9e3), "far below 0": (2.0, -9e3), "wide": (3e3, 0.0)}
        ),
        Aspect(
            "some", "11.1", {"": "", "some of -inf": "infinite", "equal ones": "equal", "all equal": "same"}, rate=0.3
        ),
    )
    otherwise = ""

    def begin(self, subject: Subject) -> Subject:
        """Nothing is kept."""
        return subject

    def step(self, state: Subject, step: Step) -> None:
        """One call."""
        logits = laid_out(logits_of(step).to(step["dtype"]), step["layout"])
        temperature, top_p = step["temperature"], step["top_p"]
        rows = logits.detach().double().reshape(-1, logits.shape[-1]).tolist()
        if temperature and top_p < 1 and any(near(row, temperature, top_p) for row in rows):
            return
        expected = float64([probabilities(row, temperature, top_p) for row in rows]).reshape(logits.shape)
        version = logits._version

        came = state.token_probabilities(logits, temperature, top_p)

        what = f"token_probabilities(logits {list(logits.shape)}, {temperature}, {top_p})"
        Close(1e-9)(came, expected, what)
        assert logits._version == version, f"{what}: the logits are written to"
        there = came.gt(1e-290), expected.gt(1e-290)
        assert there[0].equal(there[1]), f"{what}: another token than was wanted has exactly 0"


def logits_of(step: Step) -> Tensor:
    """Random numbers; some of a row, but never all of it, may be -inf or equal."""
    spread, offset = step["scale"]
    logits: Tensor = spread * torch.randn(step["shape"], generator=step.rng(), dtype=torch.float64) + offset
    if step["some"] == "infinite":
        logits[..., 1:][logits[..., 1:] > offset] = -math.inf
    elif step["some"]:
        every = 2 if step["some"] == "equal" else 1
        logits[..., ::every] = logits[..., :1].clone()
    return logits


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same shape by other strides; expanded ones hold other numbers too."""
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded" and x.dim() > 1:
        return x[:1].expand(x.shape)
    return torch.stack((x, x), -1)[..., 0] if layout == "sliced" else x


def near(row: list[float], temperature: float, top_p: float) -> bool:
    """A sum meets top_p but for rounding."""
    kept = sorted(probabilities(row, temperature, 1.0), reverse=True)
    return any(abs(math.fsum(kept[:count]) - top_p) < 1e-9 for count in range(1, len(kept) + 1))


test_feeding_in_any_order = walk_check(Feeding(), 16)
test_probabilities_in_any_order = walk_check(Rows(), 20)
