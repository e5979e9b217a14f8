"""The banks: answer, mistakes and variants of an exercise, read as text. They may be absent (the student edition)."""

import ast
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from harness.model.exercise import Exercise, exercises
from harness.model.paths import ANSWERS, TOP, module_from, shown
from harness.model.splice import spliced
from harness.model.submission import describe, line_in

Edit = tuple[str, str]


class BanksAbsent(Exception):
    """This copy of the workspace holds no answers or no banks."""


class BankError(ValueError):
    """A mistake whose edit does not fit the answer's text."""


@dataclass(frozen=True, init=False)
class Mistake:
    """A plausible wrong answer: the answer's text with small edits.

    Args:
        name: a slug; a slip that own tests have to catch carries the slip's name.
        caught_by: the requirement whose checks must fail ("1.5"), or several.
        says: what the first failing message of `caught_by` must contain, so that it names the slip.
        edits: pairs (old, new); each old text occurs exactly once in the answer, and the edits apply in order.
        only: True if no other requirement but "reads well" fails, so that this mistake proves that `caught_by`
            is needed.
        wasteful: right in values and only too dear, which requirements of efficiency alone catch (it implies `only`):
            what `make optimise` begins with.
    """

    name: str
    requirements: tuple[str, ...]
    says: str
    edits: tuple[Edit, ...] = field(repr=False)
    only: bool
    wasteful: bool

    def __init__(
        self,
        name: str,
        caught_by: str | tuple[str, ...],
        says: str,
        *edits: Edit,
        only: bool = False,
        wasteful: bool = False,
    ) -> None:
        requirements = (caught_by,) if isinstance(caught_by, str) else caught_by
        vars(self).update(name=name, requirements=requirements, says=says, edits=edits)
        vars(self).update(only=only or wasteful, wasteful=wasteful)

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
    """The mistakes of an exercise by name: the lists MISTAKES of the files in its folder `mistakes/`."""
    if not exercise.mistake_files:
        raise BanksAbsent(f"no {shown(exercise.folder)}/mistakes in this copy of the workspace")
    found: dict[str, Mistake] = {}
    for path in exercise.mistake_files:
        try:
            listed: list[Mistake] = module_from(path, f"{exercise.id}_mistakes_{path.stem}").MISTAKES
        except Exception as error:
            raise BankError(f"{shown(path)}:{line_in(error, path) or 1}: {describe(error)}") from None
        for mistake in listed:
            if mistake.name in found:
                raise BankError(f"{shown(path)}: another mistake is named {mistake.name}")
            found[mistake.name] = mistake
    return found


def right_code(exercise: Exercise, name: str) -> str:
    """The text of the answer (`name` "answer") or of a variant: the answer's with the definitions that differ."""
    if name == "answer":
        return answer(exercise)
    return spliced(answer(exercise), _read(exercise.folder / "variants" / f"{name}.py"))


def unusual(exercise: Exercise, name: str) -> str:
    """What a variant's file says is unusual about it."""
    return ast.get_docstring(ast.parse(_read(exercise.folder / "variants" / f"{name}.py"))) or ""


def wrong_code(exercise: Exercise, name: str) -> str:
    """The text of a mistake."""
    return mistakes(exercise)[name].applied_to(answer(exercise))


def forget() -> None:
    """Removes answers, mistakes and variants from this copy of the workspace, and git's history, which holds them too:
    for throw-away copies in which a submission runs that might look for them.
    """
    banks = [exercise.folder / name for exercise in exercises().values() for name in ("mistakes", "variants")]
    for folder in (ANSWERS, TOP / ".git", *banks):
        shutil.rmtree(folder, ignore_errors=True)


def _read(path: Path) -> str:
    if not path.exists():
        raise BanksAbsent(f"no {shown(path)} in this copy of the workspace")
    return path.read_text(encoding="utf-8")
