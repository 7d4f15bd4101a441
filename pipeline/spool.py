"""What MLflow has not got yet, on disk: it outlives the process, and a server that is away."""

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]


class Spool:
    """Records in a file, one JSON object a line, and beside it how much of them was sent.

    A metric's steps only rise: one at or below the last is dropped, so that steps which are trained again
    after a fault are not logged again (their values are the same: training is deterministic).
    """

    def __init__(self, folder: Path, on_problem: Callable[[str], None]):
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self._sent_path = folder / "spool.jsonl", folder / "sent.json"
        sent = _parse(self._sent_path.read_bytes()) if self._sent_path.exists() else None
        self._sent: int = (sent or {}).get("bytes", 0)
        self._last_step: dict[str, int] = (sent or {}).get("last_step", {})
        self._lock = threading.Lock()
        self._file = self.path.open("a+b")
        self._file.seek(self._sent)
        lines = self._file.read().rpartition(b"\n")[0].splitlines()  # a killed process may leave half a line
        records = [record for line in lines if (record := _parse(line)) is not None]
        if len(records) < len(lines):
            on_problem(f"{len(lines) - len(records)} unreadable lines of {self.path} are left out")
        self._file.truncate(self._sent)
        self._file.writelines(json.dumps(record).encode() + b"\n" for record in records)
        self._file.flush()
        for record in records:
            self._note_steps(record)

    def append(self, record: Record) -> None:
        with self._lock:
            if record["kind"] == "metrics":
                fresh = {k: v for k, v in record["values"].items() if record["step"] > self._last_step.get(k, -1)}
                record = {**record, "values": fresh}
                self._note_steps(record)
            self._file.seek(0, os.SEEK_END)
            self._file.write(json.dumps(record).encode() + b"\n")
            self._file.flush()

    def unsent(self) -> list[tuple[Record, int]]:
        """The waiting records, oldest first, each with the offset at which it ends."""
        with self._lock:
            self._file.seek(self._sent)
            end, waiting = self._sent, []
            for line in self._file:
                end += len(line)
                waiting.append((json.loads(line), end))
        return waiting

    def mark_sent(self, offset: int) -> None:
        """Records up to `offset` have arrived; once all have, the file starts anew."""
        with self._lock:
            if offset == self._file.seek(0, os.SEEK_END):
                self._file.truncate(0)
                offset = 0
            self._sent = offset
            temporary = self._sent_path.with_suffix(".tmp")
            temporary.write_text(json.dumps({"bytes": offset, "last_step": self._last_step}))
            temporary.replace(self._sent_path)

    def close(self) -> None:
        self._file.close()

    def _note_steps(self, record: Record) -> None:
        if record["kind"] == "metrics":
            self._last_step.update(dict.fromkeys(record["values"], record["step"]))


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
