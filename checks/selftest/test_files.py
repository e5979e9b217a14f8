"""Facts of the repository's own files."""

import re
import subprocess
import sys

import pytest
from harness import lint
from harness.specification import TOP, exercises


def test_the_makefile_is_short() -> None:
    assert len((TOP / "Makefile").read_text().splitlines()) < 130


def test_every_package_is_pinned() -> None:
    for path in TOP.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[a-z0-9-]+==[\d.]+", line), line


def test_harness_modules_are_small() -> None:
    for path in (TOP / "checks" / "harness").glob("*.py"):
        assert len(path.read_text().splitlines()) <= 280, f"{path.name} wants a reason"


def test_exercises_start_as_starters() -> None:
    """In the template; a clone with half-done work differs, and that is no fault: only what is committed counts."""
    shown = subprocess.run(["git", "ls-files", "exercises"], cwd=TOP, capture_output=True, text=True)
    if shown.returncode != 0 or not shown.stdout:
        pytest.skip("no git repository here")
    assert set(shown.stdout.split()) >= {f"exercises/{exercise.file_name}" for exercise in exercises().values()}


def test_the_precommit_hooks_leave_exercises_alone() -> None:
    text = (TOP / ".pre-commit-config.yaml").read_text()

    assert text.count("exclude: ^exercises/") == 2 and "--exit-zero" in text and "repo: local" in text


def test_mypy_reads_nothing_that_may_be_installed_later() -> None:
    """What torch imports where it is there: were it read, each installation would make mypy's caches start over."""
    answer = next(iter(exercises().values())).answer_file
    command = [sys.executable, "-m", "mypy", *lint.options(lint.PLAIN_CACHE), "--verbose", str(answer)]

    done = subprocess.run(command, cwd=TOP, capture_output=True, text=True, timeout=120)

    read = set(re.findall(r"for \S+: file \S+/site-packages/(\w+)", done.stderr))
    assert read == {"torch", "mypy", "filelock"}, read
