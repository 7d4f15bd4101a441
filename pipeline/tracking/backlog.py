"""What MLflow has not got yet of a run on an object store, kept in the run: an outbox's machine may be lost."""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass

from pipeline.storage import Storage
from pipeline.tracking.mlflow_run import Target
from pipeline.tracking.outbox import Outbox
from pipeline.tracking.records import Record, Staged, parse_lines

FOLDER = "mlflow-backlog"  # in the run


@dataclass(frozen=True)
class Saved:
    """What waited in the outbox with the id `owner`, which is for `target`. name: of the attempt's file."""

    name: str
    owner: str
    target: Target
    records: list[Record]


class Backlog:
    """Keeps what waits in an outbox in its run on an object store, too.

    Args:
        name: of the attempt's file. Later attempts' are higher: one that was superseded, and whose write comes late,
            replaces no later one's.
    """

    def __init__(self, run: Storage, outbox: Outbox, target: Target, name: str):
        self._run, self._folder, self._outbox, self._target, self._name = run, run / FOLDER, outbox, target, name

    def save(self) -> None:
        """Keep what waits now.

        Raises:
            OSError: the storage does not take it, or the outbox cannot be read.
        """
        lines, on_disk = self._outbox.unsent_lines()
        # What a full disk keeps from the outbox's file is here alone: nobody's, so that this machine takes it, too.
        header = {"owner": self._outbox.id if on_disk else "", "target": asdict(self._target)}
        self._folder.write_bytes(self._name, json.dumps(header).encode() + b"\n" + lines)

    def adopt(self) -> None:
        """Where another machine was the last to save, send what waited there, and not what is older and waits here.

        But for files, which are here alone.

        Raises:
            OSError: the storage does not give it.
        """
        saved = read(self._run)
        if saved is not None and saved.owner != self._outbox.id:
            theirs = [record for record in saved.records if not isinstance(record, Staged)]
            ours = [record for record, _ in self._outbox.unsent() if isinstance(record, Staged)]
            self._outbox.replace([*theirs, *ours])
        self.save()
        with suppress(OSError):  # not every login may delete
            for name in self._folder.names():
                if name < self._name:
                    self._folder.delete(name)


def read(run: Storage) -> Saved | None:
    """What the last attempt saved into its run's folder, if any did and it is sound."""
    if not (names := (run / FOLDER).names()):
        return None
    header, _, lines = (run / FOLDER).read_bytes(name := max(names)).partition(b"\n")
    try:
        content = json.loads(header)
        return Saved(name, content["owner"], Target(**content["target"]), parse_lines(lines)[1])
    except (ValueError, KeyError, TypeError):
        return None
