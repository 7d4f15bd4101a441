"""Checkpoints: a training state as a directory that is either whole or not there.

    step_00000120/
        state.pt      model, EMA, optimizer, scaler, step; loaded with weights_only, never unpickled
        config.yaml   the resolved configuration
        meta.json     format, SHA-256 and size of each file, versions, index fingerprint, metrics, ids

In a directory it is written under a temporary name, fsynced, and renamed; in an object store meta.json
comes last. So a crash leaves something behind that has no meta.json, never half a checkpoint that has one. There, names
have a part of the SHA-256 (state-3f2a....pt): what a driver uploads late, which has lost the run to a later one,
replaces nothing of that one's.
Which one to resume from is found by reading the storage, not by anyone's records.
"""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.config import loading
from pipeline.config.schema import Config
from pipeline.failures import READ_CHECKPOINT_S, CheckpointError, IncompleteError, retry
from pipeline.local_files import alone, fsync, temporary_name
from pipeline.runs.state_file import write_state
from pipeline.storage import Storage
from pipeline.versions import software

FORMAT = 2
STATE, CONFIG, META = "state.pt", "config.yaml", "meta.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files were what its meta.json says.

    place: where it lies. path: the same files on this machine.
    """

    place: Storage
    path: Path
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.meta["step"])

    @property
    def top1(self) -> float | None:
        """Validation accuracy at this very step, if it was evaluated then."""
        value = self.meta["metrics"].get("top1")
        return None if value is None else float(value)

    @cached_property
    def cfg(self) -> Config:
        """What it was trained with. Read once: that takes half a second."""
        return loading.load_saved(self.file(CONFIG))

    def file(self, name: str) -> Path:
        """STATE or CONFIG; a folder that was copied from an object store has it by its name there."""
        return self.path / stored_as(name, self.meta["files"], {file.name for file in self.path.iterdir()})

    def state(self) -> dict[str, Any]:
        """The saved `TrainState.state_dict()`, on the CPU. Executes no code of the file."""
        import torch

        loaded: dict[str, Any] = torch.load(self.file(STATE), map_location="cpu", weights_only=True, mmap=True)
        return loaded


def stored_as(name: str, files: dict[str, Any], there: Collection[str]) -> str:
    """The name by which a folder has one of a checkpoint's files.

    Args:
        files: of its meta.json. there: names in the folder.
    """
    stored = str(files[name].get("stored", name))
    return stored if stored in there else name


def is_whole(meta: dict[str, Any], sizes: dict[str, int]) -> bool:
    """Whether the files are there with the sizes that meta.json says."""
    files = meta["files"]
    return all(sizes.get(stored_as(name, files, sizes)) == files[name]["size"] for name in (STATE, CONFIG))


def name_of(step: int) -> str:
    """Of the folder that a step's checkpoint is."""
    return f"step_{step:08d}"


def is_seen(folder: Storage, step: int) -> bool:
    """Whether this machine sees something of a step's checkpoint."""
    return name_of(step) in folder.names()


def save(
    folder: Storage,
    state: dict[str, Any],
    cfg: Config,
    meta: dict[str, Any],
    check: Callable[[], None] = lambda: None,
) -> Checkpoint:
    """Write a checkpoint into `folder`, which must exist.

    Args:
        state: of `TrainState.state_dict()`; nothing may change it meanwhile.
        meta: what else belongs into meta.json: "fingerprint", "classes", "metrics", and of the training its
            "training_id", "attempts", "failures".
        check: raises where the run is not this attempt's to write any more; called before each change in the folder.

    Raises:
        OSError: it could not be written; what is left of it has no meta.json.
    """
    name = name_of(state["step"])
    place, staging = folder / name, folder.local_dir / temporary_name(name)
    if not folder.local:  # a local folder that has vanished, as with its mount, must not be made anew
        folder.local_dir.mkdir(parents=True, exist_ok=True)
    try:
        staging.mkdir()
        write_state(state, staging / STATE)
        (staging / CONFIG).write_text(loading.dump(cfg), encoding="utf-8")
        files = {file: _digest(staging / file) for file in (STATE, CONFIG)}
        if not folder.local:
            for file, digest in files.items():
                stem, _, suffix = file.rpartition(".")
                digest["stored"] = f"{stem}-{digest['sha256'][:16]}.{suffix}"
        own = {"format": FORMAT, "step": state["step"], "files": files}
        full_meta = {**own, **meta, **software(), "saved_at": time.time()}
        (staging / META).write_text(json.dumps(full_meta, indent=1), encoding="utf-8")
        for file in (STATE, CONFIG, META):
            fsync(staging / file)
        fsync(staging)
        if not folder.local:
            for file in (STATE, CONFIG, META):
                check()
                place.upload(staging / file, files.get(file, {}).get("stored", file))
        check()
        local = folder.local_dir / name
        shutil.rmtree(local, ignore_errors=True)  # a damaged one, or we would have resumed from it
        staging.rename(local)
        fsync(folder.local_dir)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Checkpoint(place, local, full_meta)


def with_scores(saved: Checkpoint, scores: dict[str, Any]) -> Checkpoint:
    """The same checkpoint, which now tells the scores of its weights.

    Raises:
        OSError: that could not be written; it is whole as it was.
    """
    best = max(saved.meta.get("best_top1") or 0.0, scores["top1"])
    meta = {**saved.meta, "metrics": scores, "best_top1": best}
    content = json.dumps(meta, indent=1).encode()
    saved.place.write_bytes(META, content)
    if not saved.place.local:  # what MLflow is sent, where it is still here
        with suppress(FileNotFoundError):
            Storage(saved.path).write_bytes(META, content)
    return Checkpoint(saved.place, saved.path, meta)


