"""What ranks tell each other of the steps between two logs, read without the device standing still for it."""

from collections import deque
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runs.spec import WorkerContext
from pipeline.tracking.ledger import COMPUTE, Reading, TimeLedger, total

PARTS = (COMPUTE, ("data wait",))  # phases that are a rank's own


@dataclass(frozen=True)
class Interval:
    """The steps since the last interval.

    step: the last of them. is_logged: whether a log is due at it. losses: of each step, the mean over its global batch.
    num_bad: broken images that ranks have met so far, the sum of their numbers. seconds: per phase, up to here.
    computing, waiting: seconds of each rank, those for images apart, between logs; they come one interval late, on
    GPUs two. Of the first interval, which warms up, there are none.
    """

    step: int
    is_logged: bool
    losses: list[float]
    num_bad: int
    seconds: dict[str, float]
    computing: list[float]
    waiting: list[float]


@dataclass(frozen=True)
class _Pending:
    step: int
    is_logged: bool
    sums: Tensor  # on the host, once the reading is there
    reading: Reading


class LossReader:
    """Gathers the losses of all ranks, and how long each rank took.

    Args:
        late: give an interval to the caller when the next one ends, so that a GPU has the steps in between to compute
            while the host waits for this one's. On a CPU nothing would be gained.
    """

    def __init__(self, ctx: WorkerContext, ledger: TimeLedger, *, late: bool):
        self._ctx, self._ledger, self._late = ctx, ledger, late
        self._losses: list[Tensor] = []
        self._pending = deque[_Pending]()
        self._counted: tuple[float, ...] | None = None  # this rank's seconds of `PARTS`, as of the last interval given
        self._unsent: tuple[float, ...] = (0.0, 0.0)  # of them, what other ranks do not know
        self._of_ranks = [0.0] * (2 * ctx.world_size)  # since the last log that was given

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
        device, world_size = self._ctx.device, self._ctx.world_size
        spent = torch.zeros(2, world_size, device=device)
        for part, seconds in enumerate(self._unsent):
            spent[part, self._ctx.rank].fill_(seconds)  # to set an item would copy, and wait for the device
        sums = torch.cat([torch.stack(self._losses), torch.full((1,), float(num_bad), device=device), spent.flatten()])
        self._losses.clear()
        self._unsent = (0.0, 0.0)
        if world_size > 1:
            with self._ledger.phase("communication wait"):
                dist.all_reduce(sums)
        if sums.is_cuda:
            sums = torch.empty_like(sums, device="cpu", pin_memory=True).copy_(sums, non_blocking=True)
        self._pending.append(_Pending(step, is_logged, sums, self._ledger.read_later()))
        return self.rest(keep=1 if self._late and not now else 0)

    def rest(self, keep: int = 0) -> list[Interval]:
        """The intervals that have ended and were not given yet, but for the last `keep`."""
        return [self._take() for _ in range(len(self._pending) - keep)]

    def _take(self) -> Interval:
        pending, world_size = self._pending.popleft(), self._ctx.world_size
        seconds = pending.reading.wait()  # the copy came before it in the device's stream
        counted = tuple(total(seconds, *names) for names in PARTS)
        if self._counted is not None:
            spent = zip(self._unsent, counted, self._counted, strict=True)
            self._unsent = tuple(unsent + now - before for unsent, now, before in spent)
        self._counted = counted
        values = pending.sums.tolist()
        num_steps = len(values) - 1 - 2 * world_size
        losses, num_bad, spent_by = values[:num_steps], values[num_steps], values[num_steps + 1 :]
        of_ranks = [known + new for known, new in zip(self._of_ranks, spent_by, strict=True)]
        self._of_ranks = [0.0] * len(of_ranks) if pending.is_logged else of_ranks
        computing, waiting = of_ranks[:world_size], of_ranks[world_size:]
        return Interval(pending.step, pending.is_logged, losses, int(num_bad), seconds, computing, waiting)
