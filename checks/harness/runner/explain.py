"""Turns what a check raised into one result: what happened, in the learner's words, and the line to look at."""

import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType

import pytest
import torch

from harness.model.limits import LINE_CHARACTERS, MESSAGE_LINES
from harness.model.results import NOT_RUN, Hang, Result
from harness.model.source import place_of
from harness.model.submission import LoadError, bounded, describe, line_in, read
from harness.testing.check import Check
from harness.testing.own_test import NotJudged, OwnTestNotWritten


class NotRun(Exception):
    """The check was not run, since an earlier one of its exercise hung."""


def explain(error: BaseException, check: Check) -> Result:
    """The result of a check that ended in `error`."""
    if isinstance(error, LoadError):
        return check.result("error", error.fact, error.line, "no file" if error.missing else "load")
    if isinstance(error, NotJudged):
        return check.result("missing", str(error), kind="unjudged")
    if isinstance(error, NotRun):
        return check.result("missing", NOT_RUN)
    path, plainly = check.file, describe_plainly(error)
    raised_at = getattr(error, "line", 0) or line_in(error, path) or line_in(error.__context__, path)
    line = raised_at or place_of(check.requirement, plainly, read(path), check.exercise.starter)
    if isinstance(error, Hang):
        return check.result("timeout", plainly, line)
    if isinstance(error, NotImplementedError) and (raised_at or isinstance(error, OwnTestNotWritten)):
        return check.result("failed", plainly, line, "not implemented")
    if isinstance(error, pytest.skip.Exception | pytest.xfail.Exception | pytest.exit.Exception):
        return check.result("failed", f"your code ends the check by pytest.{type(error).__name__.lower()}", line)
    quoted = _quoted(error, path, raised_at)
    if isinstance(error, AssertionError):
        theirs = line_in(error, path) and not hasattr(error, "line")
        message = describe(error) if theirs else plainly
        return check.result("failed", message + quoted, line, printed=getattr(error, "printed", ""))
    return check.result("failed", f"your code raises {describe(error)}{quoted}" if raised_at else describe(error), line)


def shorten(error: BaseException) -> None:
    """Cuts an exception's own text, which pytest would print and split several times over."""
    with suppress(Exception):
        if len(text := str(error)) > MESSAGE_LINES * LINE_CHARACTERS:
            error.args = (bounded(text),)


def _quoted(error: BaseException, path: Path, line: int) -> str:
    """The line of the learner's code that raised, and what the function around it was given."""
    try:
        text = read(path).splitlines()[line - 1].strip() if line else ""
    except (LoadError, IndexError):
        return ""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    given = _given(frames[-1]) if frames else ""
    return (f"\nline {line}: {text}" if text else "") + (f"\nin {given}" if given else "")


def _given(frame: FrameType) -> str:
    """A call in words: "forward(query float64 [2, 5, 12], mask None)", its arguments as they are now."""
    code = frame.f_code
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    given = [f"{name} {_about(frame.f_locals[name])}" for name in names if name in frame.f_locals and name != "self"]
    return f"{code.co_name}({', '.join(given)})" if given else ""


def _about(value: object) -> str:
    if type(value) in (torch.Tensor, torch.nn.Parameter):
        assert isinstance(value, torch.Tensor)
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return repr(value)[:30] if type(value) in (bool, int, float, str, type(None)) else type(value).__name__


def describe_plainly(error: BaseException) -> str:
    """An exception's own words, without its type."""
    return describe(error).removeprefix(f"{type(error).__name__}: ")
