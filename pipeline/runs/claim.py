"""Whose run it is: the driver's that came last.

STORAGE/NAME/drivers/00000003-1a2b...-8f0c...    an empty file, a driver's claim; it deletes those before

A claim is written once, by nobody else, and the highest name wins. So drivers that come at once agree on who is later
without any lock, also on an object store; and one that was cut off finds out before it writes again.
"""

import uuid
from contextlib import suppress
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
    def take(cls, run: Storage, command: str = "", *, reclaims: bool = False) -> "Claim":
        """The next one.

        Args:
            command: the user's, by a name of its own.
            reclaims: an earlier driver of this command had claimed the run.

        Raises:
            SupersededError: another driver came at the same time, and is the one that goes on; or another command came
                since this one's earlier driver.
        """
        folder = run / FOLDER
        folder.make()
        number, _, last_command = max(_names(folder), default="0").partition("-")
        if reclaims and last_command and not last_command.startswith(command):
            raise SupersededError(f"another command has begun to train {run}; this one ends")
        claim = cls(run, f"{int(number) + 1:08d}-{command}-{uuid.uuid4().hex}")
        folder.write_bytes(claim.name, b"")
        claim.check()
        with suppress(OSError):  # not every login may delete
            for name in _names(folder):
                if name < claim.name:
                    folder.delete(name)
        return claim

    @classmethod
    def last(cls, run: Storage) -> "Claim | None":
        """The one that the run has; for who only looks whether another comes."""
        names = _names(run / FOLDER)
        return cls(run, max(names)) if names else None

    def check(self) -> None:
        """Make sure that this is still the last claim; to be called before anything of the run is written.

        Raises:
            SupersededError: another driver has claimed the run since.
            OSError: the storage does not answer, or this machine sees it as it was before.
        """
        last = max(_names(self.run / FOLDER), default="")
        if last < self.name:
            raise OSError(
                f"{self.run}: this driver's file in {FOLDER}/ is not visible; mount the same run.storage on all nodes"
            )
        if last > self.name:
            raise SupersededError(f"another driver has begun to train {self.run}; this one ends")


def _names(folder: Storage) -> list[str]:
    return [name for name in folder.names() if name[:8].isdecimal()]
