"""What a check's code leaves switched on goes off after each check of ex06."""

from collections.abc import Iterator

import pytest

from .reference import left_on


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    """What a check's code leaves switched on goes off after it, so that the next check starts clean."""
    yield
    left_on()
