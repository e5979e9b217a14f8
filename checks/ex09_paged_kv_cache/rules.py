"""The schedule as plain lists: what a step is to do, from what the requests are and which blocks they hold."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product


@dataclass(eq=False)
class Request:
    """What was asked for, and what became of it."""

    number: int
    prompt: list[int]
    most: int
    came: list[int] = field(default_factory=list)
    state: str = "waiting"
    fed: int = 0
    table: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.came

    @property
    def live(self) -> bool:
        return self.state in ("waiting", "running")


@dataclass
class Plan:
    """What a step is to do.

    Args:
        preempted: the numbers of those that lose their blocks.
        admitted: by number of a newcomer, how many of its first tokens it has in common with one that runs.
        running: the requests that run.
    """

    preempted: list[int]
    admitted: dict[int, int]
    running: list[Request]

    def feeds(self, block_size: int) -> Iterator[list[tuple[int, int]]]:
        """All pairs (position, token) that a call may be fed: what is shared within a block is up to the engine."""
        starts = []
        for one in self.running:
            if one.number in self.admitted:
                common = self.admitted[one.number]
                starts.append(range(common, common // block_size * block_size - 1, -1))
            else:
                starts.append(range(one.fed, one.fed + 1))
        for chosen in product(*starts):
            yield [pair for one, s in zip(self.running, chosen, strict=True) for pair in pairs(one.tokens, s)]


def pairs(tokens: list[int], start: int) -> list[tuple[int, int]]:
    """The tokens from a position on, each with its position."""
    return list(enumerate(tokens))[start:]


@dataclass
class Rules:
    """The requests of an engine, and what its next step is to do."""

    num_blocks: int
    block_size: int
    size: int = 8
    eos: int | None = None
    requests: list[Request] = field(default_factory=list)
    preemptions: int = 0

    def states(self) -> Counter[str]:
        return Counter(one.state for one in self.requests)

    def blocks(self, tokens: int) -> int:
        return math.ceil(tokens / self.block_size)

    def plan(self) -> Plan:
        """Slots for those that run, the oldest first; then newcomers, the oldest first."""
        running = [one for one in self.requests if one.state == "running"]
        waiting = [one for one in self.requests if one.state == "waiting"]
        tables = {one.number: one.table for one in running}
        preempted: list[Request] = []
        taken = 0

        def free() -> int:
            return self.num_blocks - len({block for table in tables.values() for block in table}) - taken

        for one in list(running):
            if one.fed % self.block_size == 0:
                while one in running and not free():
                    preempted.append(running.pop())
                    del tables[preempted[-1].number]
                taken += one in running
        admitted: dict[int, int] = {}
        sources = list(running)
        for one in sorted([*waiting, *preempted], key=lambda request: request.number):
            common = max((self.common(one, source) for source in sources), default=0)
            needed = self.blocks(len(one.tokens)) - common // self.block_size
            if len(running) >= self.size or needed > free():
                break
            running.append(one)
            admitted[one.number] = common
            taken += needed
        return Plan([one.number for one in preempted], admitted, running)

    def common(self, one: Request, source: Request) -> int:
        """How many first tokens of one are in the cache for another; the last one is fed anew."""
        count = 0
        for mine, theirs in zip(one.tokens[:-1], source.tokens[: source.fed], strict=False):
            if mine != theirs:
                break
            count += 1
        return count
