"""No unearned point: what was tried, and what it earns when graded."""

from collections.abc import Callable
from typing import Any

import pytest

from selftest import cheats

POINTS_OF_THE_ANSWER = 45  # Without "reads well", which is not asked here.
# Values, masks, from scratch: what cheats are judged by here, for the sake of time.
SOME = ("1.1", "1.3", "1.8")


@pytest.fixture(scope="module")
def graded(judged: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Verdicts on the code of all cheats, as `make grade` gives them."""
    verdicts = judged("ex01", {"honest": cheats.ANSWER, "zeros": cheats.ZEROS}, "code", graded=True)
    verdicts |= judged("ex01", cheats.CHEATS, "code", graded=True, requirements=SOME)
    disguised = judged("ex01", cheats.DISGUISED, "code", graded=True, requirements=("1.8",))
    return verdicts | {f"disguised {name}": verdict for name, verdict in disguised.items()}


@pytest.fixture(scope="module")
def own_tests(judged: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    return judged("ex01", {"honest": cheats.ANSWER} | cheats.OWN_TESTS, "own test", graded=True)


def lost(verdict: dict[str, Any]) -> set[str]:
    return {result["requirement"] for result in verdict["results"] if result["outcome"] != "passed"}


def test_an_honest_answer_loses_nothing(graded: dict[str, Any], own_tests: dict[str, Any]) -> None:
    assert not lost(graded["honest"]) and not lost(own_tests["honest"])
    assert graded["honest"]["score"] + own_tests["honest"]["score"] == POINTS_OF_THE_ANSWER


@pytest.mark.parametrize("name", ["zeros", *cheats.CHEATS])
def test_it_earns_nothing(graded: dict[str, Any], name: str) -> None:
    verdict = graded[name]

    assert verdict["score"] == 0, {r["requirement"] for r in verdict["results"]} - lost(verdict)
    assert verdict["seconds"] < 40
    assert not any("Traceback" in result["message"] for result in verdict["results"])


@pytest.mark.parametrize("name", cheats.DISGUISED)
def test_prebuilt_attention_is_reached(graded: dict[str, Any], name: str) -> None:
    verdict = graded[f"disguised {name}"]
    messages = [r["message"] for r in verdict["results"] if r["requirement"] == "1.8" and r["outcome"] != "passed"]

    assert any(" reached " in message for message in messages), messages or lost(verdict)


@pytest.mark.parametrize("name", cheats.OWN_TESTS)
def test_a_test_that_looks_elsewhere_earns_nothing(own_tests: dict[str, Any], name: str) -> None:
    assert own_tests[name]["score"] == 0


def test_what_was_replaced_is_named_as_a_fact(graded: dict[str, Any]) -> None:
    messages = [result["message"] for result in graded["isclose"]["results"]]

    assert "ex01_multi_head_attention.py replaces torch.isclose; a check that runs with it proves nothing" in messages
