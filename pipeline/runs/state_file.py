"""Writing a state, with the error of the disk that could not take it."""

import errno
import io
from pathlib import Path
from typing import Any


class _StateFile(io.BufferedWriter):
    """A file for torch to write: an error such as a full disk's is kept, which torch's own complaint hides."""

    def __init__(self, path: Path):
        super().__init__(io.FileIO(path, "w"))
        self.error = OSError(errno.EIO, "torch cannot write it", str(path))

    def write(self, content: Any) -> int:
        try:
            return super().write(content)
        except OSError as e:
            self.error = e
            raise


def write_state(state: dict[str, Any], path: Path) -> None:
    """As `torch.save`.

    Raises:
        OSError: the disk is full, ...
    """
    import torch  # late: the driver does without

    with _StateFile(path) as f:  # given the path instead, torch holds the GIL for long
        try:
            torch.save(state, f)
        except RuntimeError as e:
            raise f.error from e
