"""Turns what a check raised into one result: what happened, in the learner's words, and the line to look at."""

from pathlib import Path

import pytest

from harness.model.exercise import Exercise
from harness.model.results import NOT_RUN, Hang, Result
from harness.model.source import place_of
from harness.model.submission import LoadError, describe, line_in, read
from harness.testing.own_test import NotJudged, OwnTestNotWritten


class NotRun(Exception):
    """The check was not run, since an earlier one of its exercise hung."""


def explain(error: BaseException, requirement: str, name: str, path: Path, exercise: Exercise) -> Result:
    """The result of a check that ended in `error`; `path` is the learner's file."""
    if isinstance(error, LoadError):
        return Result(requirement, name, "error", error.fact, error.line, "no file" if error.missing else "load")
    if isinstance(error, NotJudged):
        return Result(requirement, name, "missing", str(error), kind="unjudged")
    if isinstance(error, NotRun):
        return Result(requirement, name, "missing", NOT_RUN)
    raised_at = getattr(error, "line", 0) or line_in(error, path) or line_in(error.__context__, path)
    line = raised_at or place_of(requirement, describe_plainly(error), read(path), exercise.starter)
    if isinstance(error, Hang):
        return Result(requirement, name, "timeout", describe_plainly(error), line)
    if isinstance(error, NotImplementedError) and (raised_at or isinstance(error, OwnTestNotWritten)):
        return Result(requirement, name, "failed", describe_plainly(error), line, "not implemented")
    if isinstance(error, pytest.skip.Exception | pytest.xfail.Exception | pytest.exit.Exception):
        return Result(
            requirement, name, "failed", f"your code ends the check by pytest.{type(error).__name__.lower()}", line
        )
    if isinstance(error, AssertionError):
        return Result(requirement, name, "failed", describe_plainly(error), line, printed=getattr(error, "printed", ""))
    return Result(
        requirement, name, "failed", f"your code raises {describe(error)}" if raised_at else describe(error), line
    )


def describe_plainly(error: BaseException) -> str:
    """An exception's own words, without its type."""
    return describe(error).removeprefix(f"{type(error).__name__}: ")
