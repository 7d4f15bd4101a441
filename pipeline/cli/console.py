"""What people see: a progress bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import IO, Any, Self

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from pipeline.events import (
    AttemptFailed,
    AttemptStarted,
    BrokenImage,
    CheckpointWritten,
    CrashingImageFound,
    Evaluated,
    Event,
    ImageSearchStarted,
    Note,
    Resizing,
    RunOpened,
    StepLogged,
    Stopping,
    Warned,
)
from pipeline.text import columns, figure, shorten

LINE_EVERY_S = 5.0  # where there is no bar


class _Console(RichConsole):
    def on_broken_pipe(self) -> None:
        """Nobody reads any more: no reason to end what is under way, as rich's own does."""
        self.quiet = True


class _View:
    """A bar, where `file` is a terminal, and lines. To be used as a context."""

    def __init__(self, file: IO[str]):
        self._console = _Console(file=file, highlight=False, soft_wrap=True)
        self._task: Any = None
        self._began = time.monotonic()
        self._bar: Progress | None = None
        if self._console.is_terminal:
            text = TextColumn("{task.description}", markup=False)
            bar = BarColumn(bar_width=30)
            self._bar = Progress(bar, MofNCompleteColumn(), text, TimeRemainingColumn(), console=self._console)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bar:
            self._bar.stop()

    def print(self, text: str) -> None:
        try:
            self._console.print(text, markup=False)
        except OSError:  # nobody reads any more (a closed pipe or terminal): no reason to end what is under way
            self._console.quiet = True


class WorkView(_View):
    """Shows how far some work is: call it with what is done, of how much, and words."""

    def __init__(self, file: IO[str]):
        super().__init__(file)
        self._last_line = self._began

    def __call__(self, done: int, total: int, text: str) -> None:
        if self._bar:
            self._task = self._bar.add_task("") if self._task is None else self._task
            self._bar.update(self._task, completed=done, total=total, description=text)
        elif time.monotonic() - self._last_line >= LINE_EVERY_S:
            self._last_line = time.monotonic()
            self.print(f"{done} of {total}: {text}")


class TrainingView(_View):
    """Shows the events of a training: call it with each."""

    def __init__(self, file: IO[str]):
        super().__init__(file)
        self._rate, self._num_steps, self._global_batch = 0.0, 0, 0
        self._saved_step: int | None = None  # of the newest checkpoint, as far as is known
        self.run: str | None = None  # its name
        self.place = ""  # and folder
        self.resumes_at: int | None = None  # the step of the newest checkpoint there, as far as is known

    def __call__(self, event: Event) -> None:
        match event:
            case RunOpened(name, place):
                self.run, self.place = name, place
                self.print(f"run {name} in {place}")
            case AttemptStarted():
                self._start(event)
            case StepLogged():
                self._step(event)
            case Evaluated(step, scores):
                self.print(
                    f"step {step}: val top-1 {scores['top1']:.4f}, top-5 {scores['top5']:.4f}, "
                    f"loss {scores['loss']:.4f} on {int(scores['count'])} images"
                )
            case CheckpointWritten(step, place):
                self._saved_step = self.resumes_at = step
                if self._bar is None:
                    self.print(f"step {step}: saved {place}")
            case Stopping(signal):
                how = "saving a checkpoint at the next step" if self._num_steps else "ending, as no step is done"
                self.print(f"{signal}: {how}{'; a second Ctrl-C stops at once' if signal == 'SIGINT' else ''}")
            case Resizing(text):
                self.print(f"{text}: saving a checkpoint, then going on with the workers there are")
            case AttemptFailed(text):
                how = "starting again" if self._saved_step is None else f"going on from step {self._saved_step}"
                self.print(f"failure: {text}; {how}")
            case Note(text) | ImageSearchStarted(text):
                self.print(text)
            case Warned() | BrokenImage() | CrashingImageFound():
                self.print(f"warning: {event.text}")

    def _start(self, event: AttemptStarted) -> None:
        self._num_steps, self._global_batch = event.num_steps, event.global_batch
        self._saved_step = event.step if event.resumed_from else None
        is_own = event.resumed_from and event.resumed_from.startswith(f"{self.place}/")
        self.resumes_at = event.step if is_own else None
        where = f"resumed from {event.resumed_from}" if event.resumed_from else "from the start"
        ready = f"after {time.monotonic() - self._began:.1f} s"
        if event.lost_steps is not None:
            ready = f"{event.recovery_s:.0f} s after the failure, {event.lost_steps} steps to do again"
        compiled = event.compilation and f"{event.compilation}, "
        self.print(
            f"attempt {event.attempt}: step {event.step} of {self._num_steps}, {where}; "
            f"{event.world_size} workers x {event.num_threads} threads on {event.device} "
            f"in {event.precision} ({event.precision_reason}), {compiled}ready {ready}"
        )
        self.print("  " + ", ".join(f"{name} {s:.1f} s" for name, s in event.startup.items()))
        if self._bar and self._task is None:
            self._task = self._bar.add_task("", total=self._num_steps, completed=event.step)

    def _step(self, event: StepLogged) -> None:
        metrics, rate = event.metrics, event.metrics["perf/images_per_s"]
        self._rate = rate if not self._rate else 0.7 * self._rate + 0.3 * rate
        text = f"loss {metrics['train/loss']:.4f}  {rate:.0f} images/s"
        if self._bar:
            self._bar.update(self._task, completed=event.step, description=text)
            return
        left = (self._num_steps - event.step) * self._global_batch / self._rate
        self.print(
            f"step {event.step}/{self._num_steps}  epoch {metrics['train/epoch']:.2f}  lr {metrics['train/lr']:.2e}  "
            f"{text}  {timedelta(seconds=round(left))} left"
        )


