"""Facts of the repository's own files."""

import re
import subprocess
from pathlib import Path

import pytest

from devtools import rooms
from harness.model.exercise import exercises
from harness.model.paths import TOP
from harness.testing import lint


def test_the_makefile_is_short() -> None:
    assert len((TOP / "Makefile").read_text().splitlines()) < 190


def test_a_moved_clone_works() -> None:
    """Scripts of .venv name their interpreter by its old path; python itself and ruff, a program, do not."""
    named = re.findall(r"\$\(VENV\)/([\w-]+)", (TOP / "Makefile").read_text())

    assert set(named) == {"python", "ruff"}


def test_every_package_is_pinned() -> None:
    for path in TOP.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert line.startswith("#") or re.fullmatch(r"[a-z0-9.-]+==[\d.]+", line), line


def test_harness_modules_are_small() -> None:
    files: dict[Path, int] = {}
    for path in (TOP / "checks" / "harness").rglob("*.py"):
        files[path.parent] = files.get(path.parent, 0) + 1
        assert len(path.read_text().splitlines()) <= 300, f"{path.name} is too long"
    assert max(files.values()) <= 12, files


def test_exercises_start_as_starters() -> None:
    """In the template; a clone with half-done work differs, and that is no fault: only what is committed counts."""
    shown = subprocess.run(["git", "ls-files", "exercises"], cwd=TOP, capture_output=True, text=True)
    if shown.returncode != 0 or not shown.stdout:
        pytest.skip("no git repository here")
    assert set(shown.stdout.split()) >= {f"exercises/{exercise.file_name}" for exercise in exercises().values()}


def test_the_precommit_hooks_leave_exercises_alone() -> None:
    text = (TOP / ".pre-commit-config.yaml").read_text()

    assert text.count("exclude: ^exercises/") == 2 and "--exit-zero" in text and "repo: local" in text


def test_mypys_caches_know_the_packages_that_are_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lint.caches_are_true(), "a rule of the Makefile installs packages and does not run harness.testing.lint"

    monkeypatch.setattr(lint, "FILLED_WITH", tmp_path / "filled-with.txt")
    assert not lint.caches_are_true()
    lint.FILLED_WITH.write_text("torch-1.0.dist-info\n")
    assert not lint.caches_are_true()


def test_a_save_comes_back_to_few_rooms(capsys: pytest.CaptureFixture[str]) -> None:
    assert rooms.main(["1"]) == 0

    stays = re.search(r"(\d+) stays in (\d+) rooms, (\d+) returns\n$", capsys.readouterr().out)
    assert stays and int(stays[2]) == 5 and int(stays[3]) <= 3, stays
