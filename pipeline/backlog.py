"""What MLflow has not got yet of a run on an object store, kept in the run: a spool's machine may be lost."""

from dataclasses import asdict

from pipeline import spool
from pipeline.mlflow_run import Target
from pipeline.storage import Storage

FOLDER = "mlflow-backlog"  # in the run
OF_ANY_MACHINE = ("params", "tags", "metrics", "text", "model")  # kinds of records that need no file of one machine


class Backlog:
    """What waits in a spool, kept in its run on an object store, too: the machine of the spool may be lost.

    A file for each session: one that was superseded, and whose write comes late, replaces no later one's.
    """

    def __init__(self, run: Storage, records: spool.Spool, target: Target, session: int):
        self._folder, self._spool, self._name = run / FOLDER, records, f"{session:08d}.jsonl"
        self._header = spool.to_line({"kind": "spool", "id": records.id, "target": asdict(target)})

    def save(self, lines: bytes) -> None:
        """Keep what waits now.

        Raises:
            OSError: the storage does not take it.
        """
        self._folder.write_bytes(self._name, self._header + lines)

    def adopt(self) -> None:
        """Where another machine was the last to save, send what waited there, and not what is older and waits here.

        But for files, which are here alone.

        Raises:
            OSError: the storage does not give it.
        """
        records = _newest(self._folder)
        if records and records[0].get("id") != self._spool.id:
            theirs = [record for record in records if record["kind"] in OF_ANY_MACHINE]
            ours = [record for record, _ in self._spool.unsent() if record["kind"] not in OF_ANY_MACHINE]
            self._spool.start_anew([*theirs, *ours])
        self.save(self._spool.waiting())
        for name in self._folder.names():
            if name < self._name:
                self._folder.delete(name)


def target_of(run: Storage) -> Target | None:
    """Where the run is logged, if its folder says so."""
    records = _newest(run / FOLDER)
    return Target(**records[0]["target"]) if records else None


def read(run: Storage) -> list[spool.Record]:
    """What the run's folder on an object store has of a spool."""
    return _newest(run / FOLDER)


def _newest(folder: Storage) -> list[spool.Record]:
    names = folder.names()
    return spool.parse_lines(folder.read_bytes(names[-1]))[1] if names else []
