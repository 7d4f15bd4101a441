"""Which checkpoints of a run stay: the newest, the best, and what an attempt has written or goes on from.

What is damaged, of another training or of a later version is nobody's to delete here, and takes no other's place.
"""

import shutil
from collections.abc import Callable, Collection

from pipeline.failures import CheckpointError
from pipeline.local_files import alone, remove_leftovers
from pipeline.runs.checkpoint import CONFIG, FORMAT, META, STATE, Checkpoint, is_whole, name_of, names_in, read_meta
from pipeline.storage import Storage


def own(
    folder: Storage, training_id: str | None, is_damaged: Callable[[int], bool] = lambda _: False
) -> list[Checkpoint]:
    """A training's checkpoints (None: anyone's), oldest first, which are sound as far as meta.json and sizes tell.

    Args:
        is_damaged: whether that of a step is known to be, though its sizes do not tell.
    """
    checkpoints = []
    for name in names_in(folder):
        try:
            meta, sizes = read_meta(folder / name), (folder / name).sizes()
        except CheckpointError:  # left to `newest_valid` to report
            continue
        if meta["format"] == FORMAT and is_whole(meta, sizes) and training_id in (None, meta["training_id"]):
            checkpoints.append(Checkpoint(folder / name, folder.local_dir / name, meta))
    sound = [checkpoint for checkpoint in checkpoints if not is_damaged(checkpoint.step)]
    return sorted(sound, key=lambda checkpoint: checkpoint.step)


def best_of(checkpoints: Collection[Checkpoint]) -> Checkpoint | None:
    """The checkpoint with the highest top-1; of equals the newest."""
    scored = [(c.top1, c.step, c) for c in checkpoints if c.top1 is not None]
    return max(scored, key=lambda item: item[:2])[2] if scored else None


def prune(
    folder: Storage, keep: int, training_id: str | None, valid: int, is_damaged: Callable[[int], bool] = lambda _: False
) -> None:
    """Delete all of a training's but the newest `keep` and the best, and what is left of deletions that broke off.

    Args:
        valid: step of one that is known to be valid, and stays. is_damaged: see `own`.
    """
    checkpoints = own(folder, training_id, is_damaged)
    kinds = {_kind(file) for file in (META, STATE, CONFIG)}
    for name in folder.names() if checkpoints else []:
        if "step_" <= name < checkpoints[-1].place.name and not kinds <= set(map(_kind, (folder / name).sizes())):
            (folder / name).remove()
    for checkpoint in _old(checkpoints, keep, (valid,)):
        checkpoint.place.remove()
    for leftover in folder.local_dir.glob(".step_*"):  # of a killed process: only one process writes here at a time
        shutil.rmtree(leftover, ignore_errors=True)
    _forget(folder, lambda name: name != name_of(valid))  # that may be uploaded to MLflow, or be resumed from


def make_room(
    folder: Storage,
    training_id: str | None,
    in_use: Collection[int],
    is_damaged: Callable[[int], bool] = lambda _: False,
) -> Checkpoint | None:
    """Delete the oldest checkpoint of a training, on a disk that is full; never the newest, the best or one in use.

    One that waits for MLflow has a second link, so that to delete it would free nothing.

    Args:
        is_damaged: see `own`.

    Returns:
        What was deleted, if anything.
    """
    for oldest in _old(own(folder, training_id, is_damaged), 1, in_use) if folder.local else []:
        if oldest.file(STATE).stat().st_nlink == 1:
            oldest.place.remove()
            return None if oldest.place.names() else oldest  # it may be another user's
    return None


def forget_copies(folder: Storage, oldest_kept: str | None = None) -> None:
    """Delete this machine's copies of an object store's checkpoints: each restart and each run would leave one.

    Args:
        oldest_kept: name of one that stays, as do newer ones.
    """
    _forget(folder, lambda name: oldest_kept is None or name < oldest_kept)


def _forget(folder: Storage, is_old: Callable[[str], bool]) -> None:
    """Delete copies, but for now not where another process just fetches one, such as `pipeline evaluate`."""
    if folder.local or not folder.local_dir.is_dir():
        return
    with alone(folder.local_dir, wait=False) as is_alone:
        for copy in folder.local_dir.glob("step_*") if is_alone else ():
            if is_old(copy.name):
                shutil.rmtree(copy, ignore_errors=True)
        if is_alone:  # of a rank 0 that was killed here, where the next one is on another machine
            remove_leftovers(folder.local_dir, "step_*")


def _kind(file: str) -> str:
    """Its name, without what `checkpoint` adds in an object store."""
    return file.partition(".")[0].partition("-")[0]


def _old(checkpoints: list[Checkpoint], keep: int, in_use: Collection[int]) -> list[Checkpoint]:
    top = best_of(checkpoints)
    return [c for c in checkpoints[:-keep] if c is not top and c.step not in in_use]
