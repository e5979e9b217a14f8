"""`make practice`: the sessions and how they stand."""

from rich.table import Table

from harness.commands.request import Request
from harness.model.exercise import selected
from harness.model.paths import shown
from harness.practice.sessions import sessions, unreadable
from harness.report import terminal


def run(request: Request) -> int:
    """Lists the sessions, the oldest first."""
    out = terminal.console()
    found = [session for session in sessions() if session.exercise in selected(request.ex)]
    for folder in unreadable():
        out.print(f"{shown(folder)}: holds no session.json that can be read; left out", markup=False, soft_wrap=True)
    if not found:
        begins = "make debug EX=1, make optimise EX=1, make review EX=1 or make interview EX=1 begins one"
        out.print(f"no practice session yet; {begins}", soft_wrap=True)
        return 0
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    for head in ("mode", "exercise", "seed", "state"):
        table.add_column(head, no_wrap=True)
    for head in ("minutes", "points"):
        table.add_column(head, justify="right", no_wrap=True)
    for one in found:
        table.add_row(one.mode, one.exercise.id, str(one.seed), one.state, f"{one.minutes:.0f}", one.points)
    out.print(table)
    under_way = [one for one in found if not one.ended]
    if (last := max(under_way, key=lambda one: one.touched, default=None)) is not None:
        out.print(f"go on with the last: {last.command}", soft_wrap=True)
    return 0
