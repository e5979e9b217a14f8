"""What demos stand on: a language model for a Decoder that exercises give, and what a demo shows of a run."""

from harness.language.model import Language
from harness.language.run import Demo, Run

__all__ = ["Demo", "Language", "Run"]
