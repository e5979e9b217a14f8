"""ci.yml, Dependabot, the issue forms and the rules for people and assistants: valid, least in rights, true."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from harness.model.paths import TOP

TOOLS = Path(sys.executable).parent
GITHUB = TOP / ".github"
CI = GITHUB / "workflows" / "ci.yml"
DIFF = (
    'for starter in checks/ex*/starter.py; do diff "$starter" "exercises/$(basename "$(dirname "$starter")").py"; done'
)
GUARD = "github.event.repository.is_template"


def workflow() -> dict[str, Any]:
    read: dict[str, Any] = YAML(typ="safe").load(CI)
    return read


def commands(job: str) -> list[str]:
    return [step["run"] for step in workflow()["jobs"][job]["steps"] if "run" in step]


@pytest.mark.parametrize(
    ("schema", "path"),
    [
        ("vendor.dependabot", GITHUB / "dependabot.yml"),
        *(("vendor.github-issue-forms", path) for path in sorted(GITHUB.glob("ISSUE_TEMPLATE/*.yml"))),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_github_takes_the_form(schema: str, path: Path) -> None:
    command = [str(TOOLS / "check-jsonschema"), "--builtin-schema", schema, str(path)]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


def test_dependabot_is_as_zizmor_wants_it() -> None:
    command = [str(TOOLS / "zizmor"), "--offline", "--quiet", str(GITHUB / "dependabot.yml")]
    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_proves_everything() -> None:
    jobs = workflow()["jobs"]

    assert jobs["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert commands("test") == [
        DIFF,
        "make setup PYTHON=python",
        "make test",
    ]
    assert jobs["container"]["steps"][-1]["with"] == {"push": "never", "runCmd": "make check SUBMISSION=answers"}
    assert commands("banks") == ["make setup PYTHON=python", "make bank"]


def test_ci_has_the_least_rights() -> None:
    text = CI.read_text()

    assert workflow()["permissions"] == {"contents": "read"}
    assert text.count("permissions:") == 1 and "secrets" not in text
    assert text.count("actions/checkout@") == text.count("persist-credentials: false") == len(workflow()["jobs"])
    assert all("timeout-minutes" in job for job in workflow()["jobs"].values())


@pytest.mark.parametrize(
    ("event", "template", "jobs"),
    [
        ("push", False, set()),
        ("pull_request", False, set()),
        ("schedule", False, set()),
        ("push", True, {"test", "container"}),
        ("schedule", True, {"test", "container", "banks"}),
        ("workflow_dispatch", False, {"test", "container", "banks"}),
    ],
)
def test_ci_runs_by_itself_in_the_template_alone(tmp_path: Path, event: str, template: bool, jobs: set[str]) -> None:
    """act, which plans the run without running it. A branch main is what a push goes to."""
    payload = tmp_path / "event.json"
    payload.write_text(json.dumps({"ref": "refs/heads/main", "repository": {"is_template": template}}))
    repository = tmp_path / "repository"
    (repository / ".github" / "workflows").mkdir(parents=True)
    # The steps do not matter here, and act would fetch the actions.
    text = re.sub(r"( +steps:\n)(?:\n| {6,}.*\n)*", r"\1      - run: echo here\n\n", CI.read_text())
    (repository / ".github" / "workflows" / "ci.yml").write_text(text)
    for arguments in (["init", "--quiet", "--initial-branch=main"], ["add", "--all"], ["commit", "--quiet", "-mx"]):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com"]
        subprocess.run(["git", *identity, *arguments], cwd=repository, check=True)
    command = [
        str(TOOLS / "act"),
        event,
        "--eventpath",
        str(payload),
        "--json",
        "--platform=ubuntu-latest=-self-hosted",
    ]
    environment = {"HOME": str(tmp_path), "PATH": f"{TOOLS}:/usr/local/bin:/usr/bin:/bin"}

    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=60)

    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert {line["jobID"] for line in said if line.get("jobResult") == "success"} == jobs, done.stdout + done.stderr


@pytest.mark.parametrize(
    "name", ["AGENTS.md", ".github/ARCHITECTURE.md", ".github/CONTRIBUTING.md", ".github/copilot-instructions.md"]
)
def test_what_the_documents_name_is_there(name: str) -> None:
    text = (TOP / name).read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    for link in re.findall(r"\]\(([^)]+)\)", text):
        assert (TOP / name).parent.joinpath(link).exists(), link


def test_assistants_are_tutors_where_people_learn() -> None:
    rules = (GITHUB / "copilot-instructions.md").read_text(encoding="utf-8")

    assert ".github/copilot-instructions.md" in (TOP / "AGENTS.md").read_text(encoding="utf-8")
    for line in ("Do not write, complete or paste the body of anything in `exercises/`", "Do not open", "`answers/`"):
        assert line in rules, line


@pytest.mark.parametrize("version", ["3.12", "3.13"])
def test_what_needs_no_torch_runs_on_newer_pythons(version: str, tmp_path: Path) -> None:
    """CI runs all of it on them every week."""
    python = shutil.which(f"python{version}") or ""
    if not python or subprocess.run([python, "-c", ""], capture_output=True).returncode:
        pytest.skip(f"no Python {version} here")
    surroundings = {**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path / "cache"), "PYTHONPATH": str(TOP / "checks")}

    for arguments, code, says in (
        (["-W", "error", "-m", "compileall", "-q", "checks", "answers", "exercises"], 0, ""),
        (["-P", "-m", "harness.overlay", str(TOP), str(tmp_path / "taken")], 0, "Graded by this repository's own"),
        (["-P", "-m", "harness.classroom50"], 2, "classroom50: the path of a gradesheet is wanted"),
        (["-P", "-m", "harness.github", "nowhere.json"], 2, "github: the path of a gradesheet is wanted"),
        (["checks/harness/setup/doctor.py", str(tmp_path)], 1, "!! Python: "),
    ):
        done = subprocess.run([python, *arguments], cwd=TOP, env=surroundings, capture_output=True, text=True)
        assert done.returncode == code and done.stdout.startswith(says), done.stdout + done.stderr
