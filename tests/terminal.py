"""A terminal in which tests run commands."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import time


class Terminal:
    """A command in a terminal of its own."""

    def __init__(self, *arguments):
        self.here, there = os.openpty()
        ends = {'stdin': there, 'stdout': there, 'stderr': there}
        self.command = subprocess.Popen([sys.executable, *map(str, arguments)], **ends)
        os.close(there)
        self.shown, self.seen = b'', 0

    def wait_for(self, words: bytes, within: float = 120) -> None:
        """Until the words are shown, after those of the last call."""
        end = time.monotonic() + within
        while (at := self.shown.find(words, self.seen)) < 0:
            assert time.monotonic() < end, self.shown
            if select.select([self.here], [], [], 1)[0]:
                self.shown += os.read(self.here, 4096)
        self.seen = at + len(words)

    def type(self, line: str) -> None:
        os.write(self.here, f'{line}\n'.encode())

    def interrupt(self) -> None:
        self.command.send_signal(signal.SIGINT)

    def code_after_interrupt(self) -> int:
        """The exit code; a signal just before a process waits for a line would be seen later."""
        for within in (30, 60):
            self.interrupt()
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.command.wait(within)
        raise AssertionError(self.shown)

    def read_all(self) -> None:
        """What an ended command had still to show."""
        with contextlib.suppress(OSError):  # Linux: nobody holds the other end
            while select.select([self.here], [], [], 1)[0]:
                self.shown += os.read(self.here, 4096)

    def close(self) -> None:
        self.command.kill()
        self.command.wait()
        os.close(self.here)
