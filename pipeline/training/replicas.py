"""Whether all ranks still hold the same weights, as DDP means them to.

Each rank makes every update itself, from the same averaged gradients. A bit that flips in a card's or a host's memory,
or a collective that went wrong, shows nowhere else: the averaged gradients hide it, and rank 0's weights are what is
evaluated and saved. So ranks compare checksums, also before each checkpoint: what is saved is what all agree on.
"""

from collections import Counter
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.runs.spec import WorkerContext
from pipeline.training.state import TrainState

PARTS = ("weights", "optimizer state", "averaged weights")
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes of an element


class ReplicasDifferError(RuntimeError):
    """The ranks' weights are no longer the same; the text says whose differ, and where that rank runs."""


def compare_replicas(state: TrainState, ctx: WorkerContext, hosts: Sequence[str]) -> None:
    """Compare what ranks have learned; called by all alike, with each rank's host. Waits for the device.

    BatchNorm's statistics are each rank's own until an evaluation, and are left out.

    Raises:
        ReplicasDifferError: on all ranks.
    """
    if ctx.world_size == 1:
        return
    own = checksums(state, ctx.device)
    gathered = [torch.empty_like(own) for _ in range(ctx.world_size)]
    dist.all_gather(gathered, own)
    of_all_ranks = [tuple(of_rank.tolist()) for of_rank in gathered]
    if len(set(of_all_ranks)) > 1:
        raise ReplicasDifferError(_describe(of_all_ranks, hosts, state.step))


@torch.no_grad()
def checksums(state: TrainState, device: torch.device) -> Tensor:
    """(3,) int64 on the device: of each of PARTS the sum of all elements' bits, each taken for an integer."""
    of_optimizer = [t for values in state.optimizer.state.values() for t in values.values() if isinstance(t, Tensor)]
    parts = (
        list(state.model.parameters()),
        [t for t in of_optimizer if t.ndim > 0],
        [] if state.ema is None else list(state.ema.parameters()),
    )
    zero = torch.zeros((), dtype=torch.int64, device=device)
    sums = [[t.view(BITS[t.element_size()]).sum(dtype=torch.int64) for t in tensors] for tensors in parts]
    return torch.stack([torch.stack([zero, *of_part]).sum() for of_part in sums])


def _describe(of_all_ranks: list[tuple[int, ...]], hosts: Sequence[str], step: int) -> str:
    """Who differs: all that are not of the largest group, or all, where another one is as large."""
    (largest, number), *others = Counter(of_all_ranks).most_common()
    is_tie = others[0][1] == number
    odd = [f"{rank} (on {hosts[rank]})" for rank, own in enumerate(of_all_ranks) if is_tie or own != largest]
    parts = " and ".join(
        part for part, sums in zip(PARTS, zip(*of_all_ranks, strict=True), strict=True) if len({*sums}) > 1
    )
    who = f"worker{'s' * (len(odd) > 1)} {', '.join(odd)}"
    what = f"{who} differ in their {parts}" if is_tie else f"{who}: other {parts} than the other {number} have"
    return (
        f"after step {step} {what}; nothing of it is saved. A device, a memory or the network is at fault, or workers "
        "of unlike hardware round differently: train.check_replicas=0 does not compare them"
    )
