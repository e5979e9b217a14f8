"""Where the calls of ranks meet: the n-th of each with the n-th of the others, and one rank at a time has the turn."""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

REDUCES = {
    dist.ReduceOp.SUM: ("sum", Tensor.add_),
    dist.ReduceOp.AVG: ("average", Tensor.add_),
    dist.ReduceOp.MAX: ("maximum", lambda a, b: a.copy_(torch.maximum(a, b))),
    dist.ReduceOp.MIN: ("minimum", lambda a, b: a.copy_(torch.minimum(a, b))),
    dist.ReduceOp.PRODUCT: ("product", Tensor.mul_),
}


class Unwound(RuntimeError):
    """Another rank has failed; this one ends."""


@dataclass(frozen=True)
class Call:
    """What one rank was seen to start: the `number`-th of its calls."""

    number: int
    kind: str
    numel: int
    dtype: torch.dtype | None
    nbytes: int
    how: str = ""
    asked: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        if self.kind == "barrier":
            return "barrier"
        kind = str(self.dtype).removeprefix("torch.")
        return f"{self.kind} ({self.how}) of {self.numel} {kind}" if self.how else f"{self.kind} of {self.numel} {kind}"


@dataclass(frozen=True)
class Wait:
    """A rank waits for its call `number`."""

    number: int


Entry = Call | Wait | str


@dataclass
class Slot:
    """The n-th call of all ranks: what each gives, and what comes of it."""

    calls: dict[int, Call] = field(default_factory=dict)
    inputs: dict[int, list[Tensor]] = field(default_factory=dict)
    result: list[Tensor] | None = None


class Meeting:
    """Where the calls of ranks meet: the n-th of each with the n-th of the others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.slots: list[Slot] = []
        self.logs: list[list[Entry]] = [[] for _ in range(size)]
        self.counts = [0] * size
        self.error: BaseException | None = None
        self.done = threading.Semaphore(0)
        self.threads: list[threading.Thread] = []
        self.results: list[Any] = [None] * size
        self.job: Callable[[int], Any] | None = None
        self.running = -1
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._waits: list[int | None] = [None] * size
        self._ended = [True] * size

    # Turns

    def begin(self, job: Callable[[int], Any] | None) -> None:
        """Gives all ranks something to do, the first rank the turn."""
        self.job, self._ended, self.running = job, [False] * self.size, 0
        self._turns[0].release()

    @property
    def idle(self) -> bool:
        """Whether every rank has come to its end."""
        return all(self._ended)

    def take_turn(self, rank: int) -> None:
        self._turns[rank].acquire()

    def pause(self, rank: int) -> None:
        """Gives the turn away and takes it again."""
        self._give_turn(rank)
        self.take_turn(rank)

    def end(self, rank: int) -> None:
        """A rank has come to the end of its function."""
        self._ended[rank] = True
        for other, number in enumerate(self._waits):
            if number is not None and rank not in self.slots[number].calls and not self.error:
                self.fail(
                    AssertionError(
                        f"rank {rank} has ended after {times(self.counts[rank])}; rank {other} waits in "
                        f"{nth(number)}, {self.slots[number].calls[other]}, which rank {rank} never makes\n"
                        "every rank makes the same calls in the same order, whatever its own batch needs"
                    )
                )
        if all(self._ended):
            if not self.error and len(set(self.counts)) > 1:
                most, least = (pick(range(self.size), key=self.counts.__getitem__) for pick in (max, min))
                call = self.slots[self.counts[least]].calls[most]
                self.fail(
                    AssertionError(
                        f"rank {least} makes {times(self.counts[least])}, rank {most} {self.counts[most]}, the next "
                        f"of them {call}\nevery rank makes the same calls in the same order"
                    )
                )
            self.done.release()
        else:
            self._give_turn(rank)

    def _give_turn(self, rank: int) -> None:
        """To the next rank that can go on; there is one."""
        for step in range(1, self.size + 1):
            other = (rank + step) % self.size
            number = self._waits[other]
            if not self._ended[other] and (number is None or self.error or self._complete(number)):
                self.running = other  # Before it has woken up: until then nobody else is to blame.
                self._turns[other].release()
                return
        raise AssertionError("some rank can always go on")

    def fail(self, error: BaseException) -> None:
        """The first error of a run is the one that is told."""
        if self.error is None:
            self.error = error

    # Calls

    def start(self, rank: int, call: Call, inputs: Sequence[Tensor]) -> int:
        """Enters a rank's next call; the tensors are copied now."""
        if self.error:
            raise Unwound("another rank has failed")
        number = self.counts[rank]
        self.counts[rank] += 1
        if number == len(self.slots):
            self.slots.append(Slot())
        slot = self.slots[number]
        self.logs[rank].append(call)
        for other, theirs in slot.calls.items():
            if theirs != call:
                self.fail(
                    AssertionError(
                        f"{nth(number)} differs between the ranks: rank {other} makes {theirs}, rank {rank} {call}\n"
                        "every rank makes the same calls in the same order, whatever its own batch needs"
                    )
                )
                raise Unwound("the ranks' calls differ")
        slot.calls[rank] = call
        with quiet():
            slot.inputs[rank] = [tensor.detach().clone(memory_format=torch.contiguous_format) for tensor in inputs]
        return number

    def result(self, rank: int, number: int) -> list[Tensor]:
        """What a call gives, once all ranks have made it."""
        self.logs[rank].append(Wait(number))
        slot = self.slots[number]
        while not self.error and not self._complete(number):
            self._waits[rank] = number
            gone = [other for other in range(self.size) if self._ended[other] and other not in slot.calls]
            if gone:
                self.fail(
                    AssertionError(
                        f"rank {rank} waits in {nth(number)}, {slot.calls[rank]}; rank {gone[0]} has ended after "
                        f"{times(self.counts[gone[0]])}\n"
                        "every rank makes the same calls in the same order, whatever its own batch needs"
                    )
                )
                break
            self._give_turn(rank)
            self.take_turn(rank)
        self._waits[rank] = None
        if self.error:
            raise Unwound("another rank has failed")
        if slot.result is None:
            slot.result = _computed(slot.calls[rank], [slot.inputs[other] for other in range(self.size)])
        return slot.result

    def _complete(self, number: int) -> bool:
        return len(self.slots[number].calls) == self.size


def _computed(call: Call, inputs: list[list[Tensor]]) -> list[Tensor]:
    """What all ranks get."""
    if call.kind == "broadcast":
        return inputs[int(call.how.rpartition(" ")[2])]
    if call.kind != "all_reduce":
        return [tensor for given in inputs for tensor in given]
    reduce = next(function for words, function in REDUCES.values() if words == call.how)
    with torch.no_grad(), quiet():
        total = inputs[0][0].clone()
        for (other,) in inputs[1:]:
            reduce(total, other)
        if call.how == "average":
            total = total / len(inputs) if total.is_floating_point() else total // len(inputs)
    return [total]


def quiet() -> AbstractContextManager[Any]:
    """What the group does itself is nothing that a probe of the submission sees."""
    return _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext()


def nth(number: int) -> str:
    """A call's number in words."""
    return f"call {number + 1}"


def times(count: int) -> str:
    """How many calls, in words."""
    return f"{count} call" if count == 1 else f"{count} calls"
