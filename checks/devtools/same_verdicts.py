"""Proves that a change which moves things changes no verdict: stores what every text of every bank earns, and compares
later.

Usage:
    python -P -m devtools.same_verdicts (store|compare) FILE [--sample N] [--seed S] [EX …]

A text is the starter, the answer, a variant or a mistake. Of each are kept its score, its state, and the outcome and
message of every check that did not pass, with line numbers and addresses masked. `store` judges everything twice and
leaves out what differs. `compare` names every text whose verdict is another one now, and every text that has gone;
`--sample` takes N mistakes per exercise only.
"""

import argparse
import json
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.progress import track

from harness.model import bank
from harness.model.cache import Entry, OwnTests
from harness.model.exercise import Exercise, selected
from harness.runner import session
from harness.runner.judge import Judge
from harness.testing import lint
from harness.testing.check import Check

Verdict = dict[str, Any]
_MASKED = (
    (re.compile(r"0x[0-9a-f]+"), "0x…"),
    (re.compile(r"(line |\.py:)\d+"), r"\1…"),
    (re.compile(r"\b\d+\.\d+ s\b"), "… s"),
    (re.compile(r"/tmp/\w+"), "/tmp/…"),
)


def texts(exercise: Exercise, sample: int, seed: int) -> dict[str, str]:
    """The texts of an exercise's bank by name, the answer's first: all of them, or `sample` of its mistakes only."""
    answer = bank.answer(exercise)
    found = {"answer": answer, "starter": exercise.starter}
    found |= {f"variant {name}": bank.right_code(exercise, name) for name in exercise.variant_files}
    mistakes = bank.mistakes(exercise)
    drawn = random.Random(seed).sample(sorted(mistakes), min(sample or len(mistakes), len(mistakes)))
    return found | {f"mistake {name}": mistakes[name].applied_to(answer) for name in drawn}


def judged(judge: Judge, exercise: Exercise, chosen: dict[str, str]) -> Iterator[tuple[str, Verdict]]:
    """The verdict on each text. The same own test is judged once."""
    own_tests = OwnTests()
    for name, text in track(chosen.items(), exercise.id, transient=True):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / exercise.file_name).write_text(text, encoding="utf-8")
            entry = judge.judge(exercise, Path(folder), own_tests)
        yield name, _verdict(exercise, entry)


def _verdict(exercise: Exercise, entry: Entry) -> Verdict:
    verdict = entry.verdict(exercise)
    counts: dict[str, int] = {}
    for result in entry.results:
        counts[result.requirement] = counts.get(result.requirement, 0) + 1
    failed = [
        [result.requirement, result.name, result.outcome, _masked(result.message)]
        for result in entry.results
        if result.outcome != "passed"
    ]
    return {"score": verdict.score, "state": verdict.state, "checks": counts, "failed": sorted(failed)}


def _masked(message: str) -> str:
    for pattern, stand_in in _MASKED:
        message = pattern.sub(stand_in, message)
    return message


def store(judge: Judge, chosen: list[Exercise], file: Path, sample: int, seed: int) -> int:
    """Judges every text twice and writes what both times said."""
    stored: dict[str, dict[str, Verdict]] = {}
    for exercise in chosen:
        one, two = (dict(judged(judge, exercise, texts(exercise, sample, seed))) for _ in range(2))
        stored[exercise.id] = {name: verdict for name, verdict in one.items() if two[name] == verdict}
        for name in one:
            if name not in stored[exercise.id]:
                print(f"{exercise.id} {name}: left out, since two runs differ: {_difference(one[name], two[name])}")
        print(f"{exercise.id}: {len(stored[exercise.id])} of {len(one)} texts stored", flush=True)
        file.write_text(json.dumps(stored, indent=0), encoding="utf-8")
    return 0


def compare(judge: Judge, chosen: list[Exercise], file: Path, sample: int, seed: int) -> int:
    """Judges the texts again; 1 if one of them has another verdict, is new, or has gone."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    problems = 0
    for exercise in chosen:
        before, there = stored[exercise.id], texts(exercise, sample, seed)
        for name in sorted(before.keys() - texts(exercise, 0, seed).keys()):
            problems += 1
            print(f"{exercise.id} {name}: is gone")
        for name, verdict in judged(judge, exercise, there):
            if name not in before:
                print(f"{exercise.id} {name}: has no stored verdict")
            elif verdict != before[name]:
                problems += 1
                print(f"{exercise.id} {name}: {_difference(before[name], verdict)}")
        print(f"{exercise.id}: {len(there)} texts compared", flush=True)
    print(f"{problems} differ")
    return 1 if problems else 0


def _difference(before: Verdict, after: Verdict) -> str:
    facts = [
        f"{key} {before[key]} -> {after[key]}" for key in ("score", "state", "checks") if before[key] != after[key]
    ]
    facts += [f"no longer {check}" for check in before["failed"] if check not in after["failed"]]
    facts += [f"now {check}" for check in after["failed"] if check not in before["failed"]]
    return "; ".join(facts[:6])


def main(arguments: list[str]) -> int:
    """Collects the checks and runs the command on them."""
    parser = argparse.ArgumentParser(prog="same_verdicts", description=__doc__)
    parser.add_argument("command", choices=["store", "compare"])
    parser.add_argument("file", type=Path)
    parser.add_argument("exercises", nargs="*")
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_intermixed_args(arguments)
    chosen = [exercise for ex in options.exercises or [""] for exercise in selected(ex)]
    os.environ["EXERCISES_MYPY_DAEMON"] = "1"
    lint.start_mypy_daemon()

    def use(checks: list[Check]) -> int:
        judge = Judge(checks)
        if options.command == "store":
            return store(judge, chosen, options.file, options.sample, options.seed)
        return compare(judge, chosen, options.file, options.sample, options.seed)

    try:
        return session.collected(use)
    finally:
        lint.stop_mypy_daemon()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
