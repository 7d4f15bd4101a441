"""Which training a run's folder holds: run.json.

{"training_id": finds the MLflow run and the run's own checkpoints, "began": the command that began it, Unix time,
 "attempts": so far, "failures": so far, "open": whether an attempt has not ended,
 "precision": what the last one computed in, "place": path or URI of the folder in which this was written,
 "failure": why no attempt is to follow by itself, if so}
"""

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from pipeline.config.training import Precision
from pipeline.runs.claim import Claim, SupersededError
from pipeline.runs.spec import Failure
from pipeline.storage import Storage

FILE = "run.json"


@dataclass(frozen=True)
class RunManifest:
    training_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    attempts: int = 0
    failures: int = 0
    open: bool = False
    began: float = field(default_factory=time.time)
    precision: str | None = None
    place: str = ""
    failure: str = ""

    @classmethod
    def read(cls, run: Storage, warn: Callable[[str], None]) -> "RunManifest | None":
        """Of the training in the folder `run`; None where it does not say, which is reported if it should."""
        try:
            content = json.loads(run.read_bytes(FILE))
            numbers = int(content["attempts"]), int(content["failures"])
            is_open, began = bool(content["open"]), float(content.get("began", time.time()))
            precision = content.get("precision")
            if precision not in (*get_args(Precision), None):
                raise ValueError(precision)
            place, failure = (str(content.get(key, "")) for key in ("place", "failure"))
            return cls(str(content["training_id"]), *numbers, is_open, began, precision, place, failure)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            warn(f"{run / FILE} is damaged; the newest checkpoint tells which training this is")
            return None

    def write(self, run: Storage) -> None:
        run.write_bytes(FILE, json.dumps({**dataclasses.asdict(self), "place": run.uri}).encode())

    def replaced(self, new: "RunManifest", run: Storage, claim: Claim | None) -> "RunManifest":
        """`new`, written in its place; errors as of `check`."""
        if RunManifest.read(run, lambda _: None) == dataclasses.replace(
            new, place=run.uri
        ):  # by a try without an answer
            return new
        self.check(run, claim)
        new.write(run)
        return new

    def begin(self, new_failures: int, precision: str | None = None) -> "RunManifest":
        """With one attempt more."""
        attempts, failures = self.attempts + 1, self.failures + new_failures
        precision = precision or self.precision
        return dataclasses.replace(
            self, attempts=attempts, failures=failures, open=True, precision=precision, failure=""
        )

    def end(self, failure: str = "") -> "RunManifest":
        return dataclasses.replace(self, open=False, failure=failure)

    def facts(self) -> dict[str, str | int]:
        """What checkpoints and summaries tell of it."""
        return {"training_id": self.training_id, "attempts": self.attempts, "failures": self.failures}

    def tags(self, failures: Sequence[Failure], first_step: int, workers: int) -> dict[str, str | int]:
        """What MLflow is told at the beginning of an attempt that these failures came before."""
        return {
            "pipeline.attempts": self.attempts,
            f"pipeline.attempt_{self.attempts}": f"from step {first_step}, {workers} workers",
            "pipeline.failures": self.failures,
            **{f"pipeline.failure_{self.failures - i}": failure.text for i, failure in enumerate(reversed(failures))},
        }

    def recovery(self, failures: Sequence[Failure], first_step: int, workers: int) -> dict[str, Any]:
        """What is worth a chart at the beginning of an attempt that these failures came before."""
        recovery: dict[str, Any] = {"first_step": first_step, "workers": workers, "failures": self.failures}
        if failures and failures[0].step is not None:
            recovery["lost_steps"] = max(0, failures[0].step - first_step)
            recovery["recovery_s"] = round(time.time() - failures[0].time, 1)
        return recovery

    def unended(self) -> tuple[Failure, ...]:
        """The failure that is left of an attempt which could not tell of its end."""
        if not self.open:
            return ()
        return (Failure(f"attempt {self.attempts} ended without a word: its processes were killed", None, time.time()),)

    def check(self, run: Storage, claim: Claim | None) -> None:
        """Make sure that the run is still this attempt's to write.

        A rank that was cut off from the others may still run when its successor has begun. What an earlier driver wrote
        late, as it was just about to when this one came, is put right.

        Raises:
            SupersededError: another driver has the run.
            RuntimeError: the same driver's next attempt has begun.
            OSError: see `Claim.check`.
        """
        now = RunManifest.read(run, lambda _: None)
        if claim is not None:
            claim.check()
        if now is None:
            return
        is_other = now.training_id != self.training_id
        if is_other and claim is None:
            raise SupersededError(f"another training has begun in {run}; this one ends")
        if not is_other and now.attempts > self.attempts:
            raise RuntimeError(f"attempt {now.attempts} of {run} has begun; attempt {self.attempts} ends")
        if claim is not None and (is_other or now.attempts < self.attempts):
            self.write(run)
