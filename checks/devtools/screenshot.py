"""Renders what the real watch shows as an SVG picture for the README.

Usage: python -P -m devtools.screenshot
"""

import io
import re
import tempfile
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from devtools.terminal import Terminal
from devtools.workspace import READY, Workspace, quiet
from harness.model.paths import TOP

PICTURE = TOP / ".github" / "watch.svg"
FILE = "ex01_multi_head_attention.py"
SLIP = ("masked_fill(mask == 0", "masked_fill(mask != 0")
_CHANGING = re.compile(r"\d\d:\d\d:\d\d judged ex01 in [\d.]+ s")
_OVER = re.compile(r"\x1b\[(\d+)A\x1b\[J")
_FONTS = re.compile(r"@font-face \{.*?\}\n?", re.DOTALL)


def watched(workspace: Workspace, kind: str) -> str:
    """What `make watch EX=1` prints on a terminal of a kind, when ex01 is saved with its masks inverted; the time of
    day and the seconds are made up.
    """
    text = workspace.answer(FILE)
    assert SLIP[0] in text
    terminal = Terminal(workspace.make_command("watch", "EX=1"), workspace.top, kind)
    terminal.until(READY)
    (workspace.top / "exercises" / FILE).write_text(text.replace(*SLIP), encoding="utf-8")
    came = terminal.until("judging ")
    if "Ctrl-C ends" not in came[came.index("judging ") :]:
        came += terminal.until("Ctrl-C ends")
    terminal.interrupt()
    assert terminal.ended() and quiet(workspace)
    came = _in_place(came)
    kept = _CHANGING.sub("12:34:56 judged ex01 in 0.45 s", came[came.index("judging ") :])
    return "\n".join(line.rstrip() for line in kept.strip().splitlines())


def _in_place(came: str) -> str:
    """What is left on a screen where a part was written over: so many lines up, and everything below gone."""
    while found := _OVER.search(came):
        above = came[: found.start()].split("\n")
        came = "\n".join([*above[: -int(found[1]) - 1], came[found.end() :]])
    return came


def svg(screen: str) -> str:
    """A terminal's text, with its colours, as SVG."""
    console = Console(record=True, width=110, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(screen), end="\n\n")  # rich's picture cuts its last line.
    picture = console.export_svg(title="make watch", theme=MONOKAI, unique_id="watch")
    return _FONTS.sub("", picture)  # Pages that show pictures fetch no fonts for them.


def main() -> None:
    """Writes the picture."""
    with tempfile.TemporaryDirectory() as folder:
        PICTURE.write_text(svg(watched(Workspace(Path(folder) / "workspace"), "xterm")), encoding="utf-8")
    print(f"picture: {PICTURE.relative_to(TOP)}")


if __name__ == "__main__":
    main()
