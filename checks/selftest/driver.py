"""Judges many texts in one collected session of an exercise: each line of JSON that comes in is a request, each that
goes out its answer.

Usage: python -P driver.py EXERCISE
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from harness.model.exercise import Exercise, exercises
from harness.sandbox.hugepages import use_huge_pages

LANE_SECONDS = supervise.LANE_SECONDS


@contextmanager
def folder_of_its_own() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def judge_all(judge: supervise.Judge, exercise: Exercise, request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    supervise.LANE_SECONDS = request["lane_seconds"] or LANE_SECONDS
    given: dict[str, dict[str, Any]] = {}
    for name, text in request["texts"].items():
        with judge.graded() if request["graded"] else folder_of_its_own() as folder:
            (folder / exercise.file_name).write_bytes(bytes.fromhex(text))
            start = time.monotonic()
            results = judge.results(exercise, folder, tuple(request["lanes"]), tuple(request["requirements"]))
            verdict = verdicts.judge(exercise, results, untouched=False)
            given[name] = {"state": verdict.state, "reason": verdict.reason, "seconds": time.monotonic() - start}
            given[name]["score"] = verdict.score
            given[name]["results"] = [asdict(result) for result in results]
    return given


def use(session: pytest.Session) -> int:
    judge, exercise = supervise.Judge(session), exercises()[sys.argv[1]]
    judge.read_banks()
    use_huge_pages()
    for line in sys.stdin:
        print(json.dumps(judge_all(judge, exercise, json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(warm.collected(use, sys.argv[1]))
