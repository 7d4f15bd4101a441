"""A process that reads batches for a training process, whose interpreter belongs to the thread that launches kernels.

What a batch consists of is a pure function of the index and a few numbers, so any process can make any batch. This one
draws, reads and checks; the images' bytes go into memory that both share, the rest through the connection.

The parent sends ("read", stream, request), ("avoid", rows) and ("free", buffer); "stream" counts what was begun and
perhaps given up. It hears ("batch", stream, buffer, spec, starts, stops, bad), ("warn", text), ("away", text) where the
storage does not answer, and ("failed", text).
"""

import os
import queue
import signal
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from pipeline.config.data import DataConfig
from pipeline.data.batch_spec import BatchSpec
from pipeline.data.index import Index, OpenFile, map_table
from pipeline.data.loading.child import parent_connection
from pipeline.data.loading.fetch import BatchReader
from pipeline.data.loading.read import StorageAwayError
from pipeline.data.loading.shared_memory import SharedBuffer

PARENT_GONE = (EOFError, BrokenPipeError, ConnectionResetError)
MakeSpec = Callable[[Index, Any], BatchSpec]  # of a request


@dataclass(frozen=True)
class ReaderTask:
    """What a process reads.

    index, buffers: descriptors that it inherits. classes: by which it labels. make_spec: of what is requested.
    """

    index: int
    classes: tuple[str, ...]
    cfg: DataConfig
    make_spec: MakeSpec
    retry_timeout_s: float
    buffers: tuple[int, ...]


class _Server:
    """Answers a parent's requests in their order; those of streams that were given up are left out."""

    def __init__(self, connection: Connection, task: ReaderTask):
        self._connection, self._make_spec, self._sending = connection, task.make_spec, threading.Lock()
        self._index = Index(map_table(OpenFile(os.dup(task.index)))).with_classes(task.classes)
        self._reader = BatchReader(self._index, task.cfg, self._warn, task.retry_timeout_s)
        self._buffers = {number: SharedBuffer(number) for number in task.buffers}
        self._stream = 0
        self._specs = queue.SimpleQueue[tuple[int, BatchSpec]]()
        self._free = queue.SimpleQueue[int]()

    def run(self) -> None:
        """Until the parent goes."""
        reading = _reporting(self._read_all, self._send)
        threading.Thread(target=reading, name="batches", daemon=True).start()
        try:
            self._listen()
        finally:
            self._reader.close()

    def _listen(self) -> None:
        while True:
            match self._connection.recv():
                case "read", stream, request:
                    self._stream = stream
                    spec = self._make_spec(self._index, request)
                    self._reader.prefetch(spec)
                    self._specs.put((stream, spec))
                case "avoid", rows:
                    self._reader.known |= rows
                case "free", buffer:
                    self._free.put(buffer)

    def _read_all(self) -> None:
        while True:
            stream, spec = self._specs.get()
            if stream != self._stream:
                continue
            number = self._free.get()
            batch = self._reader.read(spec, self._buffers[number].reserve)
            self._send("batch", stream, number, batch.spec, batch.starts, batch.stops, batch.bad)

    def _warn(self, text: str) -> None:
        with suppress(*PARENT_GONE):
            self._send("warn", text)

    def _send(self, *message: object) -> None:
        with self._sending:
            self._connection.send(message)


def _reporting(action: Callable[[], None], send: Callable[..., None]) -> Callable[[], None]:
    """The action, until the parent goes; which hears of an error."""

    def act() -> None:
        try:
            action()
        except PARENT_GONE:
            return
        except Exception as e:
            away = isinstance(e, StorageAwayError)
            with suppress(*PARENT_GONE):
                send("away" if away else "failed", str(e) if away else traceback.format_exc())

    return act


def serve(connection: Connection) -> None:
    """Read for a parent, which sends its `ReaderTask` first, until it goes."""

    def run() -> None:
        _Server(connection, connection.recv()).run()

    _reporting(run, lambda *message: connection.send(message))()


def main() -> None:
    """A process of its own: it ends with its parent, even while a thread waits for a file system that hangs."""
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # whoever stops a training has its process save, which needs this one
        signal.signal(number, signal.SIG_IGN)
    serve(parent_connection())
    os._exit(0)


if __name__ == "__main__":
    main()
