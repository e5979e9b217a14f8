"""A walk over what no single check crosses: requests that come, share, outgrow the pool, are cancelled, and fail, on
models and engines of any sizes, step by step beside the plain rules.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch

from harness.testing import Aspect, Step, Subject, Walk, walk_check

from .reference import Sizes
from .stage import Fault, Stage, distinct

# What a fault costs that needs nothing but requests.
COSTS = {"tokens": "9.5", "calls": "9.6", "schedule": "9.6", "metric": "9.6", "memory": "9.4", "sharing": "9.8"}
MODES: dict[str, Callable[[], Any]] = {
    "": torch.enable_grad,
    "no_grad": torch.no_grad,
    "inference": torch.inference_mode,
}


class Serving(Walk):
    """Engines that serve a handful of requests each."""

    aspects: ClassVar[tuple[Aspect, ...]] = (
        Aspect(
            "cancelled",
            "9.9",
            {"": 0, "one is cancelled": 1, "three are cancelled": 3},
            rate=0.4,
        ),
        Aspect(
            "error",
            "9.9",
            {
                "": "",
                "the model raises at its start": "at its start",
                "the model raises between its layers": "between its layers",
                "the model raises at its end": "at its end",
            },
            rate=0.35,
        ),
        Aspect(
            "prompts",
            "9.8",
            {
                "": "distinct",
                "prompts with one beginning": "beginning",
                "equal prompts": "equal",
                "prompts that are beginnings of one": "cut",
                "prompts that go on with an answer": "answer",
            },
            rate=0.6,
        ),
        Aspect("pool", "9.7", {"": 0, "a pool that is too small": 1, "the smallest pool": 2}, rate=0.6),
        Aspect("eos", "9.5", {"": None, "an end token": 5, "the end token 0": 0}, rate=0.4),
        Aspect(
            "model",
            "9.5",
            {
                "": Sizes(),
                "one layer": Sizes(layers=1, heads=2, kv_heads=1),
                "three layers": Sizes(layers=3, heads=2, kv_heads=2),
                "another vocabulary": Sizes(layers=1, vocabulary=7),
                "float32": Sizes(heads=2, dtype=torch.float32),
            },
            rate=0.5,
        ),
        Aspect("block", "9.5", {"": 4, "blocks of 1": 1, "blocks of 2": 2, "blocks of 3": 3, "blocks of 7": 7}),
        Aspect("size", "9.5", {"": 8, "max_batch_size 1": 1, "max_batch_size 2": 2, "max_batch_size 3": 3}, rate=0.4),
        Aspect("joins", "9.5", {"": 0, "they come one by one": 1, "they come late": 3}),
        Aspect("mode", "9.5", {"": "", "under no_grad": "no_grad", "under inference_mode": "inference"}, rate=0.3),
        Aspect("before", "9.5", {"": "", "after a run": "run", "after a run and new weights": "weights"}, rate=0.3),
    )
    otherwise = "9.5"

    @property
    def requirements(self) -> list[str]:
        return ["9.4", "9.5", "9.6", "9.7", "9.8", "9.9"]

    def faults(self, subject: Subject, steps: list[Step]) -> dict[str, Exception]:
        """What needs nothing but requests costs what it names."""
        costs: dict[str, Exception] = {}
        for number, error in super().faults(subject, steps).items():
            fault = error.__cause__
            named = COSTS.get(fault.kind, number) if isinstance(fault, Fault) and number == "9.5" else number
            costs.setdefault(named, error)
        return costs

    def begin(self, subject: Subject) -> Subject:
        """Each step builds an engine of its own."""
        return subject

    def step(self, state: Subject, step: Step) -> None:
        """An engine that serves some requests to their end."""
        rng = step.rng()
        lengths = [self.number(rng, 1, 9) for _ in range(4)]
        asked = [(prompt, self.number(rng, 1, 6)) for prompt in self.prompts(step, rng, lengths)]
        size = step["block"]
        needs = [
            -(-(len(prompt) + most + (4 if step["prompts"] == "answer" else 0) - 1) // size) for prompt, most in asked
        ]
        spare = {0: sum(needs), 1: self.number(rng, 1, max(needs)), 2: 0}[step["pool"]]
        stage = Stage(state, max(needs) + spare, size, size=step["size"], eos=step["eos"], sizes=step["model"])
        stage.tells = True
        with MODES[step["mode"]]():
            self.before(stage, step, rng)
            self.serve(stage, step, rng, asked)

    def before(self, stage: Stage, step: Step, rng: torch.Generator) -> None:
        if step["before"]:
            stage.submit(distinct(rng, 1, vocabulary=7)[0], 1)
            stage.run()
            if step["before"] == "weights":
                stage.new_weights(1)

    def serve(self, stage: Stage, step: Step, rng: torch.Generator, asked: list[tuple[list[int], int]]) -> None:
        """Submits them, some between steps; cancels and fails where that was drawn."""
        first = len(stage.rules.requests)
        for prompt, most in asked:
            if step["prompts"] == "answer" and len(stage.rules.requests) > first:
                source = stage.rules.requests[self.number(rng, first, len(stage.rules.requests) - 1)]
                prompt = [*source.tokens[: len(prompt) + 4 - 1], *prompt[:1]]
            stage.submit(prompt, most)
            for _ in range(step["joins"]):
                if stage.live:
                    stage.step()
        cancels, fails = step["cancelled"], 2 if step["error"] else 0
        while stage.live:
            if fails and self.number(rng, 0, 1):
                stage.fails(step["error"], RuntimeError("device lost"))
                fails -= 1
            came = stage.generated
            stage.step()
            if stage.generated == came:
                break
            if cancels and self.number(rng, 0, 1):
                stage.cancel(self.number(rng, first, len(stage.rules.requests) - 1))
                cancels -= 1
        stage.drain()

    def prompts(self, step: Step, rng: torch.Generator, lengths: list[int]) -> list[list[int]]:
        vocabulary = step["model"].vocabulary
        apart = distinct(rng, *lengths, vocabulary=vocabulary)
        base = torch.randint(vocabulary, (9,), generator=rng).tolist()
        ways = {
            "beginning": lambda prompt: [*base[: self.number(rng, 1, 8)], *prompt][:9],
            "equal": lambda prompt: base,
            "cut": lambda prompt: base[: len(prompt)],
        }
        change = ways.get(step["prompts"])
        return [change(prompt) for prompt in apart] if change else apart

    @staticmethod
    def number(rng: torch.Generator, low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=rng))


test_requests_in_any_order = walk_check(Serving(), 7)
