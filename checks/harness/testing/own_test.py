"""Judges the test that a learner wrote: it must pass on right code and fail on each slip.

The contract's names in the learner's file are swapped for another implementation's, all together, and the test is run.
"""

import ast
import hashlib
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from random import SystemRandom

from harness.model.bank import BanksAbsent, right_code, unusual, wrong_code
from harness.model.exercise import Exercise, exercise_of
from harness.model.limits import OWN_TEST_HANG_SECONDS, OWN_TEST_SECONDS, SLIP_HANG_SECONDS
from harness.model.results import Hang
from harness.model.submission import LoadError
from harness.testing.own_test_process import Ending, Trial, Trials


class NotJudged(Exception):
    """This check cannot be judged here, through no fault of the learner's."""


class OwnTestError(AssertionError):
    """The learner's test failed a check; `line` is where in their file, `printed` what it printed."""

    def __init__(self, message: str, ending: Ending) -> None:
        super().__init__(message)
        self.line = ending.line
        self.printed = ending.printed


class OwnTestNotWritten(NotImplementedError):
    """The learner's test still raises NotImplementedError."""


def digest(text: str, test: str, swaps: tuple[str, ...]) -> tuple[str, int]:
    """What an own test's verdict depends on: the file without the definitions that are swapped out, and without
    comments; and the line of the function `test`, 0 if there is none.

    Raises:
        SyntaxError: the text does not parse.
    """
    tree = ast.parse(text)
    tree.body = [node for node in tree.body if getattr(node, "name", "") not in swaps]
    line = next((node.lineno for node in tree.body if getattr(node, "name", "") == test), 0)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), line


class OwnTest:
    """What a check file says of its exercise's own test.

    Args:
        check_file: the check file's `__file__`.
        test: the name of the learner's test function.
        swaps: all contract names of the exercise but the test, which are swapped together.
        right: implementations that the test must pass on: "answer" and slugs of variants.
    """

    def __init__(
        self, check_file: str, test: str, swaps: tuple[str, ...], right: tuple[str, ...] = ("answer",)
    ) -> None:
        self.exercise: Exercise = exercise_of(Path(check_file))
        self.test = test
        self.swaps = swaps
        self.right = list(right)
        self.slips = list(self.exercise.slips)
        self._endings: dict[tuple[Path, str], Ending] = {}

    @cached_property
    def texts(self) -> dict[str, str]:
        """Right and wrong implementations by name, without those that are not in this copy of the workspace."""
        found: dict[str, str] = {}
        for name in (*self.right, *self.slips):
            choose = wrong_code if name in self.exercise.slips else right_code
            with suppress(BanksAbsent):
                found[name] = choose(self.exercise, name)
        return found

    @cached_property
    def unusual(self) -> dict[str, str]:
        """What is unusual about the right implementations that are variants."""
        return {name: unusual(self.exercise, name) for name in self.right if name in self.texts and name != "answer"}

    def passes_on(self, right: str, trials: Trials, path: Path) -> None:
        """Fails unless the learner's test returns, within OWN_TEST_SECONDS, on a right implementation."""
        ending = self._run(trials, path, right)
        if ending.how == "raised":
            about = f"\nthe code under it: {self.unusual[right]}" if right in self.unusual else ""
            raise OwnTestError(f"{self.test}() fails on right code: {ending.text}{about}", ending)
        if ending.how == "hung":
            raise Hang(f"{self.test}() did not end within {OWN_TEST_HANG_SECONDS:g} s on right code")
        if ending.how == "died":
            raise OwnTestError(f"{self.test}() ended its process on right code: {ending.text}", ending)
        if ending.seconds > OWN_TEST_SECONDS:
            raise OwnTestError(
                f"{self.test}() took {ending.seconds:.1f} s on right code; at most {OWN_TEST_SECONDS:g} s is asked for",
                ending,
            )

    def catches(self, slip: str, trials: Trials, path: Path) -> None:
        """Fails if the learner's test passes although the code has the slip."""
        ending = self._run(trials, path, slip)
        if ending.how == "returned":
            fact = f"{self.test}() passes although the code under it is wrong: {self.exercise.slips[slip]} ({slip})"
            raise OwnTestError(fact, ending)

    def _run(self, trials: Trials, path: Path, code: str) -> Ending:
        if code not in self.texts:
            raise NotJudged("judged when you push")
        if (path, code) not in self._endings:
            self._run_all(trials, path)
        ending = self._endings[path, code]
        if ending.how == "unloadable":
            raise LoadError(ending.text, ending.line, missing=ending.text == "no file")
        if ending.how == "not written":
            raise OwnTestNotWritten(ending.text)
        if ending.how == "not tried":
            raise OwnTestError(f"not run: {self.test}() is too slow on right code", ending)
        return ending

    def _run_all(self, trials: Trials, path: Path) -> None:
        """Runs every trial: right code first, then the others in an order that no test can count on, with the same
        right code two more times among them. A test that is too slow on right code is not run on the others.
        """
        first = next(name for name in self.right if name in self.texts)
        self._try(trials, path, [first])
        ending = self._endings[path, first]
        others = [name for name in self.texts if name != first]
        slow = ending.how == "hung" or ending.seconds > OWN_TEST_SECONDS
        if slow or ending.how in ("unloadable", "not written"):
            untried = replace(ending, how="not tried") if slow else ending
            self._endings |= {(path, other): untried for other in others}
            return
        others += [first, first]
        SystemRandom().shuffle(others)
        self._try(trials, path, others)

    def _try(self, trials: Trials, path: Path, names: list[str]) -> None:
        """Keeps of several trials of one name the one that did not return."""
        tried = [Trial(str(path), self.test, self.swaps, self.texts[name], self._limit(name)) for name in names]
        for name, ending in zip(names, trials.run(tried), strict=True):
            before = self._endings.get((path, name))
            if before is None or before.how == "returned":
                self._endings[path, name] = ending

    def _limit(self, name: str) -> float:
        return SLIP_HANG_SECONDS if name in self.exercise.slips else OWN_TEST_HANG_SECONDS