def format_summary(summary: dict[str, Any]) -> list[str]:
    """The end of a training, for people."""
    uri, run_id = summary["mlflow_uri"], summary["mlflow_run_id"]
    page = f"#/experiments/{summary['mlflow_experiment_id']}/runs/{run_id}"
    longest = sorted(summary["seconds"].items(), key=lambda item: -item[1])
    seconds = ", ".join(f"{name} {s:.0f} s" for name, s in longest if s >= 0.5)
    lines = [
        f"{summary['status']} at step {summary['step']} of {summary['num_steps']}",
        f"  top-1       {figure(summary['top1'])}   top-5 {figure(summary['top5'])}",
        f"  speed       {figure(summary['images_per_s'], '.1f')} images/s",
        f"  time        {seconds}",
        f"  goodput     {summary['goodput']:.1%} of the time of all attempts went into steps that count",
        f"  checkpoint  {summary['checkpoint']}",
        f"  MLflow run  {run_id or 'not reached'}",
    ]
    if run_id is None:
        lines.append(f"  to send it  pipeline sync {summary['run_dir']}")
    elif uri.startswith("sqlite:") and not summary["mlflow_public_url"]:
        lines.append(f"  look at it  mlflow ui --port 5000 --backend-store-uri {uri}")
        lines.append(f"              then open http://127.0.0.1:5000/{page}")
    else:
        lines.append(f"  look at it  {(summary['mlflow_public_url'] or uri).rstrip('/')}/{page}")
    if summary["status"] == "interrupted":
        lines.append(f"  go on with  pipeline train --resume {summary['run_dir']}")
    return lines


def format_scores(scores: Mapping[str, float]) -> str:
    named = {"top-1": "top1", "top-5": "top5", "loss": "loss", "calibration error": "ece"}
    return "  ".join(f"{name} {scores[key]:.4f}" for name, key in named.items())


def format_report(head: Mapping[str, Any], worst: Sequence[Mapping[str, Any]], num_classes: int) -> list[str]:
    """A report's figures, in at most 80 columns.

    Args:
        head: of `Facts.headline`.
        worst: of the classes with the lowest recall, {"class", "images", "recall", "precision", "taken_for"}.
    """
    of = "" if head["num_steps"] is None else f" of {head['num_steps']}"
    lines = [
        format_scores(head),
        f"on {int(head['count'])} images, after step {head['step']}{of}",
        f"{figure(head['images_per_s'], '.1f')} images/s, goodput {figure(head['goodput'], '.1%')}, "
        f"attempts {figure(head['attempts'])}, failures {figure(head['failures'])}",
        "",
    ]
    rows = [(f"worst of {num_classes} classes", "images", "accuracy", "precision", "taken for")]
    for scores in worst:
        figures = figure(scores["images"], "d"), figure(scores["recall"]), figure(scores["precision"])
        rows.append((shorten(scores["class"], 26), *figures, shorten(scores["taken_for"] or "-", 21)))
    lines += [*columns(rows, "<>>>"), ""]
    total_s = sum(head["seconds"].values())
    times = [(name, f"{s:.1f}", f"{s / total_s:.1%}") for name, s in head["seconds"].items() if s >= 0.05]
    return lines + columns([(f"time {head['counted']}", "seconds", "share"), *times], "<>>")
