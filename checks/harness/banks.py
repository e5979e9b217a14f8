"""The banks: answer, mistakes and variants of an exercise, read as text. They may be absent (the student edition)."""

import importlib.util
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.specification import CHECKS, TOP, Exercise


class BanksAbsent(Exception):
    """This copy of the workspace holds no answers or no banks."""


class BankError(ValueError):
    """A mistake whose edit does not fit the answer's text."""


@dataclass(frozen=True)
class Mistake:
    """A plausible wrong answer: the answer's text with small edits.

    Args:
        name: a slug; a slip that own tests have to catch carries the slip's name.
        caught_by: the requirement whose checks must fail ("1.5"), or several.
        edits: pairs (old, new); each old text occurs exactly once in the answer, and the edits apply in order.
        says: what the first failing message of `caught_by` must contain, so that it names the slip.
        only: True if no other requirement but "reads well" fails, so that this mistake proves that `caught_by`
            is needed.
    """

    name: str
    caught_by: str | tuple[str, ...]
    edits: Sequence[tuple[str, str]] = field(hash=False)
    says: str
    only: bool = False

    @property
    def requirements(self) -> tuple[str, ...]:
        return (self.caught_by,) if isinstance(self.caught_by, str) else self.caught_by

    def applied_to(self, answer: str) -> str:
        """The wrong answer's text.

        Raises:
            BankError: an edit's old text does not occur exactly once.
        """
        text = answer
        for old, new in self.edits:
            if (count := text.count(old)) != 1:
                raise BankError(f"mistake {self.name}: {old!r} occurs {count} times in the answer, not once")
            text = text.replace(old, new)
        return text


def answer(exercise: Exercise) -> str:
    """The answer's text."""
    return _read(exercise.answer_file)


def mistakes(exercise: Exercise) -> dict[str, Mistake]:
    """The mistakes of an exercise by name, from `checks/mistakes/exNN.py`, which defines the list MISTAKES."""
    path = CHECKS / "mistakes" / f"{exercise.id}.py"
    if not path.exists():
        raise BanksAbsent(f"no {path.relative_to(CHECKS.parent)} in this copy of the workspace")
    spec = importlib.util.spec_from_file_location(f"mistakes_{exercise.id}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {mistake.name: mistake for mistake in module.MISTAKES}


def variants(exercise: Exercise) -> dict[str, Path]:
    """The variants of an exercise by slug: each a whole file of its own."""
    return {path.stem: path for path in sorted((CHECKS / "variants" / exercise.id).glob("*.py"))}


def right_code(exercise: Exercise, name: str) -> str:
    """The text of the answer (`name` "answer") or of a variant."""
    return answer(exercise) if name == "answer" else _read(CHECKS / "variants" / exercise.id / f"{name}.py")


def wrong_code(exercise: Exercise, name: str) -> str:
    """The text of a mistake."""
    return mistakes(exercise)[name].applied_to(answer(exercise))


def forget() -> None:
    """Removes answers, mistakes and variants from this copy of the workspace: for throw-away copies in which a
    submission runs that might look for them.
    """
    for folder in (TOP / "answers", CHECKS / "mistakes", CHECKS / "variants"):
        shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> str:
    if not path.exists():
        raise BanksAbsent(f"no {path.relative_to(CHECKS.parent)} in this copy of the workspace")
    return path.read_text(encoding="utf-8")
