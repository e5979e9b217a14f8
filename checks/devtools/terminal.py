"""A command in a real terminal, as people see it; for tests and benches."""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pexpect


class Terminal:
    """A command in a terminal of its own, 80 columns wide."""

    def __init__(self, command: list[str], folder: Path, kind: str = "dumb") -> None:
        self._child = pexpect.spawn(
            command[0],
            command[1:],
            cwd=str(folder),
            env={**os.environ, "TERM": kind, "COLUMNS": "80", "LINES": "60"},
            dimensions=(60, 80),
            encoding="utf-8",
            codec_errors="replace",
            preexec_fn=_heed_ctrl_c,
        )
        self.pid = int(self._child.pid or 0)

    def until(self, text: str, seconds: float = 60) -> str:
        """What is printed until `text` has come, with it.

        Raises:
            AssertionError: it does not come.
        """
        try:
            self._child.expect_exact(text, timeout=seconds)
        except (pexpect.TIMEOUT, pexpect.EOF) as gone:
            raise AssertionError(f"{type(gone).__name__}, no {text!r} in: {self._child.before}") from None
        return f"{self._child.before}{self._child.after}".replace("\r\n", "\n")

    def interrupt(self) -> None:
        """Ctrl-C."""
        self._child.sendintr()

    def ended(self, seconds: float = 15) -> bool:
        """Whether the command has ended, at the latest after `seconds`."""
        deadline = time.monotonic() + seconds
        while self._child.isalive() and time.monotonic() < deadline:
            with suppress(pexpect.TIMEOUT, pexpect.EOF):
                self._child.expect_exact(pexpect.EOF, timeout=0.1)
        return not self._child.isalive()


def _heed_ctrl_c() -> None:
    """As a terminal's shell has it: whoever was started in the background hands on that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
