"""What MLflow has not got yet of a run on an object store, kept in the run: a spool's machine may be lost."""

from contextlib import suppress
from dataclasses import asdict

from pipeline.storage import Storage
from pipeline.tracking import outbox
from pipeline.tracking.mlflow_run import Target

FOLDER = "mlflow-backlog"  # in the run
HERE_ALONE = ("folder", "report")  # kinds of records of files that the spool's machine has


class Backlog:
    """What waits in a spool, kept in its run on an object store, too: the machine of the spool may be lost.

    Args:
        name: of the attempt's file. Later attempts' are higher: one that was superseded, and whose write comes late,
            replaces no later one's.
    """

    def __init__(self, run: Storage, records: outbox.Outbox, target: Target, name: str):
        self._folder, self._spool, self._target, self._name = run / FOLDER, records, target, name

    def save(self) -> None:
        """Keep what waits now.

        Raises:
            OSError: the storage does not take it, or the spool cannot be read.
        """
        lines, on_disk = self._spool.waiting()
        # What a full disk keeps from the spool's file is here alone: nobody's, so that this machine takes it, too.
        header = {"kind": "spool", "id": self._spool.id if on_disk else "", "target": asdict(self._target)}
        self._folder.write_bytes(self._name, outbox.to_line(header) + lines)

    def adopt(self) -> None:
        """Where another machine was the last to save, send what waited there, and not what is older and waits here.

        But for files, which are here alone.

        Raises:
            OSError: the storage does not give it.
        """
        _, records = read(self._folder.parent)
        if records and records[0]["id"] != self._spool.id:
            theirs = [record for record in records[1:] if record["kind"] not in HERE_ALONE]
            ours = [record for record, _ in self._spool.unsent() if record["kind"] in HERE_ALONE]
            self._spool.start_anew([*theirs, *ours])
        self.save()
        with suppress(OSError):  # not every login may delete
            for name in self._folder.names():
                if name < self._name:
                    self._folder.delete(name)


def read(run: Storage) -> tuple[str, list[outbox.Record]]:
    """What the run's folder on an object store has of a spool: the last attempt's name, if any, and the records.

    The first one says whose it is, and what for.
    """
    name = max((run / FOLDER).names(), default="")
    return name, outbox.parse_lines((run / FOLDER).read_bytes(name))[1] if name else []
