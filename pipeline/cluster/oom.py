"""Too little memory: refused before a training begins, and told where the kernel has killed for it."""

from pipeline import machine
from pipeline.errors import UserError

# The peak of what ResNet-18 took on small images (PSS, one run each): this process, the driver and Ray's; each worker,
# with 75 MB for each of the two processes that read for it.
# With a little less the kernel kills, or drops and reads again the code that runs, and the machine stands still.
RAY_BYTES, WORKER_BYTES = 1.32e9, 0.85e9


def require_memory(num_workers: int) -> None:
    """Refuse what would end by the kernel's killing processes, which tells nobody why.

    A larger network takes more; then `OutOfMemoryKills` tells.

    Raises:
        UserError: this process may not have the memory that so many workers take here.
    """
    needed = RAY_BYTES + num_workers * WORKER_BYTES
    if (there := machine.memory()) < needed:
        raise UserError(
            f"cluster.workers={num_workers}: there are {_gb(there)} of memory here, and that takes "
            f"{_gb(needed)} at least; raise the container's or job's limit"
            f"{', or lower cluster.workers' * (num_workers > 1)}"
        )


class OutOfMemoryKills:
    """Whether the kernel has killed processes for lack of memory since it was last asked: Ray and Python can't tell."""

    def __init__(self) -> None:
        self._known = machine.out_of_memory_kills()

    def explain(self, text: str) -> str:
        """`text`, which says how something ended, with that before it."""
        known, self._known = self._known, machine.out_of_memory_kills()
        if self._known <= known:
            return text
        return f"the kernel has killed a process for lack of memory, of which there are {_gb(machine.memory())}; {text}"


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.1f} GB"
