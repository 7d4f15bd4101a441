"""Whose run it is: the driver's that came last.

STORAGE/NAME/drivers/00000003-8f0c...    an empty file, a driver's claim; it deletes those before

A claim is written once, by nobody else, and the highest name wins. So drivers that come at once agree on who is later
without any lock, also on an object store; and one that was cut off finds out before it writes again.
"""

import uuid
from dataclasses import dataclass

from pipeline.failures import FatalError
from pipeline.storage import Storage

FOLDER = "drivers"


class SupersededError(FatalError):
    """Another driver trains the run now."""


@dataclass(frozen=True)
class Claim:
    """A driver's, to a run's folder."""

    run: Storage
    name: str

    @classmethod
    def take(cls, run: Storage) -> "Claim":
        """The next one.

        Raises:
            SupersededError: another driver came at the same time, and is the one that goes on.
        """
        folder = run / FOLDER
        folder.make()
        number = int(max(_names(folder), default="0").partition("-")[0]) + 1
        claim = cls(run, f"{number:08d}-{uuid.uuid4().hex}")
        folder.write_bytes(claim.name, b"")
        claim.check()
        for name in _names(folder):
            if name < claim.name:
                folder.delete(name)
        return claim

    def check(self) -> None:
        """Make sure that this is still the last claim; to be called before anything of the run is written.

        Raises:
            SupersededError: another driver has claimed the run since.
            OSError: the storage does not answer, or this machine sees it as it was before.
        """
        last = max(_names(self.run / FOLDER), default="")
        if last < self.name:
            raise OSError(f"{self.run}: its driver's claim is not seen here; the storage is late, or another one")
        if last > self.name:
            raise SupersededError(f"another driver has begun to train {self.run}; this one ends")


def _names(folder: Storage) -> list[str]:
    return [name for name in folder.names() if name[:8].isdecimal()]
