"""What check files use: one door to the learner's code, one comparison, probes, guards, own tests.

A check file imports from here alone, and names fixtures for the rest: subject, close, rng, on, trials,
submission_file, ruff, mypy.
"""

import pytest

from harness.banks import Mistake
from harness.compare import Close, Where, is_tensor, refuses
from harness.guards import Prebuilt, forbid, prebuilt_attention
from harness.own_test import OwnTest
from harness.probes import DispatchMode, Trace, calls
from harness.submission import Subject, seed
from harness.trials import Trials
from harness.verdicts import Hang

requirement = pytest.mark.requirement
halfway = pytest.mark.halfway

__all__ = [
    "Close",
    "DispatchMode",
    "Hang",
    "Mistake",
    "OwnTest",
    "Prebuilt",
    "Subject",
    "Trace",
    "Trials",
    "Where",
    "calls",
    "forbid",
    "halfway",
    "is_tensor",
    "prebuilt_attention",
    "refuses",
    "requirement",
    "seed",
]
