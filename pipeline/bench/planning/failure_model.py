"""What failures and checkpoints cost a run, and how far apart its checkpoints should be: closed forms and a simulation.

The closed forms say at once which interval loses least; the simulation, which follows a run from failure to failure
and assumes less, says how far they can be trusted. Pure functions of numpy, times in seconds.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOO_MANY = 2_000  # failures in one run, from which on following each of them would take long
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class FailureModel:
    """How often a job fails, and what that costs. In its methods `interval` is the training between two checkpoints.

    mtbf: mean time between failures of the whole job. restart: from a failure to the next step's begin. hold: what a
    checkpoint takes from the step path. write: how long it is being written beside training.
    """

    mtbf: float
    restart: float
    hold: float
    write: float

    def young(self) -> float:
        """The interval that loses least, to first order (Young 1974, "A first order approximation")."""
        return math.sqrt(2 * self.hold * self.mtbf)

    def daly(self) -> float:
        """To higher order (Daly 2006, "A higher order estimate of the optimum checkpoint interval", eq. 37)."""
        if self.hold >= 2 * self.mtbf:
            return self.mtbf
        x = self.hold / (2 * self.mtbf)
        return self.young() * (1 + math.sqrt(x) / 3 + x / 9) - self.hold

    def best_interval(self) -> float:
        """Daly's interval, but no shorter than a write: one that is due during another is postponed."""
        return max(self.daly(), self.write)

    def goodput(self, interval: float) -> float:
        """The share of wall time that trains steps which are kept; 0 where a run would hardly ever end.

        Daly's complete model (2006, eq. 20; failures exponential, also during a restart), and for each failure `write`
        more of training lost: a checkpoint that was still being written is none.
        """
        if self.write >= self.mtbf or (interval + self.hold + self.restart) / self.mtbf > 100:
            return 0.0
        wall = self.mtbf * math.exp(self.restart / self.mtbf) * math.expm1((interval + self.hold) / self.mtbf)
        return (1 - self.write / self.mtbf) * interval / wall

    def simulate(
        self, work: float, interval: float, *, num_runs: int | None = None, seed: int = 0
    ) -> FloatArray | None:
        """The goodput of `num_runs` runs of `work` seconds of training, drawn failure by failure.

        Between two failures a run makes whole segments of `interval` and a hold; those count whose checkpoint was
        written in time. A failure during a restart begins it anew.

        Args:
            num_runs: by default many where failures are rare, so that some runs meet one.

        Returns:
            (num_runs,) goodputs; None where a run has too many failures to follow.
        """
        expected = self.goodput(interval)
        if expected == 0 or work / expected / self.mtbf > TOO_MANY:
            return None
        num_runs = num_runs or int(min(20_000, max(200, 1e6 * expected * self.mtbf / work)))
        rng = np.random.default_rng(seed)
        segment = interval + self.hold
        left, wall = np.full(num_runs, float(work)), np.zeros(num_runs)
        running = np.arange(num_runs)
        while len(running):
            until = rng.exponential(self.mtbf, len(running))
            needed = left[running] + self.hold * np.ceil(left[running] / interval)
            ends = until >= needed
            wall[running] += np.minimum(until, needed)
            running, until = running[~ends], until[~ends]
            kept = np.maximum(np.floor((until - self.write) / segment), 0) * interval
            left[running] -= np.minimum(kept, left[running])
            wall[running] += self._draw_restarts(rng, len(running))
        return work / wall

    def _draw_restarts(self, rng: np.random.Generator, count: int) -> FloatArray:
        """How long each of `count` restarts takes with those that fail on the way."""
        times = np.zeros(count)
        waiting = np.arange(count)
        while len(waiting):
            until = rng.exponential(self.mtbf, len(waiting))
            times[waiting] += np.minimum(until, self.restart)
            waiting = waiting[until < self.restart]
        return times
