"""The workflows: valid by three validators, and classroom.yml run for real, by act, on five students' repositories."""

import base64
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from devtools.workspace import Workspace
from harness.model.exercise import POINTS, exercises
from harness.model.paths import TOP

TOOLS = Path(sys.executable).parent
WORKFLOWS = sorted((TOP / ".github" / "workflows").glob("*.y*ml"))
CLASSROOM = Path(".github/workflows/classroom.yml")
ACTIONS = Path(__file__).parent / "actions"
# The template of these tests has two exercises, for the sake of time.
KEPT = [exercise for exercise in exercises().values() if exercise.id in ("ex01", "ex02")]
FIRST, SECOND = (exercise.file_name for exercise in KEPT)
MAX_SCORE = sum(POINTS * len(exercise.requirements) for exercise in KEPT)
SPOOF = "::notice title=Autograding complete::Points 100/100"


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
@pytest.mark.parametrize(
    "command",
    [
        ("check-jsonschema", "--builtin-schema", "vendor.github-workflows"),
        ("zizmor", "--offline", "--quiet"),
        ("actionlint", "-shellcheck=", "-pyflakes="),
    ],
    ids=lambda command: command[0],
)
def test_the_validators_find_nothing(command: tuple[str, ...], workflow: Path) -> None:
    done = subprocess.run([TOOLS / command[0], *command[1:], workflow], cwd=TOP, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_commands_hold_no_expressions(workflow: Path) -> None:
    text = workflow.read_text()

    for line in re.findall(r"uses: (.*)", text):
        assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v[\d.]+", line), line
    for block in re.findall(r"^( +)run:((?:.*\n)(?:\1 +.*\n)*)", text, re.MULTILINE):
        assert "${{" not in block[1], block[1]


def test_classroom_keeps_the_shape_that_classroom_tools_look_for() -> None:
    text = (TOP / CLASSROOM).read_text()

    for line in (
        "name: Autograding Tests",
        "on:\n  push:\n  repository_dispatch:\n  workflow_dispatch:\n",
        "permissions:\n  contents: read\n",
        "  run-autograding-tests:\n",
        "    if: github.actor != 'github-classroom[bot]'\n",
        '  TEMPLATE: ""\n',
        '  TEMPLATE_COMMIT: ""\n',
        '  FAIL_ON_MISSING_POINTS: "false"\n',
    ):
        assert line in text, line
    assert text.count("uses: actions/checkout@") == text.count("persist-credentials: false") == 2


@dataclass
class Run:
    """What act said of one run of classroom.yml."""

    green: bool
    said: list[dict[str, Any]]
    artifact: Path

    def commands(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.said if line.get("command") == name]

    def shown(self, name: str) -> list[tuple[dict[str, str], str]]:
        """Properties and data of the errors or notices, read as GitHub's runner does: up to the first `::`. (act reads
        up to the last.)
        """
        lines = [line["raw"].strip().removeprefix(f"::{name} ").partition("::") for line in self.commands(name)]
        return [
            ({key: unescaped(value) for key, value in re.findall(r"(\w+)=([^,]*)", listed)}, unescaped(data))
            for listed, _, data in lines
        ]

    @property
    def summary(self) -> str:
        return "".join(line["content"] for line in self.commands("summary"))

    @property
    def result(self) -> dict[str, Any]:
        (output,) = self.commands("set-output")
        decoded: dict[str, Any] = json.loads(base64.b64decode(output["arg"]))
        return decoded

    @property
    def sheet(self) -> dict[str, Any]:
        read: dict[str, Any] = json.loads((self.artifact / "gradesheet.json").read_text())
        return read

    def agreed_score(self) -> int:
        """The points, which every reader has to show alike."""
        score, result = int(self.sheet["score"]), self.result
        passed = sum(test["status"] == "pass" for test in result["tests"])
        assert result["max_score"] == self.sheet["max_score"] == MAX_SCORE
        assert sum(test["score"] for test in result["tests"]) == score == POINTS * passed
        complete, report = self.shown("notice")
        assert complete == ({"title": "Autograding complete"}, f"Points {score}/{MAX_SCORE}")
        assert report[0] == {"title": "Autograding report"}
        assert json.loads(report[1]) == {"totalPoints": score, "maxPoints": MAX_SCORE}
        assert f"# Gradesheet: {score} of {MAX_SCORE} points\n" in self.summary
        return score


def unescaped(text: str) -> str:
    for token, escape in ((":", "%3A"), (",", "%2C"), ("\r", "%0D"), ("\n", "%0A"), ("%", "%25")):
        text = text.replace(escape, token)
    return text


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=A Student", "-c", "user.email=student@example.com")
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def template(top: Path) -> None:
    """A repository like the template, with the exercises KEPT."""
    workspace = Workspace(top)
    workspace.keep(*(exercise.id for exercise in KEPT))
    git(workspace.top, "init", "--quiet", "--initial-branch=main")
    git(workspace.top, "add", "--all")
    git(workspace.top, "commit", "--quiet", "--message=The template")


def untouched(top: Path) -> None:
    """As made from a template whose teacher has set nothing."""
    workflow = top / CLASSROOM
    workflow.write_text((TOP / CLASSROOM).read_text())


def half(top: Path) -> None:
    """ex01 is answered, ex02 with a mistake; the teacher wants red."""
    shutil.copy(top / "answers" / FIRST, top / "exercises")
    answer = (top / "answers" / SECOND).read_text()
    assert answer.count("torch.cat((-x2, x1)") == 1
    (top / "exercises" / SECOND).write_text(answer.replace("torch.cat((-x2, x1)", "torch.cat((x2, -x1)"))
    workflow = top / CLASSROOM
    workflow.write_text(workflow.read_text().replace('POINTS: "false"', 'POINTS: "true"'))


def done(top: Path) -> None:
    for name in (FIRST, SECOND):
        shutil.copy(top / "answers" / name, top / "exercises")


def tampered(top: Path) -> None:
    """Checks that always pass, a conftest, a link as exercise, and code that writes to what GitHub reads."""
    for path in (top / "checks").glob("ex*/test_*.py"):
        path.write_text(re.sub(r"^    assert .*", "    assert True", path.read_text(), flags=re.MULTILINE))
    (top / "checks" / "harness" / "model" / "results.py").unlink()
    (top / "checks" / "a\n::error::b.py").touch()
    (top / "exercises" / "conftest.py").write_text("import os; os._exit(0)\n")
    (top / "Makefile").write_text("grade:\n\t@echo '::notice title=Autograding complete::Points 100/100'\n")
    (top / "exercises" / FIRST).unlink()
    (top / "exercises" / FIRST).symlink_to(f"../answers/{FIRST}")
    (top / "exercises" / SECOND).write_text(
        f"""import os
print({SPOOF!r}, flush=True)
os.write(1, {SPOOF!r}.encode())
for descriptor in (1, 2):
    try:
        open(f"/proc/{{os.getppid()}}/fd/{{descriptor}}", "w").write("{SPOOF}\\n")
    except OSError:
        pass
for name, text in (
    ("GITHUB_OUTPUT", "result=c3Bvb2Y=\\nspoof<<END\\n"),
    ("GITHUB_ENV", "FAIL_ON_MISSING_POINTS=false\\nSPOOF=1\\n"),
    ("GITHUB_PATH", "/spoof\\n"),
    ("GITHUB_STEP_SUMMARY", "# Gradesheet: 100 of 100 points\\n"),
):
    if name in os.environ:
        open(os.environ[name], "a").write(text)
raise ValueError("Points\\n{SPOOF}\\n##[notice]{SPOOF} | `a` <b>")
"""
    )


def gone(top: Path) -> None:
    """No exercise is left."""
    shutil.rmtree(top / "exercises")


STUDENTS: dict[str, Callable[[Path], None]] = {
    change.__name__: change for change in (untouched, half, done, tampered, gone)
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """The workflow's run on each student's last push, two at a time."""
    stage = tmp_path_factory.mktemp("github")
    owner = stage / "repositories" / "class"
    owner.mkdir(parents=True)
    template(owner / "template")
    commit = git(owner / "template", "rev-parse", "HEAD").strip()
    for name, change in STUDENTS.items():
        top = owner / name
        git(owner, "clone", "--quiet", "template", name)
        git(top, "remote", "set-url", "origin", f"https://github.com/class/{name}")
        text = (top / CLASSROOM).read_text().replace('TEMPLATE: ""', "TEMPLATE: class/template")
        (top / CLASSROOM).write_text(text.replace('TEMPLATE_COMMIT: ""', f"TEMPLATE_COMMIT: {commit}"))
        change(top)
        git(top, "add", "--all")
        git(top, "commit", "--quiet", "--allow-empty", "--message=My work")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(STUDENTS, pool.map(lambda name: act(stage, name), STUDENTS), strict=True))


def act(stage: Path, student: str) -> Run:
    """Runs the workflow of a student's repository on this machine, with stand-ins for the actions that it pins."""
    top, home, artifacts = (stage / folder / student for folder in ("repositories/class", "home", "artifacts"))
    home.mkdir(parents=True)
    artifacts.mkdir(parents=True)
    pins = set(re.findall(r"uses: actions/([\w-]+)@(\w+)", (top / CLASSROOM).read_text()))
    stand_ins = [f"--local-repository=https://github.com/actions/{name}@{pin}={ACTIONS / name}" for name, pin in pins]
    shared = {
        "REPOSITORIES": stage / "repositories",
        "ARTIFACTS": artifacts,
        "VENV": str(TOOLS).replace(" ", "\\ "),
        "TYPES": TOP / "build" / "mypy",
    }
    command = [
        str(TOOLS / "act"),
        "push",
        f"--workflows={CLASSROOM}",
        "--platform=ubuntu-latest=-self-hosted",
        "--json",
    ]
    options = ["--no-skip-checkout", "--no-cache-server", *(f"--env={name}={value}" for name, value in shared.items())]
    environment = {"HOME": str(home), "PATH": f"{TOOLS}:/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
    ended = subprocess.run(
        [*command, *options, *stand_ins], cwd=top, env=environment, capture_output=True, text=True, timeout=300
    )
    said = [json.loads(line) for line in ended.stdout.splitlines() if line.startswith("{")]
    assert said, ended.stdout + ended.stderr
    return Run(ended.returncode == 0, said, artifacts / "gradesheet")


def test_an_untouched_repository_is_green_and_has_no_points(runs: dict[str, Run]) -> None:
    run = runs["untouched"]

    assert run.green and run.agreed_score() == 0
    assert {one["state"] for one in run.sheet["exercises"]} == {"not started"}
    assert run.commands("error") == []


def test_without_a_template_the_summary_says_that_nothing_protected_the_checks(runs: dict[str, Run]) -> None:
    assert runs["untouched"].summary.startswith("Graded by this repository's own checks, at `")
    assert "**nothing protected the checks**" in runs["untouched"].summary
    assert all("nothing protected" not in runs[name].summary for name in ("half", "done", "tampered"))


def test_half_done_work_is_annotated_and_red_where_the_teacher_says_so(runs: dict[str, Run]) -> None:
    run = runs["half"]
    first, second = run.sheet["exercises"]

    score = run.agreed_score()
    assert first["score"] == first["max_score"] and 0 < second["score"] < second["max_score"]
    assert not run.green
    says = f"{MAX_SCORE - score} of {MAX_SCORE} points are missing; FAIL_ON_MISSING_POINTS makes this a failure"
    assert any(line["msg"].strip() == says for line in run.said)
    place, message = run.shown("error")[0]
    assert place["file"] == f"exercises/{SECOND}" and place["title"].startswith("2.1 ")
    line = (TOP / "answers" / SECOND).read_text().splitlines()[int(place["line"]) - 1]
    assert "def rotate_half" in line and message.startswith("rotate_half("), (line, message)
    assert len(run.commands("error")) == sum(
        any(check["outcome"] != "passed" for check in one["checks"]) for one in second["requirements"]
    )
    assert "Not as in" not in run.summary


def test_all_done_is_green_with_every_point(runs: dict[str, Run]) -> None:
    run = runs["done"]

    assert run.green and run.agreed_score() == MAX_SCORE and run.result["status"] == "pass"
    assert run.commands("error") == []
    assert re.match(r"Graded by the checks of `class/template` at `[0-9a-f]{40}`\.\n\n# Gradesheet", run.summary)


def test_tampering_gains_nothing_and_is_stated(runs: dict[str, Run]) -> None:
    run = runs["tampered"]

    assert run.green and run.agreed_score() == 0
    first, second = run.sheet["exercises"]
    assert (first["state"], first["reason"]) == ("not started", "no file")
    assert second["state"] == "does not import"
    for line in (
        "- `exercises/conftest.py: is no exercise; not copied`",
        f"- `exercises/{FIRST}: is a link; not copied`",
        "Not as in `class/template`, and not used for grading:",
        "- `Makefile` changed",
        "- `checks/a; ::error::b.py` added",
        "- `checks/harness/model/results.py` missing",
        f"- `checks/{FIRST.removesuffix('.py')}/test_low_precision.py` changed",
    ):
        assert f"\n{line}\n" in run.summary, run.summary
    assert str(CLASSROOM) not in run.summary
    ((place, message),) = run.shown("error")
    assert place == {"file": f"exercises/{SECOND}", "line": "17", "title": "ex02 does not import"}, place
    assert message.startswith(f"ValueError: Points\n{SPOOF}\n"), message
    assert "100 of 100" not in run.summary
    assert not any(line.get("name") == "SPOOF" or line.get("arg") == "/spoof" for line in run.said)


def test_a_repository_without_exercises_earns_nothing_and_says_why(runs: dict[str, Run]) -> None:
    run = runs["gone"]

    assert run.green and run.artifact.exists()
    assert any(message.startswith("Points 0/") for _, message in run.shown("notice"))
    assert any("holds no exercise" in line["msg"] for line in run.said)
    assert "- `exercises: is no folder; nothing was copied`\n" in run.summary
