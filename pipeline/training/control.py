"""What all ranks do at a step boundary, decided by rank 0.

Whether to stop or to save is known to rank 0 alone, and all must do it after the same step. Its word travels
beside a whole step on a group of its own, so that nobody waits for it: it holds one step later.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class ControlFlags:
    stop: bool = False
    save: bool = False


class ControlBroadcast:
    """Rank 0's word for every step; alike on all ranks.

    Args:
        timeout_s: how long a silent rank is waited for.
        patience_s: how much longer in `gather_late`.
    """

    def __init__(self, world_size: int, timeout_s: float, patience_s: float = 0.0):
        self._alone = world_size == 1
        self._group, self._late_group = self._make_group(timeout_s), self._make_group(timeout_s + patience_s)
        self._sent: tuple[torch.Tensor, Any] | None = None

    def _make_group(self, timeout_s: float) -> Any:
        return None if self._alone else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def exchange(self, flags: ControlFlags) -> ControlFlags:
        """Give this step's word (rank 0's counts) and take the one that holds now."""
        if self._alone:
            return flags
        arrived = self.finish()
        sent = torch.tensor([flags.stop, flags.save], dtype=torch.uint8)
        self._sent = sent, dist.broadcast(sent, 0, group=self._group, async_op=True)
        return arrived

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, by rank; called by all alike. Waits for no device, and takes none of its memory."""
        return self._gather(value, self._group)

    def gather_late(self, value: Any) -> list[Any]:
        """The same, where some ranks may come much later than others, as they have compiled the network."""
        return self._gather(value, self._late_group)

    def _gather(self, value: Any, group: Any) -> list[Any]:
        if self._alone:
            return [value]
        values: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(values, value, group=group)
        return values

    def finish(self) -> ControlFlags:
        """Take the word under way, if there is one."""
        if self._sent is None:
            return ControlFlags()
        (sent, work), self._sent = self._sent, None
        work.wait()
        return ControlFlags(*map(bool, sent.tolist()))
