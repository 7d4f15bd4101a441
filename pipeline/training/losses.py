"""The losses of the steps between two logs, read without the device standing still for it."""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runs.spec import WorkerContext
from pipeline.tracking.ledger import Reading, TimeLedger


@dataclass(frozen=True)
class Interval:
    """The steps since the last interval.

    step: the last of them. is_logged: whether a log is due at it. losses: of each step, the mean over its global batch.
    num_bad: broken images that ranks have met so far, the sum of their numbers. seconds: per phase, up to here.
    """

    step: int
    is_logged: bool
    losses: list[float]
    num_bad: int
    seconds: dict[str, float]


@dataclass(frozen=True)
class _Pending:
    step: int
    is_logged: bool
    sums: Tensor  # on the host, once the reading is there
    reading: Reading


class LossReader:
    """Gathers the losses of all ranks.

    Args:
        late: give an interval to the caller when the next one ends, so that a GPU has the steps in between to compute
            while the host waits for this one's. On a CPU nothing would be gained.
    """

    def __init__(self, ctx: WorkerContext, ledger: TimeLedger, *, late: bool):
        self._ctx, self._ledger, self._late = ctx, ledger, late
        self._losses: list[Tensor] = []
        self._pending = deque[_Pending]()

    def add(self, loss: Tensor) -> None:
        """This rank's part of a step's loss, on the device."""
        self._losses.append(loss)

    def end_interval(self, step: int, num_bad: int, *, is_logged: bool, now: bool) -> list[Interval]:
        """End an interval; on all ranks alike.

        Args:
            num_bad: broken images that this rank has met.
            now: wait for this one, too.

        Returns:
            The intervals whose losses are there, in order.
        """
        sums = torch.cat([torch.stack(self._losses), torch.full((1,), float(num_bad), device=self._ctx.device)])
        self._losses.clear()
        if self._ctx.world_size > 1:
            dist.all_reduce(sums)
        if sums.is_cuda:
            sums = torch.empty_like(sums, device="cpu", pin_memory=True).copy_(sums, non_blocking=True)
        self._pending.append(_Pending(step, is_logged, sums, self._ledger.read_later()))
        return self.rest(keep=1 if self._late and not now else 0)

    def rest(self, keep: int = 0) -> list[Interval]:
        """The intervals that have ended and were not given yet, but for the last `keep`."""
        return [self._take() for _ in range(len(self._pending) - keep)]

    def _take(self) -> Interval:
        pending = self._pending.popleft()
        seconds = pending.reading.wait()  # the copy came before it in the device's stream
        *losses, num_bad = pending.sums.tolist()
        return Interval(pending.step, pending.is_logged, losses, int(num_bad), seconds)
