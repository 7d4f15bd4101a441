"""Slurm, played: `scontrol`, `squeue` and `srun` as commands on this machine, where all nodes of a job are this host.

Signals go where Slurm sends them, by its documentation and source (proctrack/cgroup):

- `--signal=B:` to the batch shell alone; a preemption's grace time to the steps' tasks alone. Their children get none.
- `srun` hands SIGUSR1 on to its tasks. At SIGTERM it kills them, with all that they have started.

A prolog runs before the batch script and before each task; what it prints as `export NAME=VALUE` is set for them.
"""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:  # it takes seconds, and each command here would
    from commands import Start, Training

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "slurm.sbatch"


def directives() -> dict[str, str]:
    """The script's #SBATCH lines: option -> value."""
    return dict(re.findall(r"^#SBATCH --([a-z-]+)=?(\S*)$", SCRIPT.read_text(), re.MULTILINE))


class FakeSlurm:
    """A cluster with one job. What still runs of it at the end of the block is killed, as Slurm does at a job's end.

    Attributes:
        job: its number.
        prolog: a shell script's text.
        home, work: the user's home folder, and the one that the job is submitted from; all nodes have both.
    """

    def __init__(self, folder: Path, start: "Start", job: int, nodes: int = 2):
        self.prolog = ""
        self.home, self.work, self._programs = folder / "home", folder / "work", folder / "bin"
        self._folder, self._start, self.job, self._nodes = folder, start, str(job), nodes
        for place in (self.home, self.work, self._programs, folder / "spool"):
            place.mkdir()
        for name in PLAYED:
            self.program(name, f'exec {sys.executable} {__file__} {name} "$@"')
        self.set_state("RUNNING")

    def set_state(self, state: str) -> None:
        """What `squeue` is to say of the job."""
        (self._folder / "state").write_text(state)

    def set_nodes(self, nodes: int) -> None:
        """How many the job has."""
        self._nodes = nodes

    def program(self, name: str, text: str) -> None:
        """Have a bash script stand for a command of the job's."""
        (self._programs / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self._programs / name).chmod(0o755)

    def submit(
        self, *args: str, restarts: int = 0, env: dict[str, str] | None = None, edits: dict[str, str] | None = None
    ) -> "Training":
        """Start the batch script as on the job's first node: a copy of it, in the folder that it was submitted from.

        Args:
            restarts: how often the job was requeued.
            env: besides Slurm's variables.
            edits: text of the script -> what takes its place.
        """
        script, text = self._folder / "spool" / "slurm_script", SCRIPT.read_text()
        for old, new in (edits or {}).items():
            assert old in text
            text = text.replace(old, new)
        script.write_text(text)
        (self._folder / "prolog").write_text(self.prolog)
        environment = {
            "PATH": f"{self._programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "FAKE_SLURM": str(self._folder),
            "SLURM_JOB_ID": self.job,
            "SLURM_JOB_NAME": directives()["job-name"],
            "SLURM_JOB_NODELIST": f"node[1-{self._nodes}]",
            "SLURM_JOB_NUM_NODES": str(self._nodes),
            "SLURM_CPUS_ON_NODE": "1",
            "SLURM_SUBMIT_DIR": str(self.work),
            **({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {}),
            **(env or {}),
        }
        environment |= _run_prolog(self._folder, environment)
        command = ["bash", "-c", 'cd "$1"; exec bash "${@:2}"', "slurmd", str(self.work), str(script), *args]
        return self._start(command, environment)

    def calls(self, name: str) -> list[list[str]]:
        """The arguments of each call of a command."""
        file = self._folder / f"{name}.calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def signal_steps(self, batch: "Training", number: signal.Signals) -> None:
        """Signal the tasks of all steps, but not the batch shell."""
        for srun in batch.find(f"{__file__} srun"):
            for task in psutil.Process(srun).children():
                task.send_signal(number)

    def processes(self) -> list[psutil.Process]:
        """Those that the job has, also where the ones that started them have ended."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("FAKE_SLURM") == str(self._folder):
                    found.append(process)
        return found

    def __enter__(self) -> "FakeSlurm":
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self.processes():
            process.kill()


def _run_prolog(folder: Path, environment: dict[str, str]) -> dict[str, str]:
    command = ["sh", str(folder / "prolog")]
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return dict(re.findall(r"^export (\w+)=(.*)$", done.stdout, re.MULTILINE))


def _scontrol(folder: Path, words: list[str]) -> int:
    if words[:2] == ["show", "hostnames"]:
        (count,) = re.findall(r"^node\[1-(\d+)\]$", words[2])
        print("\n".join(["127.0.0.1"] * int(count)))
    return 0


def _squeue(folder: Path, words: list[str]) -> int:
    print((folder / "state").read_text())
    return 0


def _srun(folder: Path, words: list[str]) -> int:
    num_options = next(i for i, word in enumerate(words) if not word.startswith("--"))
    options = dict(word[2:].split("=") for word in words[:num_options])
    tasks: list[subprocess.Popen[bytes]] = []

    def handle(number: int, frame: FrameType | None) -> None:
        for task in tasks if number == signal.SIGUSR1 else psutil.Process().children(recursive=True):
            task.send_signal(number if number == signal.SIGUSR1 else signal.SIGKILL)

    signals = (signal.SIGUSR1, signal.SIGTERM)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    for number in signals:
        signal.signal(number, handle)
    for rank in range(int(options["ntasks"])):
        environment = os.environ | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)}
        environment |= _run_prolog(folder, environment)
        task = subprocess.Popen(
            words[num_options:],
            env=environment,
            start_new_session=True,
            preexec_fn=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, signals),
        )
        tasks.append(task)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    return max(abs(task.wait()) for task in tasks)


PLAYED = {"scontrol": _scontrol, "squeue": _squeue, "srun": _srun}


def main() -> int:
    name, words, folder = sys.argv[1], sys.argv[2:], Path(os.environ["FAKE_SLURM"])
    with (folder / f"{name}.calls").open("a") as file:
        file.write(json.dumps(words) + "\n")
    return PLAYED[name](folder, words)


if __name__ == "__main__":
    sys.exit(main())
