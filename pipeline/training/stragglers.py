"""Which rank holds the others up: all wait for the slowest one in each step, and images/s does not tell who that is.

A rank's own time is what it computes and waits for images; the wait for other ranks is not in it. What else its process
does meanwhile is, as rank 0's talk to MLflow. With synchronised BatchNorm (`model.sync_bn`) ranks wait for each other
in the midst of computing, and all seem equally slow.
"""

from collections.abc import Mapping, Sequence
from statistics import median_low

SLOW = 1.15  # times the median's own time
NUM_LOGS = 5  # in a row, and at least
MIN_S = 60.0  # of its own time: less is a moment in which something else goes on
MAX_NAMED = 3  # at a time
MAX_KEPT = 20


class Stragglers:
    """Finds ranks that stay slower than the others.

    Args:
        hosts: of each rank. shares: images of each rank in a step.
        known: what was found of earlier attempts' ranks, by "worker RANK on HOST".

    Attributes:
        found: how slow each was when it was last told, the newest last.
    """

    def __init__(self, hosts: Sequence[str], shares: Sequence[int], known: Mapping[str, str] | None = None):
        self._names = [f"worker {rank} on {host}" for rank, host in enumerate(hosts)]
        # Who has more images takes longer by right; who has fewer is not held to a part of the time.
        self._allowed = [max(1.0, share / median_low(shares)) for share in shares]
        self._in_a_row, self._slow, self._told = ([0] * len(hosts) for _ in range(3))
        self._slow_s = [0.0] * len(hosts)  # in a row
        self.found = dict(known or {})

    def add(self, step: int, computing: Sequence[float], waiting: Sequence[float]) -> tuple[dict[str, float], str]:
        """Take in the time between two logs.

        Args:
            step: of the log. computing, waiting: seconds of each rank; waiting for images.

        Returns:
            Metrics; and a line about ranks that have been slow for long, or "". Who stays so is told again after twice
            as many slow logs, and so on.
        """
        own = [c + w for c, w in zip(computing, waiting, strict=True)]
        if len(own) == 1 or not all(own):  # nothing is measured yet
            return {}, ""
        median, median_computing, median_waiting = map(median_low, (own, computing, waiting))
        ratios = [s / allowed / median for s, allowed in zip(own, self._allowed, strict=True)]
        told = dict[int, str]()
        for rank in sorted(range(len(own)), key=ratios.__getitem__):  # so that of many the slowest is kept
            is_slow = ratios[rank] > SLOW
            self._slow[rank] += is_slow
            self._in_a_row[rank] = self._in_a_row[rank] + 1 if is_slow else 0
            self._slow_s[rank] = self._slow_s[rank] + own[rank] if is_slow else 0.0
            is_long = self._in_a_row[rank] >= NUM_LOGS and self._slow_s[rank] >= MIN_S
            if is_long and self._slow[rank] >= 2 * self._told[rank]:
                self._told[rank] = self._slow[rank]
                by_images = waiting[rank] - median_waiting > computing[rank] - median_computing
                how = "for its images" if by_images else "to compute"
                told[rank] = f"{ratios[rank]:.2f} times the median's time, {how}"
                self.found.pop(self._names[rank], None)
                self.found[self._names[rank]] = f"{told[rank]}, by step {step}"
        self.found = dict(list(self.found.items())[-MAX_KEPT:])
        slowest = max(range(len(own)), key=ratios.__getitem__)
        metrics = {"perf/slowest_worker": float(slowest), "perf/slowest_worker_ratio": ratios[slowest]}
        return metrics, self._line(list(reversed(told)), told)

    def _line(self, ranks: Sequence[int], told: Mapping[int, str]) -> str:
        if not ranks:
            return ""
        named = "; ".join(f"{self._names[rank]} takes {told[rank]}" for rank in ranks[:MAX_NAMED])
        more = f"; and {len(ranks) - MAX_NAMED} others are slow" if len(ranks) > MAX_NAMED else ""
        fix = "look at the device's clock and temperature, at storage and network, and for other programs there"
        return f"all wait in each step for the slowest: {named}{more}; {fix}"
