"""Judges many texts in one collected session; a request comes on standard input, one line of JSON goes out."""

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
from harness import supervise, verdicts, warm
from harness.specification import exercises


@contextmanager
def folder_of_its_own() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def use(session: pytest.Session) -> int:
    request = json.load(sys.stdin)
    exercise = exercises()[request["exercise"]]
    supervise.LANE_SECONDS = request["lane_seconds"] or supervise.LANE_SECONDS
    judge = supervise.Judge(session)
    judge.read_banks()
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
    print(json.dumps(given))
    return 0


if __name__ == "__main__":
    sys.exit(warm.collected(use))
