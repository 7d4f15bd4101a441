"""What it costs to know which samples to train on, of 100 million: ours beside torch's DistributedSampler.

    python scripts/bench_order.py [--rows 100000000] [--rounds 5] [--folder DIR] [--json]

Writes an index file of so many rows with no images behind it (about 5.4 GB, removed at the end; the writing process
needs as much memory), as of 10,000 tar shards. Then, by turns and each time in a fresh process, gets one worker's first
batch of ids, rank 0 of 8, with the index file's pages dropped from the page cache before: seconds beyond Python's
imports, and how resident memory grew beyond them: private, or mapped from files (which the kernel takes back when it
needs it, and workers of one machine share), and the most there was of both. Ends with 1 where ours takes more than 2 s
or 200 MB in any round.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NUM_SHARDS, NAME = 10_000, "0123456789.jpg"
GLOBAL_BATCH, WORLD_SIZE, LATE = 256, 8, 1_000_000
MAX_S, MAX_MB = 2.0, 200.0
OURS = {
    "ours, step 0": {"step": 0},
    "ours, step 1,000,000": {"step": LATE},
    "ours, blocks, step 1,000,000": {"step": LATE, "block": 1000},
}
TORCH = "torch DistributedSampler"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="for the index file; not in memory")
    parser.add_argument("--json", action="store_true", help="figures as one JSON object")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        file = Path(folder) / "index.arrow"
        started = time.perf_counter()
        _python("write_index", str(file), args.rows)
        written = {"gb": file.stat().st_size / 1e9, "seconds": time.perf_counter() - started}
        print(f"wrote {args.rows:,} rows, {written['gb']:.1f} GB in {written['seconds']:.0f} s", file=sys.stderr)
        rounds: dict[str, list[dict[str, float]]] = {name: [] for name in (*OURS, TORCH)}
        for i in range(args.rounds):
            for name, ones in rounds.items():
                _forget(file)
                call: tuple[Any, ...] = (
                    ("ids_of_ours", str(file), OURS[name]) if name in OURS else ("ids_of_torch", args.rows)
                )
                ones.append(_python(*call))
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr)
    late = [
        f"{name}: {key} {one[key]:.2f}, more than {limit:g}"
        for name in OURS
        for one in rounds[name]
        for key, limit in (("seconds", MAX_S), ("peak_mb", MAX_MB))
        if one[key] > limit
    ]
    if args.json:
        print(json.dumps({"rows": args.rows, "index": written, "rounds": rounds, "too_much": late}))
    else:
        print("\n".join([*_table(rounds), *late]))
    return 1 if late else 0


def _table(rounds: dict[str, list[dict[str, float]]]) -> list[str]:
    columns = {
        "seconds": "s to ids",
        "imports": "s imports",
        "private_mb": "MB private",
        "mapped_mb": "MB mapped",
        "peak_mb": "MB at peak",
    }
    lines = [f"{'median (least to most)':<30}" + "".join(f"{text:>28}" for text in columns.values())]
    for name, ones in rounds.items():
        line = f"{name:<30}"
        for key in columns:
            values = [one[key] for one in ones]
            form = ".3f" if key in ("seconds", "imports") else ".1f"
            text = f"{statistics.median(values):{form}} ({min(values):{form}} to {max(values):{form}})"
            line += f"{text:>28}"
        lines.append(line)
    for name in OURS:
        pairs = list(zip(rounds[name], rounds[TORCH], strict=True))
        faster = statistics.median(torch["seconds"] / ours["seconds"] for ours, torch in pairs)
        leaner = statistics.median(torch["peak_mb"] / ours["peak_mb"] for ours, torch in pairs)
        lines.append(f"{name}: {faster:.0f} times as fast as {TORCH}, with 1/{leaner:.0f} of its memory")
    return lines


def _python(function: str, *args: Any) -> Any:
    """What `function` of this file returns in a fresh process."""
    code = f"import json, bench_order; print(json.dumps(bench_order.{function}(*{args!r}, {time.time()!r})))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout)


def _forget(file: Path) -> None:
    """Drop the file's pages from the page cache."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def write_index(file: str, num_rows: int, started: float) -> None:
    """Write the index of `num_rows` images of 500x375 in tar shards, as one record batch, as `pipeline index` does."""
    import numpy as np
    import pyarrow as pa

    from pipeline.data.index import FORMAT, SCHEMA

    per_shard = -(-num_rows // NUM_SHARDS)
    names = np.empty((num_rows, len(NAME)), dtype=np.uint8)
    names[:] = np.frombuffer(NAME.encode(), dtype=np.uint8)
    for low in range(0, num_rows, 1_000_000):
        numbers = np.arange(low, min(low + 1_000_000, num_rows))
        for digit in range(10):
            names[low : low + len(numbers), 9 - digit] = ord("0") + numbers // 10**digit % 10
    shards = pa.array([f"train-{i:05d}.tar" for i in range(NUM_SHARDS)], pa.large_string())
    rows = np.arange(num_rows, dtype=np.int64)
    columns = [
        pa.DictionaryArray.from_arrays(pa.array((rows // per_shard).astype(np.int32)), shards),
        pa.LargeStringArray.from_buffers(
            num_rows, pa.py_buffer(np.arange(num_rows + 1, dtype=np.int64) * len(NAME)), pa.py_buffer(names)
        ),
        pa.array(rows % per_shard * 112_640 + 512),
        pa.array(np.full(num_rows, 110_000, dtype=np.int64)),
        pa.array((rows % 1000).astype(np.int32)),
        pa.array(np.full(num_rows, 375, dtype=np.int32)),
        pa.array(np.full(num_rows, 500, dtype=np.int32)),
    ]
    meta = {
        "pipeline.index": str(FORMAT),
        "root": "/data/shards",
        "classes": json.dumps([f"n{i:08d}" for i in range(1000)]),
        "fingerprint": "0" * 64,
    }
    schema = SCHEMA.with_metadata(meta)
    with pa.OSFile(file, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))


def ids_of_ours(file: str, kind: dict[str, int], started: float) -> dict[str, float]:
    import torch

    from pipeline.config.data import DataConfig
    from pipeline.data.index import load_index
    from pipeline.data.loading.loader import LoaderContext, TrainLoader

    imported, before = time.time(), _memory()
    cfg = DataConfig(train=file, val=file, shuffle_block=kind.get("block"))
    context = LoaderContext(0, WORLD_SIZE, torch.device("cpu"), 1)
    loader = TrainLoader(load_index(Path(file)), cfg, context, _refuse, global_batch=GLOBAL_BATCH, seed=0)
    ids = loader.batch_spec(kind["step"]).rows.tolist()
    return _figures(ids, started, imported, before)


def ids_of_torch(num_rows: int, started: float) -> dict[str, float]:
    from torch.utils.data import Dataset, DistributedSampler

    class Nothing(Dataset[None]):
        def __len__(self) -> int:
            return num_rows

    imported, before = time.time(), _memory()
    numbers: Iterator[int] = iter(DistributedSampler(Nothing(), num_replicas=WORLD_SIZE, rank=0, shuffle=True, seed=0))
    ids = [next(numbers) for _ in range(GLOBAL_BATCH // WORLD_SIZE)]
    return _figures(ids, started, imported, before)


def _refuse(path: str, reason: str) -> None:
    raise RuntimeError(f"{path}: {reason}")


def _figures(ids: list[int], started: float, imported: float, before: dict[str, int]) -> dict[str, float]:
    done, after = time.time(), _memory()
    assert len(set(ids)) == GLOBAL_BATCH // WORLD_SIZE
    private = after["Anonymous"] - before["Anonymous"]
    return {
        "seconds": done - imported,
        "imports": imported - started,
        "private_mb": private / 1e6,
        "mapped_mb": (after["Rss"] - before["Rss"] - private) / 1e6,
        "peak_mb": (after["VmHWM"] - before["Rss"]) / 1e6,
    }


def _memory() -> dict[str, int]:
    """Bytes: resident, of it anonymous, and the most that was resident since the last call."""
    found = {}
    for file in ("/proc/self/smaps_rollup", "/proc/self/status"):
        for line in Path(file).read_text(encoding="utf-8").splitlines()[1:]:
            key, _, value = line.partition(":")
            if key in ("Rss", "Anonymous", "VmHWM"):
                found[key] = int(value.split()[0]) * 1024
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # resets the peak
    return found


if __name__ == "__main__":
    sys.exit(main())
