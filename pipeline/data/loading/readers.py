"""The training process's side of the processes that read for it: batches in order, whatever becomes of those."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import cycle, islice
from typing import Any

from pipeline.config.data import DataConfig
from pipeline.data.index import Index
from pipeline.data.loading.bad_images import BadImages
from pipeline.data.loading.child import Child
from pipeline.data.loading.fetch import EncodedBatch
from pipeline.data.loading.read import StorageAwayError
from pipeline.data.loading.reader_process import MakeSpec, ReaderTask
from pipeline.data.loading.shared_memory import SharedBuffer
from pipeline.failures import StoppedWaitingError

MODULE = "pipeline.data.loading.reader_process"
MAX_DEATHS = 3  # of one process, without a batch in between
MAX_RECENT_DEATHS, RECENT_S = 10, 600.0  # with batches in between
POLL_S = 0.5
NOTHING_CAME = "the next images have not come"
FETCH_AHEAD = 8  # batches beyond those that are being read, of data that comes over a network

Patience = Callable[[], float]  # asked while a batch is waited for, how many seconds more it may take


def for_ever() -> float:
    """The patience of one that is never to stop."""
    return math.inf


class ReaderError(RuntimeError):
    """A process that reads images has failed; the text says how."""


class ReaderDiedError(ReaderError):
    """It has ended again and again."""


class Readers:
    """Reads the batches that are requested of an index, in processes of their own, ahead of need. To be closed.

    Processes take turns, batch by batch. One that has died is started again, and reads what it had not. Memory: that
    of the processes, and `num_buffers` times the bytes of the largest batch.

    Args:
        make_spec: what a request is for, by the index.
        num_held: most batches that the caller has not released when it asks for the next one.
        warn: told what makes reading slow, and of each process that has died.
        retry_timeout_s: how long a storage that does not answer is waited for.
    """

    def __init__(
        self,
        index: Index,
        cfg: DataConfig,
        make_spec: MakeSpec,
        num_held: int,
        bad_images: BadImages,
        warn: Callable[[str], None],
        retry_timeout_s: float,
        patience: Patience,
    ):
        self._bad_images, self._stream = bad_images, 0
        each = -(-(num_held + cfg.prefetch) // cfg.read_processes) + (cfg.read_processes > 1)
        self.num_buffers = each * cfg.read_processes
        over_network = index.root is not None and not index.root.local
        self._num_ahead = self.num_buffers + (FETCH_AHEAD if over_network else 0)

        def make_task(buffers: tuple[int, ...]) -> ReaderTask:
            return ReaderTask(index.shared_file(), index.classes, cfg, make_spec, retry_timeout_s, buffers)

        self._processes = [_Process(make_task, each, warn, patience) for _ in range(cfg.read_processes)]

    def read(self, requests: Iterable[Any]) -> Iterator[EncodedBatch]:
        """The batches of these requests, in order. What an earlier call has begun is given up.

        Raises:
            StorageAwayError: the images' storage does not answer.
            ReaderError: a process has failed. ReaderDiedError: it dies again and again.
            StoppedWaitingError: a batch takes longer than `patience` allows.
            BadDataError: more images are broken than `max_bad_fraction` allows.
        """
        self._stream += 1
        asked, turns = deque[_Process](), cycle(self._processes)

        def ask(number: int) -> None:
            for request in islice(todo, number):
                process = next(turns)
                process.ask(self._stream, request)
                asked.append(process)

        todo = iter(requests)
        ask(self._num_ahead)
        while asked:
            batch = asked.popleft().take()
            try:
                for place, reason in batch.bad.items():
                    self._bad_images.count(int(batch.spec.rows[place]), reason)
            except BaseException:
                batch.release()
                raise
            ask(1)
            yield batch

    def start(self) -> None:
        """Start the processes, which `read` does else: they take a second until they can read."""
        for process in self._processes:
            process.start()

    def avoid(self, known: Mapping[int, str]) -> None:
        """From now on take these rows for broken, for the given reasons, without reading them."""
        for process in self._processes:
            process.avoid(dict(known))

    def close(self) -> None:
        for process in self._processes:
            process.close()


class _Process:
    """One of the processes, or its successor."""

    def __init__(
        self,
        make_task: Callable[[tuple[int, ...]], ReaderTask],
        num_buffers: int,
        warn: Callable[[str], None],
        patience: Patience,
    ):
        self._warn, self._patience, self._known, self._closed = warn, patience, dict[int, str](), False
        self._buffers = {buffer.descriptor: buffer for buffer in (SharedBuffer() for _ in range(num_buffers))}
        self._died = list[float]()  # when, lately
        self._held = set[int]()  # buffers that the caller reads from
        self._asked = deque[tuple[int, Any]]()  # stream and request of batches that have not come
        self._task = make_task(tuple(self._buffers))
        self._child: Child | None = None

    def start(self) -> None:
        if self._child is None:
            self._child = self._started()

    def ask(self, stream: int, request: Any) -> None:
        """Have it read a batch; of other streams none is wanted any more."""
        if self._asked and self._asked[0][0] != stream:
            self._asked.clear()
        self._asked.append((stream, request))
        if self._child is None:
            self.start()
        else:
            self._send("read", stream, request)

    def avoid(self, known: dict[int, str]) -> None:
        self._known |= known
        self._send("avoid", known)

    def take(self) -> EncodedBatch:
        """The next batch that was asked for."""
        deaths, give_up_at = 0, math.inf
        assert self._child is not None, "take() after ask()"
        while True:
            try:
                if not self._child.connection.poll(POLL_S):
                    give_up_at = min(give_up_at, time.monotonic() + self._patience())
                    if time.monotonic() >= give_up_at:
                        raise StoppedWaitingError(NOTHING_CAME)
                    continue
                message = self._child.connection.recv()
            except (EOFError, OSError):
                if self._closed:
                    raise
                deaths += 1
                self._replace(deaths)
                continue
            match message:
                case "warn", text:
                    self._warn(text)
                case "away", text:
                    self._child.kill()
                    raise StorageAwayError(text) if self._patience() == math.inf else StoppedWaitingError(NOTHING_CAME)
                case "failed", text:
                    self._child.kill()
                    raise ReaderError(f"a process that reads images has failed: {text}")
                case "batch", stream, number, *_ if stream != self._asked[0][0]:
                    self._send("free", number)
                case "batch", _, number, spec, starts, stops, bad:
                    self._asked.popleft()
                    self._held.add(number)
                    data = self._buffers[number].view(int(stops[-1]))
                    return EncodedBatch(spec, data, starts, stops, bad, partial(self._release, number))

    def close(self) -> None:
        self._closed = True
        if self._child is not None:
            self._child.kill()

    def _started(self) -> Child:
        child = Child(MODULE, pass_fds=[self._task.index, *self._task.buffers])
        with suppress(OSError):  # it has died, which `take` finds
            child.connection.send(self._task)
            child.connection.send(("avoid", self._known))
            for buffer in self._buffers.keys() - self._held:
                child.connection.send(("free", buffer))
            for stream, request in self._asked:
                child.connection.send(("read", stream, request))
        return child

    def _replace(self, deaths: int) -> None:
        assert self._child is not None
        end = self._child.describe_end()
        self._child.kill()
        now = time.monotonic()
        self._died = [t for t in self._died if t > now - RECENT_S] + [now]
        if deaths > MAX_DEATHS or len(self._died) > MAX_RECENT_DEATHS:
            raise ReaderDiedError(f"a process that reads images ends again and again, at last by {end}")
        time.sleep(deaths - 1)  # a shortage of memory may be a short one
        self._warn(f"a process that reads images has ended ({end}); another reads on")
        self._child = self._started()

    def _release(self, number: int) -> None:
        self._held.discard(number)
        self._send("free", number)

    def _send(self, *message: object) -> None:
        if self._child is not None:
            with suppress(OSError):  # it has died, which `take` finds
                self._child.connection.send(message)
