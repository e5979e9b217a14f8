"""What check files and benches use: the learner's code, one comparison, probes, guards, own tests, the stock checks.

They import from here alone. A check file names fixtures for the rest: subject, close, rng, on.
"""

import pytest

from harness.model.results import Hang
from harness.model.submission import describe
from harness.testing.bench import Case, Run, Series
from harness.testing.compare import Close, Where, also, is_tensor, refuses, untouched
from harness.testing.forbid import Prebuilt, forbid, prebuilt_attention
from harness.testing.own_test import OwnTest
from harness.testing.stock import own_test_checks, style_checks, walk_check
from harness.testing.subject import Subject, fill, plain, seed
from harness.testing.trace import DispatchMode, Trace, calls, every_tensor
from harness.testing.walk import Aspect, Step, Walk

requirement = pytest.mark.requirement
halfway = pytest.mark.halfway

__all__ = [
    "Aspect",
    "Case",
    "Close",
    "DispatchMode",
    "Hang",
    "OwnTest",
    "Prebuilt",
    "Run",
    "Series",
    "Step",
    "Subject",
    "Trace",
    "Walk",
    "Where",
    "also",
    "calls",
    "describe",
    "every_tensor",
    "fill",
    "forbid",
    "halfway",
    "is_tensor",
    "own_test_checks",
    "plain",
    "prebuilt_attention",
    "refuses",
    "requirement",
    "seed",
    "style_checks",
    "untouched",
    "walk_check",
]
