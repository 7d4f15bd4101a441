"""Where a training's GPU waits for its host: the gaps in a trace of some steps, added up.

    pipeline train CONFIG "train.profile=[100,104]"
    python scripts/trace_gaps.py runs/NAME/profile/steps_100_104.json.gz [--json]

It looks at the same steps twice. The GPU's view: when no kernel, copy or memset runs. The host's view: when the step
launches no kernel. The host may pause as long as it is ahead of the GPU, so the first view says what is lost, and the
second one where the host is slow. The profiler itself takes some microseconds of each operation: without it, the host
is faster than the trace says.

A step is launched by two threads: the training's and, for the backward pass, autograd's. DALI launches kernels from
threads of its own: they keep the GPU busy, but are no launches of the step.
"""

import argparse
import gzip
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import UserError
from pipeline.text import columns
from pipeline.tracking.ledger import PHASES, STEP

GPU_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
OPERATIONS = ("cpu_op", "user_annotation")
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")  # how the calls' names begin
LEDGER = {*STEP, *PHASES}
STEP_BEGINS = "Optimizer.zero_grad#"  # torch's name for what train_step does first, and once
NUM_LONGEST = 10
US_PER_MS = 1000

Interval = tuple[float, float]  # from and to, in microseconds
Thread = tuple[Any, Any]  # of a process


class Event(NamedTuple):
    """Something that lasted from `begin` to `end`, in microseconds.

    correlation: the same for a call and for the work on the GPU that it launched.
    """

    category: str
    name: str
    thread: Thread
    begin: float
    end: float
    correlation: int | None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path, metavar="TRACE", help="as train.profile writes it: .json.gz, or .json")
    parser.add_argument(
        "--min-gap", type=float, default=20.0, metavar="US", help="in microseconds; default: %(default)g"
    )
    parser.add_argument("--json", action="store_true", help="figures as one JSON object")
    args = parser.parse_args()
    try:
        result = measure(read(args.trace), args.min_gap)
    except UserError as e:
        print(e, file=sys.stderr)
        return 2
    print(json.dumps(result) if args.json else "\n".join(format_result(result)))
    return 0


