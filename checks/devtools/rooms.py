"""Traces one save through the rooms of the harness, in the order of a first reading.

Usage: python -P -m devtools.rooms [EX]

In a copy of the workspace with this exercise alone its answer is saved. The first call of a function from another room
is an entry into its room; entries into one room, one after the other, are a stay. A stay in a room that was left before
is a return: whoever follows the save through the code comes back to it. `model` and `sandbox` are left out: all rooms
stand on them. What the workers do stands where the first one is started.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from types import CodeType, FrameType

from devtools.workspace import Workspace
from harness.commands.request import parse
from harness.model.exercise import selected
from harness.model.paths import BUILD, CHECKS
from harness.practice import saving
from harness.runner import session
from harness.runner.judge import Judge

_HARNESS = f"{CHECKS / 'harness'}{os.sep}"
_GROUND = ("model", "sandbox")
_INSIDE = "inside"
_LOG = BUILD / "entries.txt"


def main(arguments: list[str]) -> int:
    """Prints the stays of one save and how many of them are returns."""
    if arguments[:1] == [_INSIDE]:
        return _traced()
    exercise = selected(arguments[0] if arguments else "1")[0]
    with tempfile.TemporaryDirectory() as folder:
        workspace = Workspace(Path(folder) / "copy")
        workspace.keep(exercise.id)
        shutil.copy(workspace.top / "answers" / exercise.file_name, workspace.top / "exercises")
        environment = {**os.environ, "PYTHONPATH": str(workspace.top / "checks")}
        command = [sys.executable, "-P", "-W", "ignore", "-m", "devtools.rooms", _INSIDE]
        subprocess.run(command, cwd=workspace.top, env=environment, check=True, stdout=subprocess.DEVNULL)
        entries = _in_order((workspace.top / "build" / _LOG.name).read_text(encoding="utf-8"))
    stays = [(room, [name for _, name in names]) for room, names in groupby(entries, key=lambda entry: entry[0])]
    for room, names in stays:
        print(f"{room:<9} {', '.join(names)}")
    rooms = {room for room, _ in stays}
    print(f"{len(stays)} stays in {len(rooms)} rooms, {len(stays) - len(rooms)} returns")
    return 0


def _traced() -> int:
    """In the copy: one save, with a line for each entry."""
    _LOG.parent.mkdir(exist_ok=True)
    log = os.open(_LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
    seen: set[CodeType] = set()

    def entered(frame: FrameType, event: str, _: object) -> None:
        if event != "call" or frame.f_code in seen or not (room := _room(frame.f_code)):
            return
        caller = frame.f_back
        while caller is not None and not _room(caller.f_code):
            caller = caller.f_back
        if caller is None or _room(caller.f_code) != room:
            seen.add(frame.f_code)
            module = Path(frame.f_code.co_filename).stem
            line = json.dumps([os.getpid(), room, f"{module}.{frame.f_code.co_qualname}"])
            os.write(log, f"{line}\n".encode())

    def judged(judge: Judge) -> int:
        judge.read_banks()
        request = parse(["save"])
        sys.setprofile(entered)
        try:
            return saving.save(request, judge)
        finally:
            sys.setprofile(None)

    return session.collected(lambda checks: judged(Judge(checks)))


def _room(code: CodeType) -> str:
    """The room that a function lies in; nothing for the ground, and for what is not the harness's."""
    if not code.co_filename.startswith(_HARNESS):
        return ""
    room = code.co_filename.removeprefix(_HARNESS).split(os.sep)[0]
    return "" if room in _GROUND else room


def _in_order(log: str) -> list[tuple[str, str]]:
    """Rooms and functions, each once: the judging process's, with what its workers entered where these come first."""
    lines = [json.loads(line) for line in log.splitlines()]
    first = lines[0][0]
    begin = next(place for place, (process, *_) in enumerate(lines) if process != first)
    workers = sorted((line for line in lines if line[0] != first), key=lambda line: line[0])
    ordered = [*lines[:begin], *workers, *(line for line in lines[begin:] if line[0] == first)]
    return list(dict.fromkeys((room, name) for _, room, name in ordered))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
