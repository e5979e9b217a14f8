"""The README is true: its board is what the watch prints, its commands exist, its table is the exercises'."""

import re

from harness.copies import READY, Terminal, Workspace
from harness.specification import TOP, exercises

README = TOP / "README.md"
FILE = "ex01_multi_head_attention.py"
_CHANGING = re.compile(r"\d\d:\d\d:\d\d judged ex01 in [\d.]+ s")


def test_the_board_in_the_readme_is_the_real_one(workspace: Workspace) -> None:
    """A half-done ex01: masks are inverted. To renew the picture, paste what this test says came."""
    shown = README.read_text(encoding="utf-8").partition("<!-- board")[2].partition("```\n")[2].partition("```")[0]
    text = workspace.answer(FILE).replace("masked_fill(mask == 0", "masked_fill(mask != 0")
    terminal = Terminal(workspace.make_command("watch", "EX=1"), workspace.top)
    terminal.until(READY)
    (workspace.top / "exercises" / FILE).write_text(text)
    came = terminal.until("Ctrl-C ends")
    terminal.interrupt()
    assert terminal.ended()

    def plain(screen: str) -> list[str]:
        kept = _CHANGING.sub("12:34:56 judged ex01 in 0.35 s", screen[screen.index("judging ") :])
        return [line.rstrip() for line in kept.strip().splitlines()]

    assert plain(shown) == plain(came), "\n".join(plain(came))


def test_every_command_in_the_readme_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"make ([a-z-]+)", README.read_text())) <= targets


def test_the_table_names_every_exercise() -> None:
    rows = re.findall(r"^\| (\d+) \| ([^|]+) \|", README.read_text(), re.MULTILINE)

    assert [(int(number), title.strip()) for number, title in rows] == [
        (int(exercise.id[2:]), exercise.title) for exercise in exercises().values()
    ]
