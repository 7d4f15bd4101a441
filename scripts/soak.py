"""A week in an hour: a long training of a tiny network that is killed all the time, and what grows meanwhile.

    python scripts/soak.py [--steps 500000] [--kills 300] [--outage 60] [--seed 0] [--out FILE.json]

Two workers, through Ray, as a user starts them; images, checkpoints and records are real, only the network is not
ResNet's. MLflow's server is away half of the time. In the first quarter of the steps processes are killed (each tenth
time the driver, else one of the workers); in the rest nothing is, so that workers grow old. Of each kind of process its
memory (unique set size), threads and descriptors are measured every few seconds, and of the folders their bytes. The
first and the last third of each part are held beside each other, without a warm-up; workers do not grow old enough for
that in the first part. Exit code 1 where one has grown by more than noise, or the training has not ended well.
Ctrl-C or SIGTERM ends it early, and what has been measured by then is told.
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent / "tests" / "support"))

import make_digits
import psutil
from patching import write_site
from s3 import free_port
from servers import MlflowServer, Proxy

ROOT = Path(__file__).parent.parent
TINY = """
    from torch import nn

    class Tiny(module.ResNet):
        def __init__(self, cfg, num_classes):
            super().__init__(cfg, num_classes)
            self.conv1, self.bn1 = module.Conv2d(3, 4, 7, stride=4, bias=False), nn.BatchNorm2d(4)
            self.layer1, self.layer2, self.layer3, self.layer4 = (nn.Sequential() for _ in range(4))
            self.fc = nn.Linear(4, num_classes)

    module.ResNet = Tiny
