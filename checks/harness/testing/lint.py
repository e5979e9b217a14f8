"""What "reads well" asks: ruff and mypy find nothing in a learner's file, under the project's settings whatever the
file says.

Usage: python -P -m harness.testing.lint [daemon], which fills mypy's caches where that is due, and then starts its
daemon.
"""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from mypy.api import run_dmypy
from ruff import find_ruff_bin

from harness.model.exercise import Exercise
from harness.model.limits import LATER, MYPY_DAEMON_IDLE_SECONDS, MYPY_DAEMON_SECONDS, MYPY_SECONDS
from harness.model.paths import BUILD, TOP, write_whole
from harness.model.source import public_names
from harness.model.submission import read

SETTINGS = TOP / "pyproject.toml"
# The daemon's cache holds dependencies between definitions too; several mypys that wrote one such cache at once would
# each start it over.
PLAIN_CACHE, DAEMON_CACHE, FINE = BUILD / "mypy", BUILD / "mypy-daemon", ("--cache-fine-grained",)
FILLED_WITH = DAEMON_CACHE / "filled-with.txt"
DAEMON_FILE = BUILD / "dmypy.json"
_RULES = "E,W,B,D101,D103,D419"
_DOCSTRING_CODES = ("D101", "D103", "D419")
_BLANKET = re.compile(
    r"#\s*(?:(?:ruff|flake8)\s*:\s*(?:noqa|disable)|mypy\s*:\s*\S+|type\s*:\s*ignore(?!\[))|@(?:typing\.)?no_type_check\b"
)


# Findings that right code runs into, and the way out.
_WAYS_OUT = (
    (
        re.compile(r"B023|Cannot infer type of lambda"),
        "bind it by functools.partial, or define a function that takes it",
    ),
    (re.compile(r"Tensor \| Module"), "name the buffer in the class: `inv_freq: Tensor` above __init__"),
)


class LintError(AssertionError):
    """Findings in a learner's file; `line` is the first one's."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


def ruff(path: Path, exercise: Exercise) -> None:
    """Fails with what ruff finds: E, F, W, B, and a missing or empty docstring (D101, D103, D419) of a name that the
    starter lacks.
    """
    text = read(path)
    findings = [
        (number, f"{blanket[0].strip()} silences more than it names; name the one rule on the one line")
        for number, line in enumerate(text.splitlines(), start=1)
        if (blanket := _BLANKET.search(line))
    ]
    given = public_names(exercise.starter)
    found = _ruff(path, f"{_RULES},F")
    if "noqa" in text:
        found = _ruff(path, _RULES) + _ruff(path, "F", "--ignore-noqa")
    findings += [
        (row, f"{code} {message}")
        for row, code, message in found
        if not (code in _DOCSTRING_CODES and _name_at(text, row) in given)
    ]
    _fail_on(findings, path, "ruff")


def mypy(path: Path) -> None:
    """Fails with what mypy finds. With its daemon, which `make watch` starts, this takes a tenth of a second."""
    read(path)
    found = _mypy_daemon(path) if DAEMON_FILE.exists() and os.environ.get("EXERCISES_MYPY_DAEMON") else None
    if found is None:
        found = _run([sys.executable, "-P", "-m", "mypy", *options(PLAIN_CACHE), str(path)])
    code, output = found
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    found_here = [row for row in rows if row["severity"] == "error" and Path(row["file"]).name == path.name]
    findings = [(row["line"], f"{row['message']}  [{row['code'] or 'error'}]") for row in found_here]
    if code and not findings:
        raise RuntimeError(f"mypy failed, or found errors elsewhere: {output.strip()[-500:]}")
    _fail_on(findings, path, "mypy")


def start_mypy_daemon() -> None:
    """Starts mypy's daemon for the exercises and lets it read torch's types; returns at once."""
    subprocess.Popen(
        _daemon_command() if caches_are_true() else [sys.executable, "-P", "-m", "harness.testing.lint", "daemon"],
        preexec_fn=lambda: os.nice(LATER),
        cwd=TOP,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def caches_are_true() -> bool:
    """Whether the caches were filled with today's settings and packages. torch imports some packages where they are
    there, and the daemon, which never writes a cache, would take minutes at each start to see that they have come.
    """
    return FILLED_WITH.exists() and FILLED_WITH.read_text(encoding="utf-8") == _surroundings()


def fill_caches() -> bool:
    """Has mypy read torch's types once for each cache, side by side; False if it fails."""
    commands = [[*options(PLAIN_CACHE), _torch_alone()], [*options(DAEMON_CACHE), *FINE, _torch_alone()]]
    running = [subprocess.Popen([sys.executable, "-P", "-m", "mypy", *command], cwd=TOP) for command in commands]
    filled = [process.wait() == 0 for process in running]
    if all(filled):
        FILLED_WITH.write_text(_surroundings(), encoding="utf-8")
    return all(filled)


