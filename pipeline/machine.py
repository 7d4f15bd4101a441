"""What this process may use of its machine: cores and memory, as containers and batch systems limit them, and as others
leave them; its user, and the processes below it.

The operating system's own figures are the whole machine's. A limit is in a cgroup: in that of the process, or in one
above it, of version 1 or 2 (<https://docs.kernel.org/admin-guide/cgroup-v2.html>, cpu.max and memory.max).
"""

import getpass
import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

PROC = Path("/proc")
UNLIMITED_BYTES = 2**60  # version 1 has no word for it: what is above is none


def has_unused_gpus(dev: Path = Path("/dev")) -> bool:
    """Whether files of NVIDIA's GPUs are here, for one that has found none and was not told to."""
    return "CUDA_VISIBLE_DEVICES" not in os.environ and any(dev.glob("nvidia[0-9]*"))


def cpu_count(proc: Path = PROC) -> int:
    """How many cores this process can keep busy: of those that it may run on, as many as its quota pays for.

    Part of a core counts as one, since a thread is not divisible.
    """
    quotas = [quota for folder in _cgroups("cpu", proc) if (quota := _cpu_quota(folder)) is not None]
    return max(1, min([len(os.sched_getaffinity(0)), *map(math.ceil, quotas)]))


def memory_limit(proc: Path = PROC) -> int | None:
    """Bytes that this process and its neighbours in the cgroup may have; None: all that the machine has."""
    limits = [
        limit
        for folder in _cgroups("memory", proc)
        for name in ("memory.max", "memory.limit_in_bytes")
        if (limit := _number(folder / name)) is not None
    ]
    limit = min(limits, default=UNLIMITED_BYTES)
    return limit if limit < UNLIMITED_BYTES else None


def memory(proc: Path = PROC) -> int:
    """Bytes that this process may have, as far as the machine has them."""
    whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(whole, memory_limit(proc) or whole)


def out_of_memory_kills(proc: Path = PROC) -> int:
    """How many processes the kernel has killed for memory: in the cgroup, else on the whole machine; 0 if unknown."""
    files = [folder / name for folder in _cgroups("memory", proc) for name in ("memory.events", "memory.oom_control")]
    for file in files if memory_limit(proc) is not None else [proc / "vmstat"]:
        for line in _lines(file):
            key, _, count = line.partition(" ")
            if key == "oom_kill" and count.strip().isdecimal():
                return int(count)
    return 0


def busy_seconds() -> list[float]:
    """Seconds that each of the cores that this process may run on has worked since the machine was started."""
    times = psutil.cpu_times(percpu=True)
    cores = (times[core] for core in os.sched_getaffinity(0) if core < len(times))
    return [core.user + core.nice + core.system + core.irq + core.softirq for core in cores]


class OtherLoad:
    """What other processes do with this process's cores, from now on."""

    def __init__(self) -> None:
        self._began, self._used, self._own = time.monotonic(), sum(busy_seconds()), sum(os.times()[:2])

    def num_busy_cores(self) -> float:
        """How many of the cores they have kept busy."""
        others = sum(busy_seconds()) - self._used - (sum(os.times()[:2]) - self._own)
        return max(0.0, others / max(time.monotonic() - self._began, 1e-3))

    def is_high(self) -> bool:
        """Whether they take half of the cores or more."""
        return self.num_busy_cores() >= len(os.sched_getaffinity(0)) / 2


def user_name() -> str:
    """The user's name, or number where the system knows no name: in a container, any number may be the user."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13
        return str(os.getuid())


def _cgroups(controller: str, proc: Path) -> Iterator[Path]:
    """The folders of the process's cgroups that may limit `controller`, the innermost first.

    Where a mount shows only a part of the tree, as in a container, the process's path may be one outside of it: then
    the mount itself is the nearest that can be seen.
    """
    paths = {}
    for line in _lines(proc / "self/cgroup"):
        number, controllers, path = line.split(":", 2)
        for name in controllers.split(",") if controllers else ["unified"] * (number == "0"):
            paths[name] = PurePosixPath(path)
    for line in _lines(proc / "self/mountinfo"):
        mount, _, kind = line.partition(" - ")
        root, folder = (_unescaped(word) for word in mount.split()[3:5])
        system, _, options = kind.split(" ", 2)
        name = "unified" if system == "cgroup2" else controller
        if name not in paths or (system == "cgroup" and controller not in options.strip().split(",")):
            continue
        if system in ("cgroup", "cgroup2"):
            visible = paths[name].is_relative_to(root) and ".." not in paths[name].parts
            inside = paths[name].relative_to(root) if visible else PurePosixPath()
            for relative in (inside, *inside.parents) if inside.parts else (inside,):
                yield Path(folder, relative)


def _cpu_quota(folder: Path) -> float | None:
    """Cores' worth of time that a cgroup has; None: no quota."""
    words = (_lines(folder / "cpu.max") or [""])[0].split()
    quota, period = words if len(words) == 2 else ("max", "")
    if words:
        return float(quota) / float(period) if quota != "max" else None
    quota_us, period_us = _number(folder / "cpu.cfs_quota_us"), _number(folder / "cpu.cfs_period_us")
    return quota_us / period_us if quota_us is not None and period_us else None


def _number(file: Path) -> int | None:
    """What a file holds; None where there is none, or no number that is a limit, as "max" and -1."""
    text = (_lines(file) or [""])[0].strip()
    return int(text) if text.isdecimal() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return []


def _unescaped(word: str) -> str:
    r"""A path of mountinfo, which writes \040 for a space."""
    return word.encode("utf-8", "surrogateescape").decode("unicode_escape") if "\\" in word else word


def kill_descendants(not_ours: set[psutil.Process]) -> None:
    """Kill all processes below this one, and wait for their end; but not the others."""
    left = [process for process in psutil.Process().children(recursive=True) if process not in not_ours]
    for process in left:
        with suppress(psutil.NoSuchProcess):  # it has just ended
            process.kill()
    psutil.wait_procs(left, timeout=5)