def read(path: Path) -> list[Event]:
    """The events of a trace that last.

    Raises:
        UserError: it is none, or not of a training's steps on a GPU.
    """
    try:
        content = path.read_bytes()
        trace = json.loads(gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content)
        rows = [row for row in trace["traceEvents"] if row["ph"] == "X"]
        events = [
            Event(
                str(row.get("cat")),
                row["name"],
                (row["pid"], row["tid"]),
                float(row["ts"]),
                float(row["ts"]) + float(row["dur"]),
                row.get("args", {}).get("correlation"),
            )
            for row in rows
        ]
    except (gzip.BadGzipFile, EOFError, zlib.error, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is no trace of torch.profiler") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    if not any(event.category in GPU_WORK for event in events):
        raise UserError(f"no GPU events in {path}: it was recorded on a CPU")
    if not any(event.name.startswith(STEP_BEGINS) for event in events) or not _phases(events):
        raise UserError(f"no steps in {path}: it was not recorded by train.profile")
    return events


def measure(events: Sequence[Event], min_gap_us: float) -> dict[str, Any]:
    """The gaps of more than `min_gap_us`, per step and added up; times in milliseconds.

    The GPU's time is from the first to the last work that the step has launched: before and after it, the profiler
    starts and stops.
    """
    num_steps = sum(event.name.startswith(STEP_BEGINS) for event in events)
    phases = _phases(events)
    calls = [event for event in events if event.category in CALLS]
    launches = [call for call in calls if call.name.startswith(LAUNCHES)]
    by_thread = Counter(call.thread for call in launches)
    operating = {event.thread for event in events if event.category in OPERATIONS}
    busiest = {thread for thread, _ in by_thread.most_common(1)}
    own_threads = operating if operating & set(by_thread) else operating | busiest

    own_ids = {call.correlation for call in calls if call.thread in own_threads}
    work = [event for event in events if event.category in GPU_WORK]
    own_work = [event for event in work if event.correlation in own_ids]
    gpu_span = _span(own_work or work)
    idle = _gaps(work, gpu_span)
    long_idle = [gap for gap in idle if _length(gap) > min_gap_us]

    own_launches = [call for call in launches if call.thread in own_threads]
    host_span = _span(phases)
    pauses = [gap for gap in _gaps(own_launches, host_span) if _length(gap) > min_gap_us]

    def per_step(*intervals: Interval) -> float:
        return round(sum(map(_length, intervals)) / US_PER_MS / num_steps, 4)

    hosted = [event for event in events if event.category in (*OPERATIONS, *CALLS) and event.thread in own_threads]

    def explain(gap: Interval) -> dict[str, Any]:
        """Where the host was in the middle of it. While autograd's thread computes, the other one only waits."""
        middle = sum(gap) / 2
        times = {"ms": round(_length(gap) / US_PER_MS, 4), "at_ms": round((gap[0] - gpu_span[0]) / US_PER_MS, 4)}
        return times | {"phase": _innermost(phases, middle), "range": _innermost(hosted, middle)}

    longest = sorted(long_idle, key=_length, reverse=True)[:NUM_LONGEST]
    return {
        "steps": num_steps,
        "min_gap_us": min_gap_us,
        "gpu": {
            "ms_per_step": per_step(gpu_span),
            "busy_share": round(1 - sum(map(_length, idle)) / _length(gpu_span), 4),
            "busy_share_without_others": round(1 - sum(map(_length, _gaps(own_work, gpu_span))) / _length(gpu_span), 4),
            "idle_ms_per_step": per_step(*idle),
            "gaps_per_step": len(long_idle) / num_steps,
            "gap_ms_per_step": per_step(*long_idle),
        },
        "host": {
            "ms_per_step": per_step(host_span),
            "launches_per_step": len(own_launches) / num_steps,
            "launching_ms_per_step": per_step(*((call.begin, call.end) for call in own_launches)),
            "gaps_per_step": len(pauses) / num_steps,
            "gap_ms_per_step": per_step(*pauses),
            "gap_ms_per_step_by_phase": {
                name: per_step(*_overlaps(pauses, (phase for phase in phases if phase.name == name)))
                for name in dict.fromkeys(phase.name for phase in phases)
            },
        },
        "launches_per_step_by_thread": {
            f"{thread[1]}{'' if thread in own_threads else ' (not of the step)'}": count / num_steps
            for thread, count in by_thread.most_common()
        },
        "longest_gpu_gaps": [explain(gap) for gap in longest],
    }


def format_result(result: dict[str, Any]) -> list[str]:
    """For people."""
    gpu, host, over = result["gpu"], result["host"], f"over {result['min_gap_us']:g} us"
    rows = [
        (f"of {result['steps']} steps, per step", "ms"),
        ("GPU", f"{gpu['ms_per_step']:.2f}"),
        (f"  idle, {1 - gpu['busy_share']:.1%}", f"{gpu['idle_ms_per_step']:.2f}"),
        (f"  in {gpu['gaps_per_step']:.1f} gaps {over}", f"{gpu['gap_ms_per_step']:.2f}"),
        ("host", f"{host['ms_per_step']:.2f}"),
        (f"  in {host['launches_per_step']:.1f} launches", f"{host['launching_ms_per_step']:.2f}"),
        (f"  in {host['gaps_per_step']:.1f} gaps {over} between them", f"{host['gap_ms_per_step']:.2f}"),
        *((f"    {name}", f"{ms:.2f}") for name, ms in host["gap_ms_per_step_by_phase"].items()),
    ]
    threads = ", ".join(f"{name}: {count:.1f}" for name, count in result["launches_per_step_by_thread"].items())
    longest = [("longest gaps of the GPU, ms", "at ms", "phase", "the host was in")]
    for gap in result["longest_gpu_gaps"]:
        longest.append((f"{gap['ms']:.3f}", f"{gap['at_ms']:.2f}", gap["phase"], gap["range"]))
    return [
        *columns(rows, "<>"),
        f"the GPU is busy for {gpu['busy_share']:.1%} of the time, with the step's own work for "
        f"{gpu['busy_share_without_others']:.1%}",
        f"launches per step by thread; {threads}",
        *columns(longest, ">>"),
    ]


def _phases(events: Iterable[Event]) -> list[Event]:
    """Of the ledger, in their order; the thread that trains is in one of them at a time."""
    phases = [event for event in events if event.category == "user_annotation" and event.name in LEDGER]
    return sorted(phases, key=lambda phase: phase.begin)


def _innermost(events: Iterable[Event], time: float) -> str:
    """The name of what goes on at a time, and began last."""
    around = [event for event in events if event.begin <= time < event.end]
    return max(around, key=lambda event: event.begin).name if around else "-"


def _span(events: Sequence[Event]) -> Interval:
    return min(event.begin for event in events), max(event.end for event in events)


def _length(interval: Interval) -> float:
    return interval[1] - interval[0]


def _gaps(events: Iterable[Event], span: Interval) -> list[Interval]:
    """The parts of `span` in which none of the events goes on."""
    gaps, covered = list[Interval](), span[0]
    for event in sorted(events, key=lambda event: event.begin):
        if event.begin >= span[1]:
            break
        if event.begin > covered:
            gaps.append((covered, event.begin))
        covered = max(covered, event.end)
    if covered < span[1]:
        gaps.append((covered, span[1]))
    return gaps


def _overlaps(intervals: Sequence[Interval], events: Iterable[Event]) -> list[Interval]:
    """What the intervals and the events have in common; neither overlap among themselves."""
    shared = [(max(begin, event.begin), min(end, event.end)) for event in events for begin, end in intervals]
    return [interval for interval in shared if _length(interval) > 0]


if __name__ == "__main__":
    sys.exit(main())
