"""The workspace as people open it: the dev container, VS Code's settings and tasks, and the trial of
`make test-container`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import json5
import pytest

from devtools import container
from devtools.workspace import Workspace
from harness.model.exercise import exercises
from harness.model.paths import TOP
from selftest.written import node_id, written

TOOLS = Path(sys.executable).parent
SCHEMA = Path(__file__).parent / "schemas" / "devContainer.base.schema.json"
CONTAINER = TOP / ".devcontainer" / "devcontainer.json"
CODE = TOP / ".vscode"
FILE = "ex01_multi_head_attention.py"


def read(path: Path) -> Any:
    return json5.loads(path.read_text(encoding="utf-8"))


def vscode() -> dict[str, Any]:
    """What the container asks of VS Code."""
    found: dict[str, Any] = read(CONTAINER)["customizations"]["vscode"]
    return found


def test_the_container_keeps_the_specification() -> None:
    command = [
        str(TOOLS / "check-jsonschema"),
        "--schemafile",
        str(SCHEMA),
        "--force-filetype",
        "json5",
        str(CONTAINER),
    ]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_container_takes_a_gpu_and_needs_none() -> None:
    settings = read(CONTAINER)

    assert settings["hostRequirements"] == {"gpu": "optional"}
    assert settings["runArgs"] == ["--shm-size=2g"]
    assert settings["containerEnv"] == {"NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    assert [path.name for path in CONTAINER.parent.iterdir()] == ["devcontainer.json"]


def test_the_image_is_named_in_full_and_has_the_tested_python() -> None:
    image = read(CONTAINER)["image"]
    (oldest,) = re.findall(r'^target-version = "py3(\d+)"', (TOP / "pyproject.toml").read_text(), re.MULTILINE)

    assert image == f"mcr.microsoft.com/devcontainers/python:3-3.{oldest}-bookworm"


def test_set_up_is_makes_in_the_stage_that_prebuilds_run() -> None:
    settings = read(CONTAINER)
    commands = {name: command for name, command in settings.items() if name.endswith("Command")}

    assert commands == {"updateContentCommand": "make setup", "postAttachCommand": "make board"}
    assert settings["waitFor"] == "updateContentCommand"


def test_the_files_that_open_are_there() -> None:
    opened = read(CONTAINER)["customizations"]["codespaces"]["openFiles"]

    assert opened == ["README.md", f"exercises/{FILE}"]
    assert all((TOP / name).is_file() for name in opened)


def test_plain_clones_get_the_container_s_settings_and_extensions() -> None:
    assert vscode()["settings"] == read(CODE / "settings.json")
    assert vscode()["extensions"] == read(CODE / "extensions.json")["recommendations"]
    assert set(vscode()["extensions"]) == {
        "ms-python.python",
        "ms-python.vscode-pylance",
        "charliermarsh.ruff",
        "ms-python.mypy-type-checker",
    }
    assert {path.name for path in CODE.iterdir()} == {"settings.json", "extensions.json", "tasks.json"}


def test_the_settings_find_checks_and_hide_answers() -> None:
    settings = vscode()["settings"]

    assert settings["python.testing.pytestEnabled"] is True
    assert settings["python.defaultInterpreterPath"] == "${workspaceFolder}/.venv/bin/python"
    assert settings["[python]"] == {
        "editor.defaultFormatter": "charliermarsh.ruff",
        "editor.formatOnSave": True,
        # What is to be learned is not completed; the chat stays.
        "editor.inlineSuggest.enabled": False,
    }
    assert settings["github.copilot.enable"] == {"*": True, "python": False}
    assert settings["search.exclude"]["checks/*/hints.md"] and settings["search.exclude"]["checks/*/patterns.json"]
    assert settings["search.exclude"]["answers"] and settings["files.watcherExclude"]["**/answers/**"]
    # What stands alone after an option is lost when the Test Explorer runs single checks.
    assert all("=" in word for word in settings["python.testing.pytestArgs"] if word.startswith("-"))


def test_the_test_explorer_lists_every_check(workspace: Workspace) -> None:
    """With exactly the arguments of the settings, and one broken exercise."""
    (workspace.top / "exercises" / FILE).write_text("def broken(:\n")
    arguments = ["--collect-only", "-q", *vscode()["settings"]["python.testing.pytestArgs"]]
    command = [sys.executable, "-W", "ignore", "-m", "pytest", *arguments, f"--rootdir={workspace.top}"]
    done = subprocess.run(command, cwd=workspace.top, capture_output=True, text=True, timeout=120)

    assert done.returncode == 0, done.stdout + done.stderr
    functions = {line.partition("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert functions == {
        f"checks/{node_id(exercise, name)}" for exercise in exercises().values() for name in written(exercise)
    }


def test_the_problem_matcher_takes_the_lines_of_the_watch_and_the_board_ends_well(workspace: Workspace) -> None:
    """The watch's own output on a broken exercise; then the board, which fails for no verdict."""
    watch, check = read(CODE / "tasks.json")["tasks"]
    assert watch["command"] == "make watch" and watch["isBackground"] is True
    assert watch["group"] == {"kind": "build", "isDefault": True}
    assert check["problemMatcher"]["pattern"] == watch["problemMatcher"]["pattern"]
    pattern, background = watch["problemMatcher"]["pattern"], watch["problemMatcher"]["background"]
    (workspace.top / "exercises" / FILE).write_text('"""Mine."""\n\ndef broken(:\n')

    saved = subprocess.run(
        [sys.executable, "-P", "-W", "ignore", "-m", "harness", "save", "--ex", "1"],
        cwd=workspace.top,
        env={**os.environ, "PYTHONPATH": str(workspace.top / "checks")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    board = workspace.make("board", "EX=1")

    lines = saved.stdout.splitlines()
    begins = [n for n, line in enumerate(lines) if re.search(background["beginsPattern"], line)]
    ends = [n for n, line in enumerate(lines) if re.search(background["endsPattern"], line)]
    ((at, match),) = [(n, found) for n, line in enumerate(lines) if (found := re.search(pattern["regexp"], line))]
    assert (begins, ends) == ([0], [len(lines) - 1]) and 0 < at < len(lines) - 1, saved.stdout
    assert match[pattern["file"]] == f"exercises/{FILE}" and match[pattern["line"]] == "3"
    assert match[pattern["message"]] == "SyntaxError: invalid syntax", match[0]
    assert board.returncode == 0 and "does not import" in board.stdout, board.stdout
    assert re.search(r"judged nothing new in [\d.]+ s; make watch judges every save\n$", board.stdout), board.stdout


def test_an_environment_that_does_not_run_here_is_made_anew(workspace: Workspace) -> None:
    """As of a clone that was set up on the machine and is then opened in the container."""
    kept = workspace.make("--dry-run", "setup").stdout
    done = subprocess.run(["make", "--dry-run", "setup"], cwd=workspace.top, capture_output=True, text=True)

    assert "install.py" not in kept and "install.py" in done.stdout, kept + done.stdout


def program(folder: Path, name: str, text: str, interpreter: str = "/bin/sh") -> None:
    path = folder / name
    path.write_text(f"#!{interpreter}\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH: git alone."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program(folder, "git", f'PATH={os.environ["PATH"]} exec git "$@"')
    monkeypatch.setenv("PATH", str(folder))
    return folder


def test_the_trial_says_what_is_missing(programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for name, text in (("docker", "echo no daemon >&2; exit 1"), ("npx", "exit 9")):
        assert container.main() == 1
        said.append(capsys.readouterr().out)
        program(programs, name, text)
    assert container.main() == 1
    said.append(capsys.readouterr().out)

    assert said == [
        "test-container: docker is not there; install Docker\n",
        "test-container: npx is not there; install Node 20 or newer\n",
        "test-container: docker does not answer (no daemon); start Docker\n",
    ]


CLI = """
import sys
from pathlib import Path

workspace, stamp = Path(sys.argv[5]), Path(sys.argv[5], ".venv", "ready")
with open(LOG, "a") as log:
    print(*sys.argv[1:], file=log)
assert (workspace / "Makefile").exists()
if "--prebuild" in sys.argv:
    stamp.parent.mkdir()
    stamp.touch()
"""


def test_the_trial_goes_through_the_lifecycle_and_removes_what_it_made(
    programs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """With stand-ins for the CLI, which sets up, and for Docker, which has one container."""
    log = tmp_path / "log"
    program(programs, "docker", f'echo "docker $1 $2" >> {log}; [ "$1" != ps ] || echo 1234 vsc-workspace-5678-uid')
    program(programs, "npx", CLI.replace("LOG", repr(str(log))), sys.executable)

    assert container.main() == 0, capfd.readouterr().out
    lines = [re.sub(r"/\S+/workspace", "W", line) for line in log.read_text().splitlines()]
    cli = f"--yes {container.CLI}"
    assert lines == [
        "docker info ",
        f"{cli} up --workspace-folder W --prebuild",
        f"{cli} up --workspace-folder W",
        f"{cli} exec --workspace-folder W make check SUBMISSION=answers",
        "docker ps --all",
        "docker rm --force",
        "docker rmi vsc-workspace-5678-uid",
    ]


def test_the_trial_fails_where_the_prebuild_sets_nothing_up(programs: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program(programs, "docker", "")
    program(programs, "npx", "")

    assert container.main() == 1
    assert "the prebuild has not set the workspace up" in capfd.readouterr().out
