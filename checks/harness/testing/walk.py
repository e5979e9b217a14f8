"""Walks: seeded sequences of calls in which everything is drawn together, shortened when they fail.

Beside the checks that teach one mechanism each, a walk tries what nobody thought of: a mask of another kind after
eval(), a cast between two lengths. What a step draws is independent of its neighbours, so that steps can be left out.
"""

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from harness.model.results import Hang
from harness.model.submission import LoadError, describe
from harness.testing.subject import Subject, neutral_state

# Steps that may be played again to shorten what fails in a walk: a wrong answer is judged fast too.
_REPLAYED = 500
_PAIRS = 40
# More steps than these tell nobody what was wrong.
_SHORT = 3


@dataclass(frozen=True)
class Aspect:
    """Something that is drawn for every step.

    Args:
        name: how a walk asks for what was drawn.
        requirement: the one that a failure costs that needs this aspect.
        choices: values by the words that tell of them; the first is the plain one, whose words are empty.
        rate: how often another than the plain one is drawn.
    """

    name: str
    requirement: str
    choices: Mapping[str, Any] = field(hash=False)
    rate: float = 0.5

    @property
    def plain(self) -> str:
        return next(iter(self.choices))


@dataclass(frozen=True)
class Step:
    """What was drawn for one call: words by aspect, and the seed of its numbers."""

    seed: int
    words: Mapping[str, str]
    aspects: Mapping[str, Aspect] = field(repr=False)

    def __getitem__(self, aspect: str) -> Any:
        """The value that was drawn for an aspect."""
        return self.aspects[aspect].choices[self.words[aspect]]

    def rng(self) -> torch.Generator:
        """A CPU generator of this step's own."""
        return torch.Generator().manual_seed(self.seed)

    def without(self, aspect: str) -> "Step":
        """The same step, plain in an aspect."""
        return replace(self, words={**self.words, aspect: self.aspects[aspect].plain})

    def __str__(self) -> str:
        return ", ".join(word for word in self.words.values() if word) or "a plain call"