"""
SETTINGS = """run.name=soak model.depth=18 train.global_batch=4 train.precision=fp32 optim.warmup_epochs=0.1
    data.image_size=16 data.val_resize=16 data.read_threads=1 data.decode_threads=1 cluster.workers=2
    mlflow.log_model=false mlflow.report=false"""
POLL_S = 0.2
SAMPLE_S = 4.0
YOUNG_S = 10.0  # a process of that age still imports
STALLED_S = 300.0
END_S = 600.0  # for the last records, once the last step is done
NUM_CHECKPOINTS = 2  # between two kills: a budget of failures begins anew with each
EACH_NTH_IS_DRIVER = 10
UNITS = {"memory": "MB", "threads": "", "descriptors": "", "number": "", "disk": "MB"}
TEMPORARY = "temporary files"
OUTBOX = "run's folder"
# Ray's logs, 0.05 of a worker, 1 of a driver, each tenth time; and what an attempt logs that never reaches MLflow.
MB_PER_KILL = {f"{TEMPORARY}: disk": 0.2, f"{OUTBOX}: disk": 0.02}
# What is noise: of its size at first, and at least so much.
NOISE = {"memory": (0.05, 4.0), "threads": (0, 2), "descriptors": (0, 4), "number": (0, 2), "disk": (0.1, 1.0)}
ROLES = {  # by what a command line holds, the first that does
    "worker": r"ray::.*(RayTrainWorker|_Worker|\.execute)",
    "driver": r"pipeline\.cluster\.driver",
    "Ray": r"raylet|gcs_server|ray::|site-packages/ray|ray/",
}


@dataclass
class Samples:
    """Figures by name, such as "driver: threads", each with the time in seconds at which it was taken."""

    figures: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self.figures[name].append((time.monotonic(), value))


@dataclass(frozen=True)
class Growth:
    """What a figure was at first and at last: medians of the first and the last third of a part, after its warm-up."""

    part: str
    name: str
    first: float
    last: float
    highest: float
    allowed: float = 0.0  # beside noise

    @property
    def noise(self) -> float:
        share, least = NOISE[self.name.rpartition(": ")[2]]
        return max(share * self.first, least)

    @property
    def grows(self) -> bool:
        return self.last - self.first > self.noise + self.allowed


def growths(samples: Samples, part: str, began: float, ended: float, kills: int = 0) -> Iterator[Growth]:
    """Of each figure that was measured in a part of the run with so many kills, whose first tenth is its warm-up."""
    began += (ended - began) / 10
    third = (ended - began) / 3
    for name, values in sorted(samples.figures.items()):
        of_part = [v for t, v in values if began <= t <= ended]
        first = [v for t, v in values if began <= t <= began + third]
        last = [v for t, v in values if ended - third <= t <= ended]
        if first and last and not (kills and name.startswith("worker: ")):  # where they are killed they stay young
            allowed = MB_PER_KILL.get(name, 0.0) * kills
            yield Growth(part, name, statistics.median(first), statistics.median(last), max(of_part), allowed)


class Soak:
    """The training, and what is done to it.

    Args:
        folder: an empty one, of a short path (Ray's sockets lie in it).
    """

    def __init__(self, folder: Path, num_steps: int, num_kills: int, outage_s: float, seed: int):
        self._folder, self._num_steps, self._num_kills, self._outage_s = folder, num_steps, num_kills, outage_s
        self._random = random.Random(seed)
        self.samples, self.kills, self.step = Samples(), 0, 0
        self.parts: dict[str, tuple[float, float]] = {}  # when they began and ended
        self._until_kill = num_steps // 4 // (num_kills or 300)  # where none are killed, the pace of checkpoints
        self._every = max(1, self._until_kill // NUM_CHECKPOINTS)
        self._log = folder / "training.log"  # `MlflowServer` has one of its own there

    def run(self) -> int:
        """Train to the end; the command's exit code."""
        make_digits.write(self._folder / "digits")
        site = write_site(self._folder / "site", {"pipeline.models.resnet": TINY})
        (self._folder / "tmp").mkdir()
        port = free_port()
        with MlflowServer(self._folder, port) as server, Proxy(port, free_port()) as proxy:
            server.start()
            path = os.pathsep.join([str(site), str(ROOT), os.environ.get("PYTHONPATH", "")])
            env = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(self._folder / "tmp")}
            with self._started(self._command(proxy.uri), env) as process:
                self._watch(psutil.Process(process.pid), process, proxy)
                return process.wait()

    def _command(self, uri: str) -> list[str]:
        cadence = [f"train.steps={self._num_steps}", f"train.log_every={max(10, self._every // 2)}"]
        cadence += [f"checkpoint.every={self._every}", f"train.eval_every={max(1, self._num_steps // 50)}"]
        data = [f"data.{split}={self._folder}/digits/{split}" for split in ("train", "val")]
        place = [f"run.storage={self._folder}/runs", f"mlflow.uri={uri}"]
        command = [str(Path(sys.executable).parent / "pipeline"), "train", str(ROOT / "configs/digits.yaml")]
        return [*command, *SETTINGS.split(), *cadence, *data, *place]

    @contextmanager
    def _started(self, command: Sequence[str], env: Mapping[str, str]) -> "Iterator[subprocess.Popen[bytes]]":
        with self._log.open("wb") as log:
            process = subprocess.Popen(command, env=dict(env), stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()  # it saves, and takes Ray with it
                process.wait(120)

    def _watch(self, tree: psutil.Process, process: "subprocess.Popen[bytes]", proxy: Proxy) -> None:
        began = time.monotonic()
        sampled, next_kill, half, rose = began, self._until_kill, began, began
        with self._log.open(encoding="utf-8", errors="replace") as log:
            while process.poll() is None and self.step < self._num_steps:
                time.sleep(POLL_S)
                now = time.monotonic()
                for line in log:
                    if found := re.match(r"step (\d+)/", line):
                        self.step, rose = int(found[1]), now
                if now - rose > STALLED_S:
                    raise TimeoutError(f"no step for {STALLED_S:.0f} s after {self.step}")
                if now - half > self._outage_s:
                    half, proxy.mode = now, "down" if proxy.mode == "up" else "up"
                if self.kills < self._num_kills and self.step >= next_kill and self._kill(tree):
                    next_kill = self.step + self._until_kill
                    if self.kills in (1, self._num_kills):  # a part begins
                        began = now
                elif now - sampled > SAMPLE_S:
                    sampled = now
                    self.samples.add({**self._processes(tree), **self._folders()})
                self.parts["killed" if 0 < self.kills < self._num_kills else "left alone"] = began, now
        proxy.mode = "up"
        process.wait(END_S)

    def _kill(self, tree: psutil.Process) -> bool:
        """Kill a process of the training; False where none was there."""
        driver = self.kills % EACH_NTH_IS_DRIVER == EACH_NTH_IS_DRIVER - 1
        targets = [p for p, role in _roles(tree) if role == ("driver" if driver else "worker")]
        if not targets:
            return False
        with suppress(psutil.NoSuchProcess):
            self._random.choice(targets).send_signal(signal.SIGKILL)
        self.kills += 1
        return True

    def _processes(self, tree: psutil.Process) -> dict[str, float]:
        """Of workers and Ray's processes the largest figure of them; of young processes only their number."""
        figures, number = dict[str, float](), 0
        for process, role in _roles(tree):
            with suppress(psutil.Error):
                number += 1
                is_young = time.time() - process.create_time() < YOUNG_S
                if is_young or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                memory = process.memory_full_info().uss / 1e6
                for what, value in [
                    ("memory", memory),
                    ("threads", process.num_threads()),
                    ("descriptors", process.num_fds()),
                ]:
                    figures[f"{role}: {what}"] = max(value, figures.get(f"{role}: {what}", 0))
        return {**figures, "processes, with zombies: number": number}

    def _folders(self) -> dict[str, float]:
        runs, tmp = self._folder / "runs", self._folder / "tmp"
        places = {"run's checkpoints": runs / "soak/checkpoints", OUTBOX: runs, TEMPORARY: tmp}
        return {f"{name}: disk": _bytes(place) / 1e6 for name, place in places.items()}


def _roles(tree: psutil.Process) -> list[tuple[psutil.Process, str]]:
    """The command's processes, each with what it is."""
    found = [(tree, "command")]
    for process in tree.children(recursive=True):
        with suppress(psutil.Error):
            command = " ".join(process.cmdline()) or process.name()
            found.append((process, next((r for r, like in ROLES.items() if re.search(like, command)), "others")))
    return found


def _bytes(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # it was deleted meanwhile
                total += Path(place, name).lstat().st_blocks * 512
    return total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500_000)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument(
        "--outage", type=float, default=60.0, help="of MLflow's server, seconds; then it is there as long"
    )
    parser.add_argument("--seed", type=int, default=0, help="of which worker is killed")
    parser.add_argument("--keep", action="store_true", help="the folder with all that the training wrote")
    parser.add_argument("--out", type=Path, help="where all figures go, as JSON")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/tmp"))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    began = time.monotonic()
    try:
        soak = Soak(folder, args.steps, args.kills, args.outage, args.seed)
        code = soak.run()
    except KeyboardInterrupt:  # what has been measured by now is told
        code = -signal.SIGINT
    finally:
        if not args.keep:
            shutil.rmtree(folder, ignore_errors=True)  # a last process may still be writing
    grown = list[Growth]()
    for part, (start, end) in soak.parts.items():
        grown += growths(soak.samples, part, start, end, soak.kills if part == "killed" else 0)
    minutes = (time.monotonic() - began) / 60
    print(f"{soak.step:,} steps and {soak.kills} kills in {minutes:.0f} minutes; exit code {code}")
    for g in grown:
        unit = UNITS[g.name.rpartition(": ")[2]]
        columns = f"{g.first:10.1f} {g.last:10.1f} {g.highest:10.1f} {unit:3}"
        print(f"{g.part:11} {g.name:36} {columns}{'  grows' if g.grows else ''}")
    if args.out:
        args.out.write_text(
            json.dumps({"growth": [asdict(g) for g in grown], "samples": soak.samples.figures}), encoding="utf-8"
        )
    return int(code != 0 or soak.kills < args.kills or any(g.grows for g in grown))


if __name__ == "__main__":
    sys.exit(main())
