"""Whatever a learner's file does, its verdict is one clear reason, in bounded time, and no traceback of ours."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harness.model import bank
from harness.model.exercise import exercises
from harness.model.submission import LoadError, read

EX01 = exercises()["ex01"]
ANSWER = bank.answer(EX01)
RETURN = "        return self.output_linear(joined), weights\n"
FORWARD = "        scores_shape = (query.size(0)"
LISTED = "        return [self.output_linear(joined), weights]\n"
INIT = "        super().__init__()\n"


def in_forward(line: str) -> str:
    return ANSWER.replace(FORWARD, f"        {line}\n{FORWARD}")


# name -> (text, state, what a message says, whether a line of the file is named)
BAD: dict[str, tuple[str | bytes, str, str]] = {
    "empty": ("", "in progress", "defines no MultiHeadAttention; the contract asks for it"),
    "no UTF-8": (b"x = 1\n\xff\xfe\n", "does not import", "is not UTF-8 text (byte 6)"),
    "null bytes": (b"x = 1\n\0", "does not import", "holds null bytes"),
    "too large": (b"#" * 2_000_000, "does not import", "is 2,000,000 bytes long"),
    "syntax": ("def f(:\n    pass\n", "does not import", "SyntaxError"),
    "indentation": (ANSWER + "\n  x = 1\n", "does not import", "IndentationError"),
    "nested": ("x = " + "(" * 300 + ")" * 300, "does not import", "SyntaxError: too many nested parentheses"),
    "raises on import": (ANSWER + "\nraise OSError('no disk')\n", "does not import", "OSError: no disk on import"),
    "exits on import": (ANSWER + "\nimport sys\nsys.exit(0)\n", "does not import", "SystemExit: 0 on import"),
    "interrupts on import": (ANSWER + "\nraise KeyboardInterrupt\n", "does not import", "KeyboardInterrupt on import"),
    "missing module": ("import no_such_thing\n", "does not import", "No module named 'no_such_thing'"),
    "imports the answers": ("from answers import ex01\n", "does not import", "imports answers; an exercise stands"),
    "imports the harness": ("import harness.plugin\n", "does not import", "imports harness.plugin; an exercise"),
    "kills itself on import": ("import os\nos._exit(0)\n", "in progress", "ended the process (exit code 0)"),
    "segmentation fault": (in_forward("import ctypes; ctypes.string_at(0)"), "in progress", "died (SIGSEGV)"),
    "abort": (in_forward("import os; os.abort()"), "in progress", "died (SIGABRT)"),
    "exit in forward": (in_forward("raise SystemExit(3)"), "in progress", "your code raises SystemExit: 3"),
    "interrupt in forward": (in_forward("raise KeyboardInterrupt"), "in progress", "KeyboardInterrupt"),
    "recursion": (in_forward("return self.forward(query, key, value, mask)"), "in progress", "RecursionError"),
    "huge": (in_forward("torch.empty(1 << 34, dtype=torch.float64).zero_()"), "in progress", "memory"),
    "a hostile error": (
        in_forward("raise type('E', (Exception,), {'__str__': lambda self: 1 / 0})()"),
        "in progress",
        "your code raises E (whose text cannot be had)",
    ),
    "raises from __init__": (ANSWER.replace(INIT, INIT + "        1 / 0\n"), "in progress", "ZeroDivisionError"),
    "returns None": (ANSWER.replace(RETURN, ""), "in progress", "a NoneType came, the pair"),
    "returns a list": (ANSWER.replace(RETURN, LISTED), "in progress", "a list came, the pair"),
    "returns NaN": (ANSWER.replace(RETURN, RETURN.replace("joined)", "joined) * float('nan')")), "in progress", "NaN"),
    "async forward": (ANSWER.replace("    def forward", "    async def forward"), "in progress", "a coroutine came"),
    "skips": (in_forward("import pytest; pytest.skip('no')"), "in progress", "ends the check by pytest.skip"),
    "a class that is none": (ANSWER + "\nMultiHeadAttention = 3\n", "in progress", "'int' object is not callable"),
}
GOOD: dict[str, str] = {
    "prints a lot": in_forward("print('x' * 10_000)"),
    "a BOM and CRLF": "\ufeff" + ANSWER.replace("\n", "\r\n"),
    "default dtype at import": ANSWER + "\ntorch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n",
    "threads and seed at import": ANSWER + "\ntorch.set_num_threads(2)\ntorch.manual_seed(5)\n",
    "changes directory": ANSWER + "\nimport os\nos.chdir('/')\n",
    "closes stdout": ANSWER + "\nimport os, sys\nsys.stdout.close()\nos.close(1)\n",
}
# Sizes and masks: what bad files are judged by here, for the sake of time.
SOME = ("1.1", "1.3")
PRINTS = in_forward("print('shape', tuple(query.shape)); print('\\x1b[31mred'); query = query * 2")
# It sleeps, so that the tests beside it have a processor for the ten seconds.
HANGS = in_forward("while mask is not None: __import__('time').sleep(0.01)")


@pytest.fixture(scope="module")
def verdicts(judged: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    bad = {name: text for name, (text, _, _) in BAD.items()}
    verdicts = judged("ex01", {**bad, "prints": PRINTS, "hangs": HANGS}, requirements=SOME)
    return verdicts | judged("ex01", GOOD, "code", "own test")


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_gets_one_clear_reason(verdicts: dict[str, Any], name: str) -> None:
    _, state, says = BAD[name]
    verdict = verdicts[name]
    messages = [result["message"] for result in verdict["results"] if result["outcome"] != "passed"]

    assert verdict["state"] == state
    assert any(says in message for message in messages), f"{says!r} is in none of {messages[:3]}"
    assert not any("Traceback" in message or "harness/" in message for message in messages), messages[:3]
    assert verdict["seconds"] < 15


@pytest.mark.parametrize("name", GOOD)
def test_a_strange_file_with_right_code_keeps_its_points(verdicts: dict[str, Any], name: str) -> None:
    failed = [result for result in verdicts[name]["results"] if result["outcome"] != "passed"]

    assert not [result for result in failed if result["requirement"] != "1.10"], failed[:2]


def test_what_a_failing_check_printed_is_shown(verdicts: dict[str, Any]) -> None:
    failed = [r for r in verdicts["prints"]["results"] if r["outcome"] == "failed"]

    assert "shape (2, 1, 12)" in failed[0]["printed"]
    assert "\x1b" not in failed[0]["printed"] and "?[31mred" in failed[0]["printed"]


def test_a_hang_stops_the_exercise_and_names_the_check(verdicts: dict[str, Any]) -> None:
    verdict = verdicts["hangs"]
    outcomes = [result["outcome"] for result in verdict["results"]]

    assert outcomes.count("timeout") == 1
    at = outcomes.index("timeout")
    assert set(outcomes[:at]) == {"passed"} and set(outcomes[at + 1 :]) == {"missing"}
    timeout = next(result for result in verdict["results"] if result["outcome"] == "timeout")
    assert timeout["message"].startswith("did not end within 10 s: an endless loop")
    assert any(result["message"] == "not run after the hang" for result in verdict["results"])


def test_slowness_ends_too(judged: Callable[..., dict[str, Any]]) -> None:
    verdict = judged("ex01", {"slow": in_forward("import time; time.sleep(0.3)")}, "code", seconds=3.0)["slow"]

    messages = [result["message"] for result in verdict["results"] if result["outcome"] != "passed"]
    assert messages[0].startswith("did not end: the checks of this exercise have taken 3 s together"), messages[0]
    assert set(messages[1:]) == {"not run after the hang"}


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    link, folder, pipe = tmp_path / "link.py", tmp_path / "folder.py", tmp_path / "pipe.py"
    link.symlink_to(EX01.answer_file)
    folder.mkdir()
    os.mkfifo(pipe)

    for path, says in ((link, "is a link"), (folder, "not a regular file"), (pipe, "not a regular file")):
        with pytest.raises(LoadError, match=says):
            read(path)
    with pytest.raises(LoadError, match="no file") as raised:
        read(tmp_path / "nothing.py")
    assert raised.value.missing


@pytest.mark.parametrize("name", ["Ex01_multi_head_attention.py", "ex01_multi_head_attention (1).py", "EX01.py"])
def test_a_file_of_another_name_is_pointed_to(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()

    with pytest.raises(LoadError) as raised:
        read(tmp_path / EX01.file_name)
    assert raised.value.fact == f"no file of this name; {name} is there, rename it"
