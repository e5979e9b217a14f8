"""Writes every variant as a whole file, for `make lint`.

Usage: python -P -m devtools.spliced FOLDER
"""

import shutil
import sys
from pathlib import Path

from harness.model import bank
from harness.model.exercise import exercises


def main(folder: Path) -> None:
    """Fills an emptied folder with `exNN_slug.py`."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for exercise in exercises().values():
        for slug in exercise.variant_files:
            path = folder / f"{exercise.id}_{slug}.py"
            path.write_text(bank.right_code(exercise, slug), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
