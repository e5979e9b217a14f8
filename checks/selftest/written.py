"""The checks that stand in an exercise's files, read from their text."""

import re
from pathlib import Path

from harness.model.exercise import Exercise

_CHECK = re.compile(r"^def (test_\w+)|^(test_\w+)(?:, (test_\w+))? = ", re.MULTILINE)


def written(exercise: Exercise) -> dict[str, Path]:
    """The file of each check by its name, the stock checks too."""
    return {
        name: path
        for path in exercise.check_files
        for found in _CHECK.findall(path.read_text(encoding="utf-8"))
        for name in found
        if name
    }


def node_id(exercise: Exercise, name: str) -> str:
    """The id of a check as pytest writes it, below `checks/`; `name` may carry parameters."""
    return f"{exercise.folder.name}/{written(exercise)[name.partition('[')[0]].name}::{name}"
