"""`pipeline runs`: what a storage says of each run in it, without reading any weights.

Facts come from run.json, the newest checkpoint's meta.json and the lock. What is damaged is told beside the
run, and does not keep the others from being listed.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import UserError
from pipeline.failures import CheckpointError, IncompleteError
from pipeline.runs import checkpoint, lock
from pipeline.runs.manifest import FILE, RunManifest
from pipeline.runs.spec import CHECKPOINTS
from pipeline.storage import Storage
from pipeline.text import columns, figure

# training: a live process of a machine that shares the directory holds it. died: an attempt has not ended, and nobody
# holds it. open: an attempt has not ended, and an object store has no locks to tell more. stopped: before its last
# step. failed: by an error that no new attempt was to follow. new: it has no checkpoint.
State = Literal["training", "died", "open", "failed", "new", "stopped", "done"]


@dataclass(frozen=True)
class Listed:
    """A run. changed: by its training, Unix time. resumes_at: the step from which it would go on; None where it is
    being trained, is done, or has damaged checkpoints alone. problem: what is damaged."""

    name: str
    state: State
    step: int
    num_steps: int | None
    best_top1: float | None
    images_per_s: float | None
    changed: float | None
    resumes_at: int | None
    problem: str | None


def listed(storage: Storage) -> list[Listed]:
    """The runs in `storage`, the one that changed last first.

    Raises:
        UserError: there is no such folder, or the storage does not answer.
    """
    try:
        names = storage.names()
        # An object store has no empty folders.
        if not (storage.local.is_dir() if storage.local else names):
            raise UserError(f"--storage {storage}: no such folder; name the place where runs lie")
        found = [_look(storage / name) for name in names if not name.startswith(".")]
    except OSError as e:
        raise UserError(f"--storage {storage}: cannot be read ({e}); name the place where runs lie") from None
    return sorted((run for run in found if run is not None), key=lambda run: run.changed or 0, reverse=True)


def _look(run: Storage) -> Listed | None:
    """What is known of a run; None for what is none."""
    names = set(run.names())
    if not {FILE, lock.FILE, CHECKPOINTS} & names:
        return None
    problems: list[str] = []
    manifest = RunManifest.read(run, lambda _: problems.append(f"{FILE} is damaged")) if FILE in names else None
    meta = _newest(run / CHECKPOINTS, problems)
    step, num_steps = int(meta["step"]) if meta else 0, _number(meta, "num_steps")
    # Of the last step, too, the evaluation belongs to it.
    done = meta is not None and num_steps is not None and step >= num_steps and bool(meta["metrics"])
    state: State
    if lock.is_held(run) and not (done and manifest is not None and not manifest.open):  # a done run may be synced
        state = "training"
    elif manifest is not None and manifest.open:
        state = "died" if run.local else "open"
    elif manifest is not None and manifest.failure:
        state = "failed"
    else:
        state = "done" if done else "stopped" if meta else "new"
    lost, saved = not meta and bool(problems), _number(meta, "saved_at")
    # An ended training's last change is its checkpoint: `pipeline sync` writes into the folder, too.
    ended = state in ("done", "stopped") and saved is not None
    return Listed(
        name=run.name,
        state=state,
        step=step,
        num_steps=None if num_steps is None else int(num_steps),
        best_top1=_number(meta, "best_top1"),
        images_per_s=_number(meta, "images_per_s"),
        changed=saved if ended else max(filter(None, (run.changed(), saved)), default=None),
        resumes_at=None if lost or state in ("training", "done") else step,
        problem="; ".join(problems) or None,
    )


def _newest(folder: Storage, problems: list[str]) -> dict[str, Any]:
    """The meta.json of the newest checkpoint whose files are there in full; empty where there is none."""
    for name in checkpoint.names_in(folder):
        place = folder / name
        try:
            meta, sizes = checkpoint.read_meta(place), place.sizes()
            if checkpoint.is_whole(meta, sizes):
                return meta
            problems.append(f"{name} is damaged")
        except IncompleteError:
            continue
        except (CheckpointError, KeyError, TypeError):
            problems.append(f"{name} is damaged")
    return {}


def _number(meta: dict[str, Any], key: str) -> float | None:
    """Of a meta.json, which another version may have written."""
    value = meta.get(key)
    return float(value) if isinstance(value, (int, float)) else None


def table(runs: Sequence[Listed]) -> list[str]:
    """For people; of 80 columns where names have up to 24 characters."""
    rows = [("RUN", "STATE", "STEP", "TOP-1", "IMG/S", "CHANGED", "RESUMES")]
    for run in runs:
        steps = f"{run.step}/{'?' if run.num_steps is None else run.num_steps}"
        speed, resumes = figure(run.images_per_s, ".0f"), "-" if run.resumes_at is None else f"at {run.resumes_at}"
        rows.append((run.name, run.state, steps, figure(run.best_top1), speed, _age(run.changed), resumes))
    return [*columns(rows, gap=1), *(f"{run.name}: {run.problem}" for run in runs if run.problem)]


def _age(changed: float | None) -> str:
    if changed is None:
        return "-"
    s = max(0.0, time.time() - changed)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if s >= size:
            return f"{s / size:.0f} {unit}"
    return f"{s:.0f} s"
