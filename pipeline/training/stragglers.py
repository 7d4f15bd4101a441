"""Which rank holds the others up: all wait for the slowest one in each step, and images/s does not tell who that is.

A rank's own time is what it computes and waits for images; the wait for other ranks is not in it. With synchronised
BatchNorm (`model.sync_bn`) ranks wait for each other in the midst of computing, and all seem equally slow.
"""

from collections.abc import Mapping, Sequence
from statistics import median_low

SLOW = 1.15  # times the median's own time
NUM_LOGS = 5  # in a row


class Stragglers:
    """Finds ranks that stay slower than the others.

    Args:
        hosts: of each rank. shares: images of each rank in a step.
        known: what was said of earlier attempts' ranks, by "worker RANK on HOST".

    Attributes:
        found: what was said, the latest of each.
    """

    def __init__(self, hosts: Sequence[str], shares: Sequence[int], known: Mapping[str, str] | None = None):
        self._names = [f"worker {rank} on {host}" for rank, host in enumerate(hosts)]
        # Who has more images takes longer by right; who has fewer is not held to a part of the time.
        self._allowed = [max(1.0, share / median_low(shares)) for share in shares]
        self._in_a_row, self._slow, self._told = ([0] * len(hosts) for _ in range(3))
        self.found = dict(known or {})

    def add(self, computing: Sequence[float], waiting: Sequence[float]) -> tuple[dict[str, float], list[str]]:
        """Take in the time between two logs.

        Args:
            computing, waiting: seconds of each rank; waiting for images.

        Returns:
            Metrics; and a line about each rank that has been slow for NUM_LOGS logs. Who stays so is told again after
            twice as many slow ones, and so on.
        """
        own = [c + w for c, w in zip(computing, waiting, strict=True)]
        if len(own) == 1 or not all(own):  # nothing is measured yet
            return {}, []
        ratios = [s / allowed / median_low(own) for s, allowed in zip(own, self._allowed, strict=True)]
        slowest, lines = max(range(len(own)), key=ratios.__getitem__), list[str]()
        for rank, ratio in enumerate(ratios):
            is_slow = ratio > SLOW
            self._slow[rank] += is_slow
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if is_slow else 0
            if self._in_a_row[rank] >= NUM_LOGS and self._slow[rank] >= 2 * self._told[rank]:
                self._told[rank] = self._slow[rank]
                by_images = waiting[rank] - median_low(waiting) > computing[rank] - median_low(computing)
                lines.append(self._tell(rank, ratio, by_images=by_images))
        return {"perf/slowest_worker": float(slowest), "perf/slowest_worker_ratio": ratios[slowest]}, lines

    def _tell(self, rank: int, ratio: float, *, by_images: bool) -> str:
        if by_images:
            cause = "its images come late: look at that machine's storage, network and CPUs"
        else:
            cause = "it computes slowly: look at its device's clock and temperature, and for other programs there"
        line = f"{self._names[rank]} holds the others up, {ratio:.2f} times the median's time a step: {cause}"
        self.found[self._names[rank]] = line
        return line
