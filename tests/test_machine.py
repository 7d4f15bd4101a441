"""What a process may use of its machine, as containers of all kinds limit it."""

import os
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline import machine

CORES = len(os.sched_getaffinity(0))


def fake(root: Path, cgroup: str, mounts: list[tuple[str, str, str, str]], files: dict[str, str]) -> Path:
    """A /proc of a process, its mounts given by root, place below `root`, kind and options, and files below `root`."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(cgroup)
    lines = [f"30 25 0:26 {top} {root}/{place} rw - {kind} cgroup rw,{options}" for top, place, kind, options in mounts]
    (root / "proc/self/mountinfo").write_text("\n".join(["22 1 0:21 / /proc rw - proc proc rw", *lines]))
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{content}\n")
    return root / "proc"


V1 = [("/", "cpu", "cgroup", "cpu,cpuacct"), ("/", "memory", "cgroup", "memory")]
V2 = [("/", "cg", "cgroup2", "nsdelegate")]
OF_V1 = "5:memory:/a/b\n4:cpu,cpuacct:/a/b\n0::/a\n"


@pytest.mark.parametrize(
    ("cgroup", "mounts", "files", "cores", "limit"),
    [
        ("", [], {}, CORES, None),
        (OF_V1, V1, {"cpu/a/b/cpu.cfs_quota_us": "-1", "memory/memory.limit_in_bytes": str(2**63 - 4096)}, CORES, None),
        (OF_V1, V1, {"cpu/a/b/cpu.cfs_quota_us": "50000", "cpu/a/b/cpu.cfs_period_us": "100000"}, 1, None),
        # A limit of the cgroup above, as a pod has beside its containers.
        (OF_V1, V1, {"cpu/a/cpu.cfs_quota_us": "100000", "cpu/a/cpu.cfs_period_us": "100000"}, 1, None),
        (
            OF_V1,
            V1,
            {"memory/a/memory.limit_in_bytes": "3000", "memory/a/b/memory.limit_in_bytes": "4000"},
            CORES,
            3000,
        ),
        ("0::/a/b\n", V2, {"cg/a/b/cpu.max": "max 100000", "cg/a/b/memory.max": "max"}, CORES, None),
        ("0::/a/b\n", V2, {"cg/a/cpu.max": "100000 100000", "cg/a/b/memory.max": "5000"}, 1, 5000),
        # In a container: the process's path is another outside, or the mount shows its own part of the tree.
        ("0::/\n", V2, {"cg/cpu.max": "100 1000", "cg/memory.max": "7000"}, 1, 7000),
        (
            "4:cpu:/docker/x\n",
            [("/docker/x", "cpu", "cgroup", "cpu")],
            {"cpu/cpu.cfs_quota_us": "9", "cpu/cpu.cfs_period_us": "9"},
            1,
            None,
        ),
        ("0::/../elsewhere\n", V2, {"cg/memory.max": "8000"}, CORES, 8000),
        # Both versions at once: the controllers of version 1 count.
        (OF_V1, [*V1, ("/", "u", "cgroup2", "")], {"memory/a/b/memory.limit_in_bytes": "9000"}, CORES, 9000),
    ],
)
def test_limits_are_read_as_the_kernel_writes_them(
    tmp_path: Path,
    cgroup: str,
    mounts: list[tuple[str, str, str, str]],
    files: dict[str, str],
    cores: int,
    limit: int | None,
) -> None:
    proc = fake(tmp_path, cgroup, mounts, files)
    assert (machine.cpu_count(proc), machine.memory_limit(proc)) == (cores, limit)


@pytest.mark.parametrize(
    ("name", "content", "kills"),
    [("memory.events", "low 0\noom 3\noom_kill 2", 2), ("memory.oom_control", "under_oom 0\noom_kill 4", 4)],
)
def test_what_the_kernel_has_killed_for_memory_is_counted(tmp_path: Path, name: str, content: str, kills: int) -> None:
    files = {f"cg/a/{name}": content, "cg/a/memory.max": "9000", "proc/vmstat": "oom_kill 7"}
    assert machine.out_of_memory_kills(fake(tmp_path, "0::/a\n", V2, files)) == kills
    (tmp_path / "cg/a/memory.max").write_text("max\n", encoding="utf-8")
    assert machine.out_of_memory_kills(tmp_path / "proc") == 7, "without a limit, the machine's own"


@pytest.fixture
def cgroup(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A cgroup of version 1 of the controller that the test names."""
    folder = Path("/sys/fs/cgroup", request.param, f"pipeline-test-{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir()
        if not (folder / "cgroup.procs").exists():
            raise OSError("no cgroup of version 1")
    except OSError as e:
        with suppress(OSError):
            folder.rmdir()
        pytest.skip(f"no cgroup can be made here: {e}")
    yield folder
    folder.rmdir()


def ask(cgroup: Path, question: str) -> str:
    """What a process in the cgroup says."""
    code = f"import os; open('{cgroup}/cgroup.procs', 'w').write(str(os.getpid()))"
    code += f"\nfrom pipeline import machine; print({question})"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("cgroup", ["cpu"], indirect=True)
def test_a_quota_of_the_kernel_s_counts(cgroup: Path) -> None:
    (cgroup / "cpu.cfs_quota_us").write_text("50000")
    assert ask(cgroup, "machine.cpu_count()") == "1"


@pytest.mark.parametrize("cgroup", ["memory"], indirect=True)
def test_a_memory_limit_of_the_kernel_s_counts(cgroup: Path) -> None:
    (cgroup / "memory.limit_in_bytes").write_text(str(2**30))
    assert ask(cgroup, "machine.memory_limit()") == str(2**30)


def test_a_user_without_an_entry_has_a_number() -> None:
    if os.getuid() != 0:
        pytest.skip("needs root to run as another user")
    code = "import os; from pipeline.local_files import scratch_folder; os.setuid(12345); print(scratch_folder().name)"
    clean = {name: value for name, value in os.environ.items() if name not in ("LOGNAME", "USER", "LNAME", "USERNAME")}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean)
    assert told.stdout.strip() == "pipeline-12345"


@pytest.mark.parametrize(("others", "high"), [(0.0, False), (0.4, False), (0.6, True), (1.0, True)])
def test_other_load_is_what_else_works_on_these_cores(
    others: float, high: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share of each core; what this process does itself does not count."""
    num_cores = len(os.sched_getaffinity(0))
    clock, own = [100.0], [5.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(os, "times", lambda: (own[0], 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(machine, "busy_seconds", lambda: [c * num_cores for c in [others * clock[0]]] + [own[0]])
    load = machine.OtherLoad()
    clock[0], own[0] = 110.0, 12.0
    assert load.num_busy_cores() == pytest.approx(others * num_cores)
    assert load.is_high() is high


def test_a_busy_process_is_other_load() -> None:
    load = machine.OtherLoad()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        time.sleep(1)
        num_cores = load.num_busy_cores()
        process.kill()
    assert num_cores > 0.2
