"""What MLflow has not got yet, on disk: it outlives the process, and a server that is away."""

import errno
import fcntl
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

from pipeline.storage import Storage
from pipeline.tracking.records import Metrics, Record, Staged, from_line, parse_lines, to_line

FILE, SENT, ID = "outbox.jsonl", "sent.json", "id"
HEAD_BYTES = 2**20
LOCK_WAIT_S = 30.0


class Outbox:
    """Records in a file, one JSON object a line, and beside it how much of them was sent.

    A metric's steps only rise: one at or below the last is dropped, so that steps which are trained again
    after a failure are not logged again (their values are the same: training is deterministic).

    Attributes:
        id: tells it from the outboxes that the same training has on other machines.
        staged: the names of the folders that records of its file are of.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._folder = folder / FILE, folder
        self._warn, self._write_fails = warn, False
        self._lock = threading.Lock()
        self._unwritten: list[bytes] = []  # what a full disk keeps from the file
        self._skipped: dict[str, int] = {}
        self._num_emptied = 0
        content = self.path.read_bytes() if self.path.exists() else b""
        note = _read_sent(folder)
        # Whether nothing was ever sent from here, as far as is known; MLflow may know better.
        self.is_new = note is None
        sent, self._last_step = note or (0, {})
        self._sent = min(sent, len(content))
        lines, records = parse_lines(content[self._sent :])
        if len(records) < len(lines):
            warn(f"{len(lines) - len(records)} unreadable lines of {self.path} are left out")
        sound = content[: self._sent] + b"".join(map(to_line, records))
        if sound != content:
            Storage(folder).write_bytes(FILE, sound)
        for record in records:
            self._note_steps(record)
        self.staged = {record.staged for record in records if isinstance(record, Staged)}
        self._file = self.path.open("ab+", buffering=0)
        self._lock_file()
        self._end = len(sound)  # of what is whole in the file
        known = read_id(folder)
        self.id = uuid.uuid4().hex if known is None else known
        if known is None:
            Storage(folder).write_bytes(ID, self.id.encode())

    def _lock_file(self) -> None:
        """Wait for `pipeline sync`, or a process that ends; not for ever, as one may hang."""
        deadline = time.monotonic() + LOCK_WAIT_S
        while time.monotonic() < deadline:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.2)
            except OSError:  # a file system without locks
                return
            else:
                return
        self._warn(f"{self.path} is used by another process, too; its records may be lost, or sent twice")

    def append(self, record: Record) -> None:
        with self._lock:
            if isinstance(record, Metrics):
                record = record.after(self._last_step)
            self._note_steps(record)
            self._unwritten.append(to_line(record))
            self._write()

    def unsent(self) -> list[tuple[Record, int]]:
        """The waiting records, oldest first, each with the offset at which it ends."""
        with self._lock:
            self._write()
            return self._parse(self._sent, self._end)

    def head(self, max_bytes: int = HEAD_BYTES) -> list[tuple[Record, int]]:
        """As `unsent`, but some records alone; for the thread that marks them as sent.

        A step that logs does not wait for it, however long MLflow was away: nobody else takes records away.
        """
        with self._lock:
            self._write()
            start, end = self._sent, self._end
        while not (records := self._parse(start, min(start + max_bytes, end))) and start + max_bytes < end:
            max_bytes *= 2  # a single record that is larger
        return records

    def unsent_lines(self) -> tuple[bytes, bool]:
        """The lines of the records that wait, and whether the disk has all; a step that logs does not wait for it."""
        with suppress(FileNotFoundError):
            os.utime(self._folder / ID)  # whoever cleans /tmp takes what is old
        while True:
            with self._lock:
                self._write()
                start, end, unwritten, emptied = self._sent, self._end, b"".join(self._unwritten), self._num_emptied
            lines = os.pread(self._file.fileno(), end - start, start)
            os.fsync(self._file.fileno())
            with self._lock:
                if emptied == self._num_emptied:
                    return lines + unwritten, not unwritten

    def replace(self, records: Iterable[Record]) -> None:
        """Have these wait, in the place of all that is here."""
        with self._lock:
            self._empty()
            (self._folder / SENT).unlink(missing_ok=True)
            self._last_step.clear()
            self._sent, self._unwritten, self.is_new = 0, [], True
            for record in records:
                self._note_steps(record)
                self._unwritten.append(to_line(record))
            self._write()

    def skip(self, last_step: dict[str, int]) -> None:
        """Leave out of what waits the metrics that MLflow has already: up to these steps."""
        self._skipped = last_step

    def mark_sent(self, offset: int) -> None:
        """Records up to `offset` have arrived; once all have, the file starts anew.

        Raises:
            OSError: that cannot be noted, so they will be sent again.
        """
        with self._lock:
            sent = 0 if offset == self._end else offset
            note = {"bytes": sent, "last_step": self._last_step}
            Storage(self._folder).write_bytes(SENT, json.dumps(note).encode())
            self._sent = sent
            if offset == self._end:  # last: a crash before it sends them once more, which changes nothing
                self._empty()

    def _empty(self) -> None:
        self._file.truncate(0)
        self._end = 0
        self._num_emptied += 1

    def close(self) -> None:
        self._file.close()

    # By the open file, not by its path: a folder that is away for a while does not hurt.
    def _parse(self, start: int, end: int) -> list[tuple[Record, int]]:
        """The whole records between two offsets, each with its end."""
        records = []
        for line in os.pread(self._file.fileno(), end - start, start).splitlines(keepends=True):
            if line.endswith(b"\n"):
                start += len(line)
                record = from_line(line)
                assert record is not None, "only records are written here"
                records.append((record.after(self._skipped) if isinstance(record, Metrics) else record, start))
        return records

    def _write(self) -> None:
        """Append what is to be written: all of it, or nothing for now."""
        content = b"".join(self._unwritten)
        try:
            if os.fstat(self._file.fileno()).st_size > self._end:  # half a record, of a try that failed
                self._file.truncate(self._end)
            if self._file.write(content) < len(content):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as e:
            if not self._write_fails:
                self._warn(f"{self.path} cannot be written, its records stay in memory: {e}")
            self._write_fails = True
        else:
            self._end += len(content)
            self._unwritten.clear()
            self._write_fails = False

    def _note_steps(self, record: Record) -> None:
        if isinstance(record, Metrics):
            self._last_step.update(dict.fromkeys(record.values, record.step))


def first_batch(waiting: list[tuple[Record, int]], max_values: int) -> list[tuple[Record, int]]:
    """What can be sent together: records of metrics that have so many values in all, or the first of any kind."""
    batch, size = list[tuple[Record, int]](), 0
    for record, end in waiting:
        if not isinstance(record, Metrics) or (size := size + len(record.values)) > max_values:
            break
        batch.append((record, end))
    return batch or waiting[:1]


def read_id(folder: Path) -> str | None:
    """The id of the outbox there."""
    with suppress(FileNotFoundError):
        return (folder / ID).read_text(encoding="utf-8")
    return None


def is_in_use(folder: Path) -> bool:
    """Whether a process of this machine has the outbox open."""
    try:
        with (folder / FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)  # NFS has an exclusive one for writers alone
    except OSError as e:  # also where there is none, or a file system without locks
        return isinstance(e, BlockingIOError)
    return False


def read_records(folder: Path) -> list[Record]:
    """What an outbox's file has now, oldest first, also of what was sent since it was last empty.

    Nothing is changed: the outbox may be in use.
    """
    try:
        return parse_lines((folder / FILE).read_bytes())[1]
    except FileNotFoundError:
        return []


def _read_sent(folder: Path) -> tuple[int, dict[str, int]] | None:
    """How many bytes of the file were sent, and each metric's last step; None where that is not known."""
    try:
        note = json.loads((folder / SENT).read_bytes())
        return note["bytes"], note["last_step"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
