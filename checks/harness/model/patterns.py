"""Which known mistake a file's failures look like: by the checks that fail, how they fail, and what they say.

`patterns.json` in an exercise's folder holds, for each mistake of its bank that checks of the code catch, the checks
that fail on it, by their place in the list `checks`, each with the kind of its failure and a digest of its message with
all numbers left out. It holds no code.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping

from harness.model.exercise import Exercise
from harness.model.results import Result

# Where fewer checks fail their messages have to agree, too: many mistakes fail a check or two.
FEW = 6
_KINDS = (
    ("r", re.compile(r"your code raises|\w+(Error|Exception)\b")),
    ("n", re.compile(r".*\bNaN\b")),
    ("s", re.compile(r".*(\bshape\b|\bdimensions\b)")),
    ("t", re.compile(r".*(\bdtype\b|\btorch\.\w+ came|\ba \w+ came)")),
    ("v", re.compile(r".*\bdiffer")),
)
_NUMBERS = re.compile(r"\(.*?\)|\[.*?\]|-?\d[\d.,e+-]*|inf|nan")
_NOT_RUN = ("not implemented", "unjudged")

# A failed check's name, with a letter for how it fails and the digest of what it says.
Pattern = dict[str, str]


def pattern(results: Iterable[Result]) -> Pattern:
    """How a file fails; what is not written yet or did not run says nothing."""
    return {one.name: _signature(one) for one in results if one.outcome != "passed" and not _silent(one)}


def diagnosis(exercise: Exercise, results: Iterable[Result]) -> str:
    """What a file's failures look like, in words; empty if that is no known mistake, or might be several."""
    there = list(results)
    if any(one.kind in ("load", "no file") for one in there):
        return ""
    checks, known = load(exercise)
    ran = {one.name for one in there if not _silent(one)} & checks
    name = closest({check: how for check, how in pattern(there).items() if check in checks}, ran, known)
    return words(exercise, name) if name else ""


def closest(found: Pattern, ran: set[str], known: Mapping[str, Pattern]) -> str:
    """The one mistake that fails the same checks in the same way, of those that ran; empty if none or several do."""
    if not found:
        return ""
    same = []
    for name, whole in known.items():
        expected = {check: how for check, how in whole.items() if check in ran}
        alike = expected.keys() == found.keys() and all(how[0] == found[check][0] for check, how in expected.items())
        if alike and 2 * len(expected) >= len(whole):
            same.append((name, expected == found))
    if len(same) > 1 or len(found) < FEW:
        same = [one for one in same if one[1]]
    return same[0][0] if len(same) == 1 else ""


def words(exercise: Exercise, name: str) -> str:
    """A mistake in words: those of the slip, where it is one, else its name's."""
    return exercise.slips.get(name) or name.replace("_", " ")


def load(exercise: Exercise) -> tuple[set[str], dict[str, Pattern]]:
    """The checks that the file knows, and each mistake's pattern; nothing where there is no file."""
    try:
        stored = json.loads(exercise.patterns_file.read_text(encoding="utf-8"))
        checks: list[str] = stored["checks"]
        known = {name: _unpacked(packed, checks) for name, packed in stored["mistakes"].items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return set(), {}
    return set(checks), known


def text(checks: list[str], known: Mapping[str, Pattern]) -> str:
    """The text of the file, a line for each check and each mistake."""
    places = {check: place for place, check in enumerate(checks)}
    packed = {
        name: " ".join(f"{places[check]}{how}" for check, how in sorted(one.items(), key=lambda item: places[item[0]]))
        for name, one in sorted(known.items())
        if one
    }
    return json.dumps({"checks": checks, "mistakes": packed}, indent=1) + "\n"


def _unpacked(packed: str, checks: list[str]) -> Pattern:
    found = (re.fullmatch(r"(\d+)(\w+)", one) for one in packed.split())
    return {checks[int(one[1])]: one[2] for one in found if one is not None}


def _silent(one: Result) -> bool:
    return one.outcome == "missing" or one.kind in _NOT_RUN


def _signature(one: Result) -> str:
    head = one.message.partition("\n")[0]
    kind = "h" if one.outcome == "timeout" else next((kind for kind, form in _KINDS if form.match(head)), "o")
    return kind + hashlib.sha256(_NUMBERS.sub("#", head).encode()).hexdigest()[:4]
