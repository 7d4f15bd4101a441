"""Disturb each call that a small training makes to its storage and to MLflow, one in a run, and look at the end.

    python scripts/enumerate_faults.py [--s3] [--sample N --seed S] [--only PATTERN] [--fault KIND] [--keep FOLDER]

The training has two parts, as if its user had stopped it half way: each is what the driver and its one rank do, in a
process of its own, without Ray. This program takes the place of the supervisor, and of the user who gives a command
again after it was refused. The end must be that of a training that nothing disturbs: weights to the last bit, kept
checkpoints, run.json, and each step of each metric once in MLflow. Exit code 1 where it is not.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))
# No threads before the processes of the cases are forked. MLflow's own measurements have nothing to do with this.
os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ["MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL"] = "100000"

import fault_slot
from fault_slot import PARTS, Slot
from faults import AFTER, BEFORE, HANGS, KINDS, LOST, MINUTE, Fault
from s3 import s3_storage
from small_run import KEPT

WORKERS = 2
MEMORY = Path("/dev/shm")
CHANGES_NOTHING = re.compile(
    r"os\.(stat|listdir|scandir|pread)|open .*\((r|rb)\)|fs\.(get|open_input)|torch.load|memory_map"
)


@dataclass(frozen=True)
class Case:
    part: int
    fault: Fault

    @property
    def arguments(self) -> str:
        """What repeats just this one."""
        only = shlex.quote(f"^{re.escape(self.fault.key)}$")
        return f"--all --part {self.part} --fault {self.fault.kind} --only {only}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--s3", action="store_true", help="the run on an object store, moto's")
    parser.add_argument("--sample", type=int, help="so many cases, drawn at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="a regular expression: operations whose name it is found in")
    parser.add_argument("--fault", choices=KINDS, action="append", help="can be given more than once")
    parser.add_argument("--part", type=int, choices=PARTS, help="of the run")
    parser.add_argument(
        "--all", action="store_true", help="of calls that are alike, too, not but the first, middle and last"
    )
    parser.add_argument("--list", action="store_true", help="the operations, and do nothing to them")
    parser.add_argument("--keep", type=Path, help="where the logs of findings are kept")
    args = parser.parse_args()
    args.keep = args.keep or Path(tempfile.mkdtemp(prefix="faults-kept-"))
    args.keep.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        place = MEMORY if MEMORY.is_dir() else None
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults-", dir=place)))
        fault_slot.prepare(folder)
        slots = [
            Slot(folder, number, stack.enter_context(s3_storage()) if args.s3 else None) for number in range(WORKERS)
        ]
        found = list(_side_by_side([partial(_undisturbed, slot) for slot in slots]))
        operations, undisturbed = found[0]["operations"], found[0]["end"]
        assert all(one["end"] == undisturbed for one in found), "it is not the same twice"
        cases = _cases(operations, args)
        print(f"{len(operations)} operations, {len(cases)} cases, after {time.monotonic() - began:.0f} s", flush=True)
        if args.list:
            for part, target, key in operations:
                print(part, f"{target:8}", key)
            return 0
        shares = [cases[number::WORKERS] for number in range(WORKERS)]
        work = [partial(_try_all, slot, share, undisturbed, args) for slot, share in zip(slots, shares, strict=True)]
        outcomes = list(_side_by_side(work))
    return _report(outcomes, len(operations), time.monotonic() - began)


def _undisturbed(slot: Slot) -> Iterator[dict[str, Any]]:
    operations: list[tuple[int, str, str]] = []
    slot.reset(0)
    for part in PARTS:
        ended = slot.command(part, None)
        assert (ended.kind, ended.failures) == ("done", 0), (slot.place.control / "log").read_text(encoding="utf-8")
        operations += [(part, target, key) for target, key in slot.operations()]
        if part == 0:
            slot.save()
    yield {"operations": operations, "end": slot.end()}


def _cases(operations: Sequence[Sequence[Any]], args: argparse.Namespace) -> list[Case]:
    """All, or those that are asked for."""
    number = Counter((part, key.rpartition(" #")[0]) for part, _, key in operations)
    chosen = []
    for kind in args.fault or KINDS:
        for part, target, key in operations:
            name, _, n = key.rpartition(" #")
            if re.search(args.only, key) and args.part in (None, part) and _is_of_use(kind, target, name):
                few = {"1", str((number[part, name] + 1) // 2), str(number[part, name])}
                if args.all or n in few or (kind in (BEFORE, AFTER, LOST) and not CHANGES_NOTHING.search(name)):
                    chosen.append(Case(part, Fault(kind, target, key)))
    return chosen if args.sample is None else random.Random(args.seed).sample(chosen, min(args.sample, len(chosen)))


def _is_of_use(kind: str, target: str, name: str) -> bool:
    """To die after what changes nothing is to die before the next call; a call of this machine tells what was done."""
    changes = target == "mlflow" or not CHANGES_NOTHING.search(name)
    return {AFTER: changes, LOST: target == "mlflow" or ("fs." in name and changes)}.get(kind, True)


def _try_all(slot: Slot, cases: Sequence[Case], undisturbed: dict[str, Any], args: argparse.Namespace) -> Iterator[Any]:
    s3 = "--s3 " if args.s3 else ""
    for case in cases:
        how, text = _try(slot, case, undisturbed)
        if how == "FINDING":
            kept = tempfile.mkdtemp(dir=args.keep)
            shutil.copytree(slot.place.control, kept, dirs_exist_ok=True)
            print(f"FINDING {case.fault.key}: {text} ({s3}{case.arguments}; log: {kept}/log)", flush=True)
        yield {"how": how, "text": text, "part": case.part, **asdict(case.fault)}


def _try(slot: Slot, case: Case, undisturbed: dict[str, Any]) -> tuple[str, str]:
    """How a case ends, and what there is to say of it."""
    slot.reset(case.part)
    how, text, failures = "undisturbed", "", 0
    for part in PARTS[case.part :]:
        fault = case.fault if part == case.part or slot.was_disturbed else None  # it may last
        ended = slot.command(part, fault)
        failures += ended.failures
        if ended.kind != "done":
            how, text = "told and resumed" if ended.kind == "told" else "FINDING", f"{ended.kind}: {ended.text}"
            if ended.kind == "hangs":
                return how, text
            slot.wait_for_minute()
            ended = slot.command(part, fault)
            if ended.kind != "done":
                return "FINDING", f"{text}; then {ended.kind}: {ended.text}"
    if not slot.was_disturbed:
        return "not reached", ""
    end = slot.end()
    other = [
        f"{name} {_difference(end.get(name), value)}"
        for name, value in undisturbed.items()
        if not _is_alike(name, end.get(name), value, case.fault.kind)
    ]
    if other:
        return "FINDING", "; ".join(filter(None, [text, *other]))
    if how == "undisturbed" and failures:
        how = f"recovered after {failures}"
    return how, text


def _is_alike(name: str, found: Any, wanted: Any, kind: str) -> bool:
    if name == "checkpoints" and kind in (MINUTE, HANGS) and found:  # one may give way to a newer one
        return set(KEPT) <= set(found) <= set(wanted)
    if name != "metrics" or not found:
        return bool(found == wanted)
    return all(_is_same_metric(key, found.get(key, []), wanted.get(key, [])) for key in {**wanted, **found})


def _is_same_metric(key: str, found: Any, wanted: Any) -> bool:
    """Once each step; of attempts and of checkpoints written there may be more or fewer."""
    if key.startswith(("attempt/", "checkpoint/")):
        return len(found) == len({step for step, _ in found})
    return bool(found == wanted)


def _difference(found: Any, wanted: Any) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        names = [n for n in {**wanted, **found} if not _is_same_metric(n, found.get(n, []), wanted.get(n, []))]
        return ", ".join(f"{name} {_difference(found.get(name), wanted.get(name))}" for name in names[:3])
    return f"{found} instead of {wanted}"[:300]


def _side_by_side(work: Sequence[Callable[[], Iterator[Any]]]) -> Iterator[Any]:
    """What the functions yield, each called in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        files, pids = [Path(folder, str(number)) for number in range(len(work))], []
        for function, file in zip(work, files, strict=True):
            pids.append(os.fork())
            if pids[-1] == 0:
                _work(function, file)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        if any(codes):
            raise SystemExit("a process of the harness has failed, see above")
        for file in files:
            yield from map(json.loads, file.read_text(encoding="utf-8").splitlines())


def _work(function: Callable[[], Iterator[Any]], to: Path) -> NoReturn:
    """A forked process: it must not come back."""
    code = 1
    try:
        with to.open("w", encoding="utf-8") as out:
            for item in function():
                print(json.dumps(item), file=out, flush=True)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _report(outcomes: Sequence[dict[str, Any]], num_operations: int, seconds: float) -> int:
    hows = sorted({outcome["how"] for outcome in outcomes})
    counts = Counter((outcome["kind"], outcome["how"]) for outcome in outcomes)
    print(f"\n{'':20}", *(f"{how:>18}" for how in hows))
    for kind in KINDS:
        if any(outcome["kind"] == kind for outcome in outcomes):
            print(f"{kind:20}", *(f"{counts[kind, how]:18}" for how in hows))
    told = Counter(outcome["text"] for outcome in outcomes if outcome["how"] == "told and resumed")
    for text, number in told.most_common(10):
        print(f"told {number} times: {text[:200]}")
    print(f"{num_operations} operations, {len(outcomes)} cases, {seconds:.0f} s")
    return int(any(outcome["how"] == "FINDING" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
