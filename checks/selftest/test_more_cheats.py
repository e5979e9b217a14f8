"""No unearned point, by other means: answers from elsewhere, layers that lie, the judge's names, files beside."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from devtools.workspace import Workspace
from selftest import cheats, disguises, more_cheats

FILE = "ex01_multi_head_attention.py"
# Words that a message uses for what "from scratch" forbids, or for the means that are refused.
MEANS = (" reached ", " replaces ", "PermissionError", "not permitted", "Can't get source", "buffer length (0)")
HOSTILE = "raise SystemExit('hostile')\n"
BESIDE = (
    "harness.py",
    "checks.py",
    "conftest.py",
    "pytest.py",
    "_pytest.py",
    "json.py",
    "sitecustomize.py",
)
INI = "[pytest]\naddopts = --collect-only -p conftest\npython_files = nothing.py\n"


class _Answers(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(cheats.ANSWER.encode())

    def log_message(self, *_: Any) -> None:
        """Says nothing."""


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A server on this machine that hands out the answer."""
    server = HTTPServer(("127.0.0.1", 0), _Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def graded(judged: Callable[..., dict[str, Any]], port: int) -> dict[str, Any]:
    """Verdicts on all of them, as `make grade` gives them."""
    texts = {**more_cheats.CHEATS, "the net": more_cheats.from_net(port)}
    verdicts = judged("ex01", texts, "code", graded=True, requirements=("1.1",))
    disguised = judged("ex01", disguises.DISGUISED, "code", graded=True, requirements=("1.8",))
    kept = judged("ex01", disguises.KEPT, "code", graded=True, requirements=("1.6", "1.8"))
    return verdicts | {f"disguised {name}": verdict for name, verdict in (disguised | kept).items()}


@pytest.mark.parametrize("name", [*more_cheats.CHEATS, "the net"])
def test_it_earns_nothing(graded: dict[str, Any], name: str) -> None:
    verdict = graded[name]

    assert verdict["score"] == 0
    assert verdict["seconds"] < 40
    assert not any("Traceback" in result["message"] for result in verdict["results"])


@pytest.mark.parametrize("name", [*disguises.DISGUISED, *disguises.KEPT])
def test_prebuilt_attention_is_reached_or_the_means_refused(graded: dict[str, Any], name: str) -> None:
    results = [result for result in graded[f"disguised {name}"]["results"] if result["requirement"] == "1.8"]
    messages = [result["message"] for result in results if result["outcome"] != "passed"]

    assert messages, name
    assert any(word in message for message in messages for word in (*MEANS, "AttributeError", "KeyError")), messages


def test_files_beside_the_exercise_change_no_verdict(workspace: Workspace) -> None:
    """At the top and in exercises/, under the names of what judges: they are not even read."""
    workspace.keep("ex01")
    for folder in (workspace.top, workspace.top / "exercises"):
        for name in BESIDE:
            (folder / name).write_text(HOSTILE)
        (folder / "pytest.ini").write_text(INI)
        (folder / "harness").mkdir()
        (folder / "harness" / "__init__.py").write_text(HOSTILE)
    given = {cheats.ANSWER: 50, cheats.ZEROS: 0}

    for text, points in given.items():
        (workspace.top / "exercises" / FILE).write_text(text)
        done = workspace.make("grade", "EX=1")
        assert done.returncode == 0, done.stdout
        assert json.loads((workspace.top / "gradesheet.json").read_text())["score"] == points, done.stdout
        assert "hostile" not in done.stdout
    checked = workspace.make("check", "EX=1")
    assert checked.returncode == 2 and "hostile" not in checked.stdout, checked.stdout
