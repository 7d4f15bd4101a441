"""Processes beside this one that read and decode images: this package's modules, and nothing of the user's."""

import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection


class Child:
    """A process that runs a module, and a connection to it.

    It is to end by itself when the connection does, whatever has ended this process; it is ended with this object at
    the latest. A terminal's Ctrl-C does not reach it.

    Args:
        module: gets the number of its end of the connection as its argument.
        pass_fds: further descriptors that it inherits, by the same numbers.
    """

    def __init__(self, module: str, pass_fds: Sequence[int] = ()):
        self.connection, theirs = Pipe()
        number = theirs.fileno()
        # It imports what this process would, and nothing from the current directory.
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, str(number)],
            pass_fds=[number, *pass_fds],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=env,
        )
        theirs.close()
        self._end = weakref.finalize(self, _end, self.connection, self._process)

    @property
    def pid(self) -> int:
        return self._process.pid

    def describe_end(self) -> str:
        """How it ended, such as "SIGSEGV"; waits for that for some seconds."""
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            return "no answer"
        if code >= 0:
            return f"exit code {code}"
        known = -code in {number.value for number in signal.Signals}
        return signal.Signals(-code).name if known else f"signal {-code}"

    def kill(self) -> None:
        """End it, and what it has started."""
        self._end()


def _end(connection: Connection, process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):  # one that waits for a dead mount cannot be killed
            process.wait(5)
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as end:  # wakes a thread that listens
        end.shutdown(socket.SHUT_RDWR)
    connection.close()


def parent_connection() -> Connection:
    """In the child: its end of the connection."""
    return Connection(int(sys.argv[1]))