def load(place: Storage, *, verify_state: bool = True, use_copy: bool = False) -> Checkpoint:
    """Open a checkpoint after checking every byte of it, fetching it first where it lies elsewhere.

    Args:
        verify_state: False: its state is neither fetched nor checked but for its size, and must not be asked for.
        use_copy: a sound copy on this machine will do; the one in the store is known to be sound.

    Raises:
        CheckpointError: it is not what its meta.json says, or has none that this version reads.
        OSError: the storage does not answer.
    """
    meta = read_meta(place)
    if meta["format"] != FORMAT:
        raise CheckpointError(f"{place}: has format {meta['format']}, this version reads {FORMAT}")
    sizes, files = place.sizes(), meta["files"]
    names = {name: stored_as(name, files, sizes) for name in (STATE, CONFIG)}
    for name, stored in names.items():
        if stored not in sizes:
            raise CheckpointError(f"{place}: {stored} is missing")
        if sizes[stored] != files[name]["size"]:
            raise CheckpointError(f"{place}: {stored} is damaged (its size differs from {META})")
    path = place.local or place.parent.local_dir / place.name
    with nullcontext() if place.local else _fetching(path):
        for name in (STATE, CONFIG) if verify_state else (CONFIG,):
            file = path / (names[name] if place.local else name)
            if not (place.local or (use_copy and file.exists() and _is_sound(file, files[name]))):
                place.download(names[name], file)
            if not _is_sound(file, files[name]):
                raise CheckpointError(f"{place}: {name} is damaged (its SHA-256 differs from {META})")
        if verify_state and not place.local:
            place.download(META, path / META)  # a whole copy: MLflow is sent it
    return Checkpoint(place, path, meta)


@contextmanager
def _fetching(path: Path) -> Iterator[None]:
    """The ranks of a machine one after the other: the first one fetches."""
    path.mkdir(parents=True, exist_ok=True)
    with alone(path.parent):
        yield


def names_in(folder: Storage) -> list[str]:
    """The checkpoints in `folder`, usable or not, the newest first."""
    return sorted((name for name in folder.names() if name.startswith("step_")), reverse=True)


def newest_valid(
    folder: Storage, warn: Callable[[str], None], training_id: str | None = None, *, verify_state: bool = True
) -> Checkpoint | None:
    """The newest usable checkpoint in `folder`; newer ones that are not are reported and skipped.

    One that cannot be read is tried for some time before an older one takes its place: an answer that breaks off says
    nothing of what is stored.

    Args:
        training_id: of the run that goes on; checkpoints of another one are not its own.
        verify_state: see `load`.

    Returns:
        None where there is none, or none that was ever complete.

    Raises:
        CheckpointError: there were some, and all are damaged or foreign: to begin anew would hide that.
        OSError: the storage does not answer, or none is usable of those that can be read.
    """
    problems: list[CheckpointError] = []
    unread: OSError | None = None
    names = names_in(folder)
    for name in names:
        try:
            return retry(lambda: _read_own(folder / name, training_id, verify_state), warn, READ_CHECKPOINT_S)  # noqa: B023
        except CheckpointError as e:
            problems.append(e)
        except OSError as e:
            folder.names()  # raises where it is the whole storage that does not answer
            unread = e
            problems.append(CheckpointError(f"{folder / name}: cannot be read ({e})"))
        warn(f"skipped a checkpoint: {problems[-1]}")
    if unread is not None:
        raise unread
    if problems and names_in(folder) != names:  # someone trains the run, and deletes old ones
        return newest_valid(folder, warn, training_id, verify_state=verify_state)
    if not all(isinstance(problem, IncompleteError) for problem in problems):
        raise CheckpointError(
            f"none of the {len(problems)} checkpoints in {folder} can be used (the newest: {problems[0]}); "
            "move them away to begin at step 0"
        )
    return None


def _read_own(place: Storage, training_id: str | None, verify_state: bool) -> Checkpoint:
    try:
        saved = load(place, verify_state=verify_state)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as e:
        place.parent.names()  # raises where it is the whole storage that has gone
        raise CheckpointError(f"{place}: cannot be read ({e})") from e
    if name_of(saved.step) != place.name:
        raise CheckpointError(f"{place}: is of step {saved.step}")
    if training_id not in (None, saved.meta["training_id"]):
        raise CheckpointError(f"{place}: belongs to another training")
    return saved


def read_meta(place: Storage) -> dict[str, Any]:
    """A checkpoint's meta.json, of which is there and of its type what every checkpoint has.

    Raises:
        CheckpointError: it is damaged; IncompleteError: there is none.
        OSError: the storage does not answer.
    """
    try:
        meta = json.loads(place.read_bytes(META))
        _ = meta["format"], meta["files"], int(meta["step"]), meta["metrics"].get("top1")
        _ = meta["fingerprint"], meta["classes"], meta["training_id"]
        _ = [meta["files"][name]["size"] for name in (STATE, CONFIG) if meta["format"] == FORMAT]
    except (FileNotFoundError, NotADirectoryError):
        raise IncompleteError(f"{place}: {META} is missing, it was never complete") from None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{place}: no usable {META} ({type(e).__name__}: {e})") from None
    assert isinstance(meta, dict)
    return meta


def _is_sound(path: Path, wanted: dict[str, Any]) -> bool:
    return _digest(path).items() <= wanted.items()


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as f:
        return {"sha256": hashlib.file_digest(f, "sha256").hexdigest(), "size": path.stat().st_size}
