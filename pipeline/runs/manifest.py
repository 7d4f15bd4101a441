"""Which training a run's folder holds: run.json.

{"training_id": finds the MLflow run and the run's own checkpoints, "began": the command that began it, Unix time,
 "sessions": so far, "faults": so far, "open": whether a session has not ended,
 "precision": what the last one computed in, "place": path or URI of the folder in which this was written,
 "failure": why no session is to follow by itself, if so}
"""

import dataclasses
import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import get_args

from pipeline.config.schema import Precision
from pipeline.runs.claim import Claim, SupersededError
from pipeline.runs.spec import Failure
from pipeline.storage import Storage

FILE = "run.json"


@dataclass(frozen=True)
class RunManifest:
    training_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    sessions: int = 0
    faults: int = 0
    open: bool = False
    began: float = field(default_factory=time.time)
    precision: str | None = None
    place: str = ""
    failure: str = ""

    @classmethod
    def read(cls, run: Storage, report: Callable[[str], None]) -> "RunManifest | None":
        """Of the training in the folder `run`; None where it does not say, which is reported if it should."""
        try:
            content = json.loads(run.read_bytes(FILE))
            numbers = int(content["sessions"]), int(content["faults"])
            is_open, began = bool(content["open"]), float(content.get("began", time.time()))
            precision = content.get("precision")
            if precision not in (*get_args(Precision), None):
                raise ValueError(precision)
            place, failure = (str(content.get(key, "")) for key in ("place", "failure"))
            return cls(str(content["training_id"]), *numbers, is_open, began, precision, place, failure)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError):
            report(f"{run / FILE} is damaged; the newest checkpoint tells which training this is")
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

    def begin(self, new_faults: int, precision: str | None = None) -> "RunManifest":
        """With one session more."""
        sessions, faults = self.sessions + 1, self.faults + new_faults
        precision = precision or self.precision
        return dataclasses.replace(self, sessions=sessions, faults=faults, open=True, precision=precision, failure="")

    def end(self, failure: str = "") -> "RunManifest":
        return dataclasses.replace(self, open=False, failure=failure)

    def facts(self) -> dict[str, str | int]:
        """What checkpoints and summaries tell of it."""
        return {"training_id": self.training_id, "sessions": self.sessions, "faults": self.faults}

    def tags(self, faults: Sequence[Failure], first_step: int, workers: int) -> dict[str, str | int]:
        """What MLflow is told at the beginning of a session that these faults came before."""
        return {
            "pipeline.sessions": self.sessions,
            f"pipeline.session_{self.sessions}": f"from step {first_step}, {workers} workers",
            "pipeline.faults": self.faults,
            **{f"pipeline.fault_{self.faults - i}": fault.text[:500] for i, fault in enumerate(reversed(faults))},
        }

    def story(self, faults: Sequence[Failure], first_step: int, workers: int) -> dict[str, float]:
        """What is worth a chart at the beginning of a session that these faults came before."""
        story: dict[str, float] = {"first_step": first_step, "workers": workers, "faults": self.faults}
        if faults and faults[0].step is not None:
            story["lost_steps"] = max(0, faults[0].step - first_step)
            story["recovery_s"] = round(time.time() - faults[0].time, 1)
        return story

    def unended(self) -> tuple[Failure, ...]:
        """The fault that is left of a session which could not tell of its end."""
        if not self.open:
            return ()
        return (Failure(f"session {self.sessions} ended without a word: its processes were killed", None, time.time()),)

    def check(self, run: Storage, claim: Claim | None) -> None:
        """Make sure that the run is still this session's to write.

        A rank that was cut off from the others may still run when its successor has begun. What an earlier driver wrote
        late, as it was just about to when this one came, is put right.

        Raises:
            SupersededError: another driver has the run.
            RuntimeError: the same driver's next session has begun.
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
        if not is_other and now.sessions > self.sessions:
            raise RuntimeError(f"session {now.sessions} of {run} has begun; session {self.sessions} ends")
        if claim is not None and (is_other or now.sessions < self.sessions):
            self.write(run)
