"""What is taken out of a student's repository, and what is said about the rest."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from devtools.workspace import Workspace
from harness.commands.collect import WORKFLOW, Difference, copy, differences, report
from harness.model.exercise import exercises
from harness.model.paths import TOP

FIRST, SECOND, THIRD, *_ = (exercise.file_name for exercise in exercises().values())


def test_only_exercises_that_are_regular_files_are_copied(tmp_path: Path) -> None:
    folder = tmp_path / "student" / "exercises"
    folder.mkdir(parents=True)
    (folder / FIRST).write_text("mine\n")
    (folder / SECOND).symlink_to(folder / FIRST)
    (folder / THIRD).mkdir()
    (folder / "torch.py").touch()
    (folder / "notes.txt").touch()

    left = copy(tmp_path / "student", tmp_path / "submission")

    assert [path.name for path in (tmp_path / "submission").iterdir()] == [FIRST]
    assert (tmp_path / "submission" / FIRST).read_text() == "mine\n"
    assert left == [
        f"exercises/{SECOND}: is a link; not copied",
        f"exercises/{THIRD}: is no regular file; not copied",
        "exercises/torch.py: is no exercise; not copied",
    ]


def test_pipes_and_large_files_stay(tmp_path: Path) -> None:
    folder = tmp_path / "exercises"
    folder.mkdir()
    os.mkfifo(folder / FIRST)
    (folder / SECOND).write_bytes(b"#" * 1_000_001)

    left = copy(tmp_path, tmp_path / "submission")

    assert left == [
        f"exercises/{FIRST}: is no regular file; not copied",
        f"exercises/{SECOND}: is 1,000,001 bytes long; at most 1,000,000 are copied",
    ]
    assert not list((tmp_path / "submission").iterdir())


def test_a_link_in_place_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "exercises").symlink_to(TOP / "answers")

    assert copy(tmp_path, tmp_path / "submission") == ["exercises: is no folder; nothing was copied"]
    assert not list((tmp_path / "submission").iterdir())


def test_an_old_submission_is_never_mixed_in(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError):
        copy(TOP, tmp_path)


@pytest.fixture
def template(workspace: Workspace, tmp_path: Path) -> Path:
    """A second copy of the workspace."""
    return shutil.copytree(workspace.top, tmp_path / "template", symlinks=True)


def test_differences_are_changed_added_and_missing_files(workspace: Workspace, template: Path) -> None:
    top = workspace.top
    assert differences(top, template) == []

    (top / "checks" / "conftest.py").write_text("")
    (top / "checks" / "harness" / "extra.py").touch()
    (top / "checks" / "harness" / "model" / "results.py").unlink()
    board = "checks/harness/report/terminal.py"
    (top / board).unlink()
    (top / board).symlink_to(TOP / board)
    (top / "requirements-more.txt").touch()
    (top / "README.md").write_text("mine")
    (top / "exercises" / FIRST).write_text("mine")
    (top / "checks" / "harness" / "__pycache__").mkdir(exist_ok=True)
    (top / "checks" / "harness" / "__pycache__" / "x.pyc").touch()

    assert differences(top, template) == [
        Difference("checks/conftest.py", "changed"),
        Difference("checks/harness/extra.py", "added"),
        Difference("checks/harness/model/results.py", "missing"),
        Difference("checks/harness/report/terminal.py", "changed"),
        Difference("requirements-more.txt", "added"),
    ]


def test_the_teachers_settings_are_no_difference_and_anything_else_is(workspace: Workspace, template: Path) -> None:
    path = workspace.top / WORKFLOW
    text = path.read_text()
    path.write_text(text.replace('TEMPLATE: ""', "TEMPLATE: owner/name").replace('COMMIT: ""', "COMMIT: abc"))
    assert differences(workspace.top, template) == []

    path.write_text(text.replace("contents: read", "contents: write"))
    assert differences(workspace.top, template) == [Difference(WORKFLOW, "changed")]


def test_an_edition_without_banks_is_no_difference(workspace: Workspace, template: Path) -> None:
    for folder in ("mistakes", "variants"):
        for path in sorted((workspace.top / "checks" / folder).rglob("*.py")):
            path.unlink()

    assert differences(workspace.top, template) == []


def test_the_report_states_who_graded_and_what_differs() -> None:
    found = [Difference(f"checks/x{i:02d}.py", "added") for i in range(22)]

    assert report("owner/name", "abc", [], []) == "Graded by the checks of `owner/name` at `abc`.\n\n"
    assert report("owner/name", "abc", ["exercises/a`\n##[x]: is a link"], found).splitlines()[2:7] == [
        "- `exercises/a'; ## [x]: is a link`",
        "",
        "Not as in `owner/name`, and not used for grading:",
        "",
        "- `checks/x00.py` added",
    ]
    assert report("owner/name", "abc", [], found).endswith("- `checks/x19.py` added\n- and 2 more\n\n")
    assert "**nothing protected the checks**" in report("", "abc", [], [])


def test_it_runs_before_anything_is_installed(tmp_path: Path) -> None:
    """The standard library does; -I keeps the environment's packages out, as on a fresh machine."""
    summary = tmp_path / "summary.md"
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from harness import overlay; overlay.main(sys.argv[1:])"
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, (TOP / "checks", TOP, tmp_path / "submission"))]
    environment = {**os.environ, "TEMPLATE": "owner/name", "GITHUB_STEP_SUMMARY": str(summary)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Graded by the checks of `owner/name` at `") and summary.read_text() == done.stdout
    assert {path.name for path in (tmp_path / "submission").iterdir()} >= {FIRST, SECOND, THIRD}