class Walk(ABC):
    """What an exercise tries in any order.

    Attributes:
        aspects: what is drawn, in the order of blame: of those that a failure cannot do without, the first one's
            requirement is lost.
        otherwise: the requirement that a failing plain call costs; empty where other checks say enough of one.
    """

    aspects: ClassVar[tuple[Aspect, ...]]
    otherwise: ClassVar[str]

    @abstractmethod
    def begin(self, subject: Subject) -> Any:
        """What a walk begins with: modules of the learner's, and what the checks know of them."""

    @abstractmethod
    def step(self, state: Any, step: Step) -> None:
        """One call: does what was drawn and compares everything that can be seen of it.

        Raises:
            AssertionError: something is not as it should be.
        """

    @property
    def requirements(self) -> list[str]:
        """Those that a walk can cost."""
        costs = [*(aspect.requirement for aspect in self.aspects), self.otherwise]
        return list(dict.fromkeys(number for number in costs if number))

    def draw(self, count: int, seed: int = 0) -> list[Step]:
        """The first `count` steps of the walk of a seed."""
        rng = random.Random(seed)
        aspects = {aspect.name: aspect for aspect in self.aspects}
        return [
            Step(rng.getrandbits(31), {a.name: _drawn(a, rng) for a in self.aspects}, aspects) for _ in range(count)
        ]

    def faults(self, subject: Subject, steps: list[Step]) -> dict[str, Exception]:
        """The first fault of each requirement. The aspect that one was found with is plain in the steps that follow.

        Code that is not written yet costs the requirement that needs it; all of them, where a plain call needs it. What
        cannot be shortened blames nothing where something else was found: it may be a consequence of that.
        """
        found: dict[str, Exception] = {}
        long: Exception | None = None
        budget = _Budget(max(_REPLAYED, 2 * len(steps)))
        while steps and not (budget.spent and (found or long)):
            failure = self._play(subject, steps)
            if failure is None:
                break
            place, error = failure
            shortest, error = self._shortened(subject, steps[: place + 1], error, budget)
            steps, subject = steps[place + 1 :], subject.again()
            if not shortest:
                long = long or _told(error, [], place + 1)
                continue
            blamed = self._blamed(shortest)
            told = error if isinstance(error, NotImplementedError) else _told(error, shortest, place + 1)
            if blamed is None:
                costs = self.requirements if isinstance(error, NotImplementedError) else [self.otherwise]
                return {**dict.fromkeys((number for number in costs if number), told), **found}
            found.setdefault(blamed.requirement, told)
            steps = [step.without(blamed.name) for step in steps]
        return found or ({self.otherwise: long} if long is not None and self.otherwise else {})

    def _play(self, subject: Subject, steps: list[Step]) -> tuple[int, Exception] | None:
        """Plays steps from the beginning; the place of the one that fails, and how."""
        neutral_state()
        state: Any = None
        for place, step in enumerate(steps):
            try:
                state = state if place else self.begin(subject)
                self.step(state, step)
            except (LoadError, Hang):
                raise
            except Exception as error:
                return place, error
        return None

    def _shortened(
        self, subject: Subject, steps: list[Step], error: Exception, budget: "_Budget"
    ) -> tuple[list[Step], Exception]:
        """The fewest and plainest of the steps whose last one still fails, and how; none if there are too many."""

        def fails(some: list[Step]) -> bool:
            nonlocal error
            failure = self._play(subject.again(), some) if budget.take(len(some)) else None
            if failure is None or failure[0] != len(some) - 1:
                return False
            error = failure[1]
            return True

        shortest = next((some for some in _endings(steps) if fails(some)), [])
        while shortest and (smaller := next((one for one in _shorter(shortest) if fails(one)), None)):
            shortest = smaller
        while shortest and (plainer := next((one for one in self._plainer(shortest) if fails(one)), None)):
            shortest = plainer
        return (shortest if len(shortest) <= _SHORT else []), error

    def _plainer(self, steps: list[Step]) -> Iterator[list[Step]]:
        """All of the steps plain in one aspect; one of them plain in everything; one of them plain in one aspect."""
        for aspect in self.aspects:
            if (plainer := [step.without(aspect.name) for step in steps]) != steps:
                yield plainer
        for aspects in (self.aspects, *((aspect,) for aspect in self.aspects)):
            for place, step in enumerate(steps):
                one = step
                for aspect in aspects:
                    one = one.without(aspect.name)
                if one != step:
                    yield [*steps[:place], one, *steps[place + 1 :]]

    def _blamed(self, steps: list[Step]) -> Aspect | None:
        """The first aspect that is not plain, in the last step rather than in those before."""
        for step in reversed(steps):
            for aspect in self.aspects:
                if step.words[aspect.name] != aspect.plain:
                    return aspect
        return None


def _drawn(aspect: Aspect, rng: random.Random) -> str:
    plain, *others = aspect.choices
    return rng.choice(others) if others and rng.random() < aspect.rate else plain


def _endings(steps: list[Step]) -> Iterator[list[Step]]:
    """The last step; it after one of those before; then more and more of the last ones."""
    yield steps[-1:]
    yield from ([before, steps[-1]] for before in reversed(steps[-1 - _PAIRS : -1]))
    length = 4
    while length < len(steps):
        yield steps[-length:]
        length *= 4
    if len(steps) > 2:
        yield steps


def _shorter(steps: list[Step]) -> Iterator[list[Step]]:
    """The second half of the steps; then all of them but one of those before the last."""
    if len(steps) > 2:
        yield steps[len(steps) // 2 :]
    for place in range(len(steps) - 1):
        yield [*steps[:place], *steps[place + 1 :]]


class _Budget:
    """How many steps may still be played again."""

    def __init__(self, steps: int) -> None:
        self._left = steps

    @property
    def spent(self) -> bool:
        return self._left <= 0

    def take(self, steps: int) -> bool:
        self._left -= steps
        return self._left >= 0


def _told(error: Exception, shortest: list[Step], place: int) -> AssertionError:
    """The failure in words: what it said, then the calls that lead to it."""
    said = str(error) if isinstance(error, AssertionError) else f"your code raises {describe(error)}"
    if len(shortest) == 1:
        calls = [f"in one call: {shortest[0]}"]
    elif shortest:
        calls = [f"call {number}: {step}" for number, step in enumerate(shortest, start=1)]
    else:
        calls = [f"in call {place} of a walk; not in a shorter one"]
    told = AssertionError("\n".join([said, *calls]))
    told.__cause__ = error
    return told
