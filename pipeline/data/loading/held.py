"""What a GPU still reads while its host goes on."""

from collections import deque
from collections.abc import Callable
from typing import Any

from pipeline.data.loading.fetch import EncodedBatch

MAX_BEHIND = 2  # batches


class HeldWhileRead:
    """Batches that a GPU may still read, with their images; its host is ahead of it, by MAX_BEHIND batches at the most.

    Once nobody holds them, bytes and pixels are overwritten.

    Args:
        mark: an event behind all that is launched so far, as `torch.cuda.Event`; None: all is done.
    """

    def __init__(self, mark: Callable[[], Any]):
        self._mark, self._held = mark, deque[tuple[Any, EncodedBatch, Any]]()

    def add(self, batch: EncodedBatch, images: Any) -> None:
        """Hold a batch until what was launched so far is done; let go of those that have been read."""
        self._held.append((self._mark(), batch, images))
        while self._held:
            event = self._held[0][0]
            if event is not None and not event.query():
                if len(self._held) <= MAX_BEHIND:
                    return
                event.synchronize()
            self._held.popleft()[1].release()

    @property
    def batches(self) -> list[EncodedBatch]:
        return [batch for _, batch, _ in self._held]
