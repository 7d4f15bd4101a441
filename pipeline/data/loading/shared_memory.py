"""Memory for whole batches that two processes share."""

import mmap
import os

import numpy as np

from pipeline.data.index import OpenFile
from pipeline.data.loading.fetch import Bytes


class SharedBuffer:
    """Memory without a name that grows: nothing is left of it, in /dev/shm or elsewhere, when its processes are gone.

    Args:
        descriptor: of one that another process has made; None to make one.
    """

    def __init__(self, descriptor: int | None = None):
        self._file = OpenFile(os.memfd_create("batch") if descriptor is None else os.dup(descriptor))
        self._mapped: mmap.mmap | None = None

    @property
    def descriptor(self) -> int:
        return self._file.descriptor

    def reserve(self, num_bytes: int) -> memoryview:
        """Room to write so many bytes; views that were given out before may not be used any more."""
        if self._mapped is None or len(self._mapped) < num_bytes:
            os.ftruncate(self.descriptor, max(num_bytes, os.fstat(self.descriptor).st_size))
            self._mapped = mmap.mmap(self.descriptor, 0)
        return memoryview(self._mapped)[:num_bytes]

    def view(self, num_bytes: int) -> Bytes:
        """So many bytes that the other process has written: uint8, to be read only."""
        if self._mapped is None or len(self._mapped) < num_bytes:
            self._mapped = mmap.mmap(self.descriptor, 0)
        return np.frombuffer(self._mapped, np.uint8, num_bytes)
