"""What failures and checkpoints cost a run, and how far apart its checkpoints should be: closed forms and a simulation.

The closed forms say at once which interval loses least; the simulation, which follows a run from failure to failure
and assumes less, says how far they can be trusted. Pure functions of numpy, times in seconds. `interval` is the
training between two checkpoints, `hold` what one takes from the step path, `write` how long it is being written beside
training.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOO_MANY = 2_000  # failures in one run, from which on following each of them would take long
FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Outages:
    """mtbf: mean time between failures of the whole job. restart: from a failure to the next step's begin."""

    mtbf: float
    restart: float
    hold: float
    write: float


def young(hold: float, mtbf: float) -> float:
    """The interval that loses least, to first order (Young 1974, "A first order approximation")."""
    return math.sqrt(2 * hold * mtbf)


def daly(hold: float, mtbf: float) -> float:
    """The same to higher order (Daly 2006, "A higher order estimate of the optimum checkpoint interval", eq. 37)."""
    if hold >= 2 * mtbf:
        return mtbf
    x = hold / (2 * mtbf)
    return young(hold, mtbf) * (1 + math.sqrt(x) / 3 + x / 9) - hold


def best_interval(o: Outages) -> float:
    """Daly's interval, but no shorter than a write: one that is due during another is postponed."""
    return max(daly(o.hold, o.mtbf), o.write)


def goodput(interval: float, o: Outages) -> float:
    """The share of wall time that trains steps which are kept; 0 where a run would hardly ever end.

    Daly's complete model (2006, eq. 20; failures exponential, also during a restart), and for each failure `write`
    more of training lost: a checkpoint that was still being written is none.
    """
    if o.write >= o.mtbf or (interval + o.hold + o.restart) / o.mtbf > 100:
        return 0.0
    wall = o.mtbf * math.exp(o.restart / o.mtbf) * math.expm1((interval + o.hold) / o.mtbf) / interval
    return (1 - o.write / o.mtbf) / wall


def simulate(
    work: float, interval: float, o: Outages, *, num_runs: int | None = None, seed: int = 0
) -> FloatArray | None:
    """The goodput of `num_runs` runs of `work` seconds of training, drawn failure by failure.

    Between two failures a run makes whole segments of `interval` and a hold; those count whose checkpoint was written
    in time. A failure during a restart begins it anew.

    Args:
        num_runs: by default many where failures are rare, so that some runs meet one.

    Returns:
        (num_runs,) goodputs; None where a run has too many failures to follow.
    """
    expected = goodput(interval, o)
    if expected == 0 or work / expected / o.mtbf > TOO_MANY:
        return None
    num_runs = num_runs or int(min(20_000, max(200, 1e6 * expected * o.mtbf / work)))
    rng = np.random.default_rng(seed)
    segment = interval + o.hold
    left, wall = np.full(num_runs, float(work)), np.zeros(num_runs)
    going = np.arange(num_runs)
    while len(going):
        until = rng.exponential(o.mtbf, len(going))
        needed = left[going] + o.hold * np.ceil(left[going] / interval)
        ends = until >= needed
        wall[going] += np.minimum(until, needed)
        going, until = going[~ends], until[~ends]
        kept = np.maximum(np.floor((until - o.write) / segment), 0) * interval
        left[going] -= np.minimum(kept, left[going])
        wall[going] += _restarts(rng, len(going), o)
    return work / wall


def _restarts(rng: np.random.Generator, count: int, o: Outages) -> FloatArray:
    """How long each of `count` restarts takes with those that fail on the way."""
    times = np.zeros(count)
    waiting = np.arange(count)
    while len(waiting):
        until = rng.exponential(o.mtbf, len(waiting))
        times[waiting] += np.minimum(until, o.restart)
        waiting = waiting[until < o.restart]
    return times
