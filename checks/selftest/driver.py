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

from harness.model.exercise import Exercise, exercises
from harness.model.results import verdict_of
from harness.runner import session
from harness.runner.judge import Judge, graded
from harness.sandbox.hugepages import use_huge_pages
from harness.testing.check import Check


@contextmanager
def folder_of_its_own() -> Iterator[tuple[Path, None]]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder), None


def judge_all(judge: Judge, exercise: Exercise, request: dict[str, Any]) -> dict[str, dict[str, Any]]:
    options = {"seconds": request["seconds"]} if request["seconds"] else {}
    given: dict[str, dict[str, Any]] = {}
    for name, text in request["texts"].items():
        with graded() if request["graded"] else folder_of_its_own() as (folder, room):
            (folder / exercise.file_name).write_bytes(bytes.fromhex(text))
            start = time.monotonic()
            kinds, requirements = tuple(request["kinds"]), tuple(request["requirements"])
            results = judge.results(exercise, folder, kinds, requirements, room=room, **options)
            verdict = verdict_of(exercise, results, untouched=False)
            given[name] = {"state": verdict.state, "reason": verdict.reason, "seconds": time.monotonic() - start}
            given[name]["score"] = verdict.score
            given[name]["results"] = [asdict(result) for result in results]
    return given


def use(checks: list[Check]) -> int:
    judge, exercise = Judge(checks), exercises()[sys.argv[1]]
    judge.prepare()
    judge.read_banks()
    use_huge_pages()
    for line in sys.stdin:
        print(json.dumps(judge_all(judge, exercise, json.loads(line))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(session.collected(use, sys.argv[1]))