def _surroundings() -> str:
    packages = sorted(path.name for path in Path(sysconfig.get_path("purelib")).glob("*.dist-info"))
    return "\n".join([*packages, SETTINGS.read_text(encoding="utf-8")])


def _torch_alone() -> str:
    """A file that imports torch: with it mypy reads what exercises stand on."""
    path = BUILD / "imports_torch.py"
    if not path.exists():
        write_whole(path, "import torch  # noqa: F401\n")
    return str(path)


def _daemon_command() -> list[str]:
    command = [sys.executable, "-m", "mypy.dmypy", "--status-file", str(DAEMON_FILE), "run"]
    command += ["--timeout", str(MYPY_DAEMON_IDLE_SECONDS), "--"]
    return [*command, *options(DAEMON_CACHE), *FINE, "--use-fine-grained-cache", _torch_alone()]


def mypy_daemon() -> int:
    """The pid of mypy's daemon, 0 if none runs."""
    try:
        return int(json.loads(DAEMON_FILE.read_text(encoding="utf-8"))["pid"])
    except (OSError, ValueError, KeyError):
        return 0


def stop_mypy_daemon(pid: int = 0) -> None:
    """Ends mypy's daemon: the one that its file names, else `pid`, since the file may have been removed."""
    if daemon := mypy_daemon() or pid:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(daemon, signal.SIGKILL)
        DAEMON_FILE.unlink(missing_ok=True)


def options(cache: Path) -> list[str]:
    """mypy's command line for exercises."""
    shown = ["--output", "json", "--no-error-summary", "--hide-error-context"]
    return ["--config-file", str(SETTINGS), "--cache-dir", str(cache), *shown]


def _mypy_daemon(path: Path) -> tuple[int, str] | None:
    """What the daemon says; None if it does not run, or is busy for longer than mypy itself would take."""

    def waited(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, waited)
    signal.setitimer(signal.ITIMER_REAL, MYPY_DAEMON_SECONDS)
    try:
        # With a file that imports torch among its sources the daemon keeps torch, whatever the exercise imports.
        files = [str(path), _torch_alone()]
        report, trouble, code = run_dmypy(["--status-file", str(DAEMON_FILE), "check", "--", *files])
    except TimeoutError:
        stop_mypy_daemon()
        start_mypy_daemon()
        return None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    output = report or trouble
    return (code, output) if code in (0, 1) and "Daemon" not in output else None


def _ruff(path: Path, rules: str, *options: str) -> list[tuple[int, str, str]]:
    settings = ["--isolated", "--line-length", "120", "--target-version", "py311", "--no-cache"]
    command = [find_ruff_bin(), "check", *settings, "--output-format", "json", "--select", rules, *options, str(path)]
    code, output = _run(command)
    if code not in (0, 1):
        raise RuntimeError(f"ruff itself failed: {output.strip()[-500:]}")
    return [(item["location"]["row"], item["code"] or "syntax", item["message"]) for item in json.loads(output)]


def _run(command: list[str]) -> tuple[int, str]:
    done = subprocess.run(
        command, cwd=TOP, capture_output=True, text=True, timeout=MYPY_SECONDS, stdin=subprocess.DEVNULL
    )
    return done.returncode, done.stdout or done.stderr


def _name_at(text: str, row: int) -> str:
    kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return next((node.name for node in ast.parse(text).body if isinstance(node, kinds) and node.lineno == row), "")


def _fail_on(findings: list[tuple[int, str]], path: Path, tool: str) -> None:
    if not findings:
        return
    findings.sort(key=lambda finding: finding[0])
    shown = [f"line {line}: {fact}" for line, fact in findings[:5]]
    shown += [f"  {way}" for found, way in _WAYS_OUT if any(found.search(fact) for _, fact in findings)]
    rest = [f"and {len(findings) - 5} more"] if len(findings) > 5 else []
    count = "1 finding" if len(findings) == 1 else f"{len(findings)} findings"
    raise LintError("\n".join([f"{tool}: {count} in {path.name}", *shown, *rest]), findings[0][0])


def main(arguments: list[str]) -> int:
    """Fills the caches unless they are true; with `daemon`, becomes the starter of the daemon."""
    if not caches_are_true() and not fill_caches():
        return 1
    if arguments == ["daemon"]:
        os.execv(sys.executable, _daemon_command())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
