"""A lane's child process where forking is not safe: a fresh interpreter that collects one exercise and runs one lane
of it.
"""

import sys
from pathlib import Path

import pytest

from harness import child, plugin, warm


def main(exercise: str, kind: str, folder: str, writing: str, room: str, device: str) -> int:
    """Runs the lane `kind` and reports to the descriptor `writing`; the token comes on standard input."""
    token = sys.stdin.readline().strip()

    def use(session: pytest.Session) -> int:
        items = [
            item for item in session.items if plugin.lane_of(item) == kind and plugin.earns(item) == (device == "cpu")
        ]
        child.run(items, Path(folder), int(writing), token, Path(room) if room else None)
        return 0

    return warm.collected(use, exercise, device)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
