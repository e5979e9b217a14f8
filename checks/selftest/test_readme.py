"""The README is true: its board is what the watch prints, its commands exist, its table is the exercises'."""

import re

from devtools.screenshot import PICTURE, svg, watched
from devtools.workspace import Workspace
from harness.model.paths import TOP

README = TOP / "README.md"
_COLOUR = re.compile(r"\x1b\[\d*m")


def test_the_board_and_the_picture_are_the_real_ones(workspace: Workspace) -> None:
    """To renew them: `make picture`, and paste what this test says came."""
    shown = README.read_text(encoding="utf-8").partition("<!-- board")[2].partition("```\n")[2].partition("```")[0]
    came = watched(workspace, "xterm")

    plain = [line.rstrip() for line in _COLOUR.sub("", came).splitlines()]
    assert [line.rstrip() for line in shown.splitlines()] == plain, "\n".join(plain)
    assert PICTURE.read_text(encoding="utf-8") == svg(came), "make picture renews it"


def test_every_command_in_the_readme_is_a_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (TOP / "Makefile").read_text(), re.MULTILINE))

    assert set(re.findall(r"make ([a-z-]+)", README.read_text())) <= targets
