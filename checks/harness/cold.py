"""A lane's child process where forking is not safe: a fresh interpreter that collects one exercise and runs one lane
of it.
"""

import sys
from pathlib import Path

import pytest

from harness import plugin, supervise, warm


def main(exercise: str, lane: str, folder: str, writing: str, token: str) -> int:
    """Runs the lane and reports to the descriptor `writing`."""

    def use(session: pytest.Session) -> int:
        items = [item for item in session.items if plugin.lane_of(item) == lane]
        supervise.run_lane(items, Path(folder), int(writing), token)
        return 0

    return warm.collected(use, exercise)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
