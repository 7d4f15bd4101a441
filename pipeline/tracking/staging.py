"""Folders that wait to be uploaded: hard-linked aside, so that what they are of may be deleted meanwhile."""

import os
import shutil
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path

CHECKPOINTS = "step_*.*/"  # among what is staged


class Staging:
    """Staged folders, each below a directory by a name of its own, which is what records say."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._in_use: str | None = None
        self._lock = threading.Lock()

    def use(self, name: str | None) -> None:
        """Keep the one of this name, which is being uploaded; and none from before."""
        with self._lock:
            self._in_use = name

    def link(self, source: Path) -> str:
        """Stage a folder's files as they are now; return the new folder's name.

        Raises:
            OSError: that cannot be done.
        """
        # Not what a process that was killed has left of a file that it was writing.
        ignore = shutil.ignore_patterns(".*")
        return self.save(source.name, lambda to: shutil.copytree(source, to, True, ignore, _link, dirs_exist_ok=True))

    def save(self, name: str, write: Callable[[Path], object]) -> str:
        """Stage what `write` puts into a folder; return the folder's name.

        Raises:
            OSError: it cannot.
        """
        staged = self._folder / f"{name}.{time.time_ns()}"
        try:
            staged.mkdir()
            write(staged)
        except OSError:
            shutil.rmtree(staged, ignore_errors=True)
            raise
        return staged.name

    def num_checkpoints(self) -> int:
        """How many are staged."""
        return len(list(self._folder.glob(CHECKPOINTS)))

    def drop_oldest(self) -> str | None:
        """Delete the oldest checkpoint that is staged, but for the one in use; what that ends, if any.

        One whose files are here alone if there is one; the checkpoint of another one can be deleted next.
        """
        with self._lock:
            waiting = [staged for staged in self._folder.glob(CHECKPOINTS) if staged.name != self._in_use]
            if not waiting:
                return None
            oldest = min(waiting, key=lambda staged: (_is_linked(staged), staged.suffix))
            hidden = oldest.with_name(f".{oldest.name}")  # what is half deleted is not sent
            oldest.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
        return f"the upload of {oldest.stem} to MLflow"

    def remove_others(self, waiting: Collection[str]) -> None:
        """Delete what a process has left that was killed while it staged or deleted a folder."""
        for path in self._folder.glob("*.*/"):
            if path.suffix[1:].isdecimal() and path.name not in waiting:
                shutil.rmtree(path, ignore_errors=True)


def _is_linked(staged: Path) -> bool:
    """Whether a checkpoint's files are elsewhere, too."""
    return any(file.stat().st_nlink > 1 for file in staged.iterdir())


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy(source, target)
