"""The board says which known mistake a file's failures look like."""

from dataclasses import replace
from typing import Any, cast

import pytest

from devtools import patterns as kept
from harness.model import bank, patterns
from harness.model.exercise import exercises
from harness.model.results import Result
from harness.runner.judge import Judge

EX01 = exercises()["ex01"]
FEW = {"one": {"a": "v1111"}, "two": {"a": "v2222", "b": "r3333"}, "three": {"a": "v2222", "b": "r3333"}}
MANY = {"many": {name: f"v{name * 4}" for name in "abcdefgh"}, "more": {name: f"v{name * 4}" for name in "abcdefghi"}}


@pytest.mark.parametrize(
    ("found", "ran", "known", "name"),
    [
        ({"a": "v1111"}, "abc", FEW, "one"),
        ({"a": "v9999"}, "abc", FEW, ""),  # few checks, other words
        ({"a": "v2222", "b": "r3333"}, "abc", FEW, ""),  # two mistakes fail so
        ({name: "v0000" for name in "abcdefgh"}, "abcdefghi", MANY, "many"),  # many checks, the same kinds
        ({name: "r0000" for name in "abcdefgh"}, "abcdefghi", MANY, ""),  # other kinds
        ({name: "v0000" for name in "abcdef"}, "abcdef", {"many": MANY["many"]}, "many"),  # two do not run yet
        ({name: f"v{name * 4}" for name in "abc"}, "abc", {"many": MANY["many"]}, ""),  # too few of its checks run
        ({}, "abc", FEW, ""),
    ],
)
def test_the_closest_mistake(found: dict[str, str], ran: str, known: dict[str, dict[str, str]], name: str) -> None:
    assert patterns.closest(found, set(ran), known) == name


def test_the_file_names_the_mistakes_in_words() -> None:
    """That the board shows them README's board proves, which is the real watch's on an inverted mask."""
    assert patterns.words(EX01, "inverted_mask") == "true in the mask forbids instead of allows"
    assert patterns.words(EX01, "mask_written_to") == "mask written to"
    load = [Result("1.1", "test_any_lengths[1-7]", "error", "SyntaxError", kind="load")]
    assert patterns.diagnosis(EX01, load) == "" == patterns.diagnosis(EX01, [])


class Still:
    """Says what a judge would say, without judging: the checks are ex01's, and all of them pass."""

    def __init__(self) -> None:
        self.checks, _ = patterns.load(EX01)
        self.results = lambda *_: [Result("1.1", name, "passed") for name in self.checks]

    def names(self, *_: Any) -> list[str]:
        return sorted(self.checks)


def test_a_stale_file_is_named() -> None:
    still = Still()
    judge = cast(Judge, still)

    fails_otherwise = list(kept.stale(judge, EX01))
    still.checks = still.checks | {"test_new"}
    others = list(kept.stale(judge, EX01))

    where = "checks/ex01_multi_head_attention/patterns.json is stale: "
    assert len(fails_otherwise) == kept.SAMPLE, fails_otherwise
    assert all(one.startswith(where) and one.endswith("make bank EX=1 writes it") for one in fails_otherwise)
    assert others == [f"{where}its checks are others; make bank EX=1 writes it"]


def test_shares_that_do_not_hold_are_named() -> None:
    good = kept.Shares(failing=100, named=69, wrong=1)

    assert not list(good.problems()) and str(good).startswith("of 100 mistakes re-made in variants 69 are named, 1 wr")
    assert [*replace(good, named=49).problems()] == ["fewer than 50% of the re-made mistakes are named"]
    assert [*replace(good, wrong=6).problems()] == ["more than 5% of the re-made mistakes are named wrongly"]
    assert [*replace(good, right_code_named=1).problems()] == ["right code is named as a mistake"]


@pytest.mark.parametrize("exercise", exercises().values(), ids=lambda exercise: exercise.id)
def test_the_file_is_the_banks_and_holds_no_code(exercise: Any) -> None:
    assert exercise.patterns_file.exists(), f"make bank EX={exercise.number} writes patterns.json"
    _, known = patterns.load(exercise)
    lines = {line.strip() for line in bank.answer(exercise).splitlines() if len(line.strip()) > 10}
    text = exercise.patterns_file.read_text()

    assert known and known.keys() <= bank.mistakes(exercise).keys()
    assert not any(line in text for line in lines)
