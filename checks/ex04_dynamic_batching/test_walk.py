"""A walk over what no single check crosses: batchers, buckets, prompts, callers, cancellations, faults, a full queue,
and shutdown, in any order, against a plain model of the rules.

Each step is a round. A batch runs behind a gate while others wait, some are cancelled or refused, or shutdown is
called; then the gate opens. Which batches run, in which order, and what each caller gets is known beforehand.
"""

from typing import ClassVar

import torch

from harness.testing import Aspect, Step, Subject, Walk, walk_check

from .rounds import Round
from .rules import CLOSE, Fault, Kind, State
from .stage import Patience, Stage


class Rounds(Walk):
    """Rounds with several batchers."""

    aspects: ClassVar[tuple[Aspect, ...]] = (
        Aspect(
            "end",
            "4.9",
            {"": "", "shutdown() in a thread while they wait": "thread", "shutdown() on the callers' loop": "loop"},
            rate=0.2,
        ),
        Aspect("queue", "4.8", {"": False, "requests beyond max_queue_size": True}, rate=0.25),
        Aspect(
            "fault",
            "4.7",
            {
                "": "",
                "generate raises in the batch that runs": "raises",
                "generate raises in the next batch": "raises next",
                "a caller is cancelled while its batch runs": "cancelled",
                "all callers are cancelled while their batch runs": "all cancelled",
                "a caller is cancelled while its batch runs, which then raises": "cancelled raises",
                "the loop of a caller whose batch runs is closed": "closed",
                "the loop of a caller who waits is closed": "closed waiting",
                "a prompt of shape [1, 0] is refused": "empty",
                "a prompt of shape [2, L] is refused": "rows",
                "an int32 prompt is refused": "int32",
                "max_length 0 is refused": "nothing",
            },
            rate=0.4,
        ),
        Aspect(
            "cancelled",
            "4.4",
            {
                "": slice(0),
                "the oldest who waits is cancelled": slice(1),
                "the newest who waits is cancelled": slice(-1, None),
                "every second one who waits is cancelled": slice(0, None, 2),
                "all who wait are cancelled": slice(None),
            },
            rate=0.3,
        ),
        Aspect("loops", "4.3", {"": False, "callers on two event loops": True}, rate=0.3),
        Aspect(
            "kind",
            "4.5",
            {
                "": Kind(),
                "max_batch_size 1": Kind(size=1, room=5),
                "max_batch_size 3, max_wait_time 0.002": Kind(size=3, seconds=0.002, room=8),
                "max_batch_size 4, max_wait_time 0, buckets of 3": Kind(size=4, seconds=0, width=3, room=9),
                "max_batch_size 9, buckets of 5": Kind(size=9, width=5, room=12),
                "a model that has nothing but generate": Kind(bare=True, room=3),
            },
        ),
        Aspect(
            "waiting",
            "4.6",
            {
                "": "",
                "a full batch waits": "0",
                "a full batch and one more wait": "0+",
                "two batches of two buckets wait": "01",
                "batches of a bucket with another one between them wait": "010",
                "batches of two buckets, in turn, wait": "0~1",
                "some of three buckets wait": "?",
            },
            rate=0.85,
        ),
        Aspect(
            "lengths",
            "4.1",
            {"": "", "of different lengths": "any", "of the bucket's ends": "ends", "long ones": "long"},
        ),
        Aspect(
            "prompts",
            "4.2",
            {
                "": "",
                "with token 0": "zeros",
                "with tokens beyond 2 ** 53": "large",
                "with strides": "strided",
                "columns": "columns",
                "expanded": "expanded",
                "slices of one tensor": "slices",
                "made under inference_mode": "inference",
                "with one id": "id",
            },
        ),
        Aspect(
            "roles",
            "4.2",
            {
                "": "",
                "one tensor for the whole batch": "one",
                "asked before, of a model that has changed": "again",
            },
            rate=0.4,
        ),
        Aspect("new", "4.2", {"": (2, 2), "for 1 to 5 tokens": (1, 5)}),
        Aspect("rest", "4.4", {"": False, "the rest becomes a full batch": True}, rate=0.3),
    )
    otherwise = "4.4"

    def __init__(self) -> None:
        self.patience = Patience()
        self.stage: Stage | None = None

    def faults(self, subject: Subject, steps: list[Step]) -> dict[str, Exception]:
        """What a fault itself names as its requirement goes before what was drawn."""
        self.patience = Patience(0.4, 0.4, first=0.2, later=0.03)
        try:
            found = super().faults(subject, steps)
        finally:
            self.tidy()
        costs: dict[str, Exception] = {}
        unless: dict[str, str] = {}
        for drawn, error in found.items():
            fault = error.__cause__
            number = fault.requirement if isinstance(fault, Fault) else drawn
            costs.setdefault(number, error)
            unless.setdefault(number, fault.unless if isinstance(fault, Fault) else "")
        return {number: error for number, error in costs.items() if unless[number] not in costs.keys() - {number}}

    def tidy(self) -> None:
        if self.stage is not None:
            self.stage.tidy()
        self.stage = None

    def begin(self, subject: Subject) -> State | None:
        self.tidy()
        if self.patience.is_over:
            return None
        self.stage = Stage(subject, CLOSE, torch.Generator(), self.patience, "walk")
        return State(self.stage)

    def step(self, state: State | None, step: Step) -> None:
        if state is not None and not self.patience.is_over:  # Else nothing is found any more.
            Round(state, step).play()


test_calls_in_any_order = walk_check(Rounds(), 11)
