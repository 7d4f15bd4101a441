"""Which checkpoint a run goes on from, and what of its configuration and its images must then be as it was.

The driver refuses what does not fit before it starts anything. The workers choose and check once more: between these
two a checkpoint may be damaged, and later attempts go on from later ones.
"""

import time
from collections.abc import Callable
from typing import Any

from pipeline.config.fields import show
from pipeline.config.loading import flatten
from pipeline.config.schema import Config
from pipeline.data.index import Index
from pipeline.errors import UserError
from pipeline.failures import CheckpointError
from pipeline.runs import checkpoint
from pipeline.runs.checkpoint import Checkpoint
from pipeline.runs.claim import Claim
from pipeline.runs.manifest import FILE, RunManifest
from pipeline.runs.spec import CHECKPOINTS
from pipeline.storage import Storage

# With the step they say which images come next.
STREAM_KEYS = ("run.seed", "train.global_batch", "data.shuffle_block", "data.shuffle_window", "data.repeated_aug")
NETWORK_KEYS = ("model.depth", "model.variant", "model.stride_on")  # what the weights mean
OPTIMIZER_KEYS = ("model.freeze", "optim.name", "optim.layer_decay")  # what its state is, and of which parameters


def find_checkpoint(
    run: Storage,
    resume_from: str | None,
    warn: Callable[[str], None],
    *,
    began: float | None = None,
    verify_state: bool = True,
    claim: Claim | None = None,
    saved_step: int = 0,
) -> tuple[RunManifest, Checkpoint | None]:
    """What the storage says: whose run this is, and from which checkpoint it goes on.

    Args:
        run: its folder.
        resume_from: path or URI of a checkpoint to begin with, where the run has none.
        warn: told of what is damaged.
        began: of a training that is new, Unix time; None: now.
        verify_state: see `checkpoint.load`.
        claim: of the driver, which has written run.json. saved_step: of a checkpoint that the run is known to have.

    Raises:
        UserError: there are checkpoints, and none can be used.
        SupersededError: another driver has the run.
        OSError: the storage does not answer, or this machine does not see what others have written.
    """
    if claim is not None:
        claim.check()
    manifest = RunManifest.read(run, warn)
    if claim is not None and manifest is None:
        raise OSError(f"{run / FILE} is not visible here; mount the same run.storage on all nodes")
    try:
        # One that has trained nothing has no checkpoints: an earlier driver wrote it late, in the place of theirs.
        own = manifest.training_id if manifest and manifest.attempts else None
        saved = checkpoint.newest_valid(run / CHECKPOINTS, warn, own, verify_state=verify_state)
        if manifest is None or (saved is not None and own is None):  # a new run, or one whose run.json is lost
            known = ("training_id", "attempts", "failures")
            kept: dict[str, Any] = {key: saved.meta[key] for key in known if key in saved.meta} if saved else {}
            manifest = RunManifest(**kept, began=began or time.time())
        seen = saved.step if saved is not None else 0
        if seen < saved_step and not checkpoint.is_seen(run / CHECKPOINTS, saved_step):
            # To begin anew would write over it. One that is damaged is seen, and told of.
            raise OSError(
                f"the checkpoint of step {saved_step} is missing in {run}; mount the same run.storage on all nodes"
            )
        if saved is None and resume_from is not None:
            saved = checkpoint.load(Storage(resume_from), verify_state=verify_state)
    except CheckpointError as e:
        raise UserError(str(e)) from None
    return manifest, saved


def check_config_compatible(saved: Checkpoint, cfg: Config) -> None:
    """Raise UserError where what orders the images, or the network, is another than the checkpoint's."""
    before, now = flatten(saved.cfg), flatten(cfg)
    meaning = dict.fromkeys(STREAM_KEYS, "another value changes which images come next")
    meaning |= dict.fromkeys(NETWORK_KEYS, "its weights are of another network")
    meaning |= dict.fromkeys(OPTIMIZER_KEYS, "its optimizer's state is of another kind or of other parameters")
    for key, why in meaning.items():
        if before[key] != now[key]:
            raise UserError(
                f"{key}={show(now[key])}: {saved.place} was trained with {show(before[key])}, and {why}; "
                f"set {key}={show(before[key])}, or use another run.name"
            )


def check_data_compatible(saved: Checkpoint, cfg: Config, index: Index, num_steps: int) -> None:
    """Raise UserError where the images are others than the checkpoint's, or `num_steps` are less than its step."""
    if saved.meta["fingerprint"] != index.fingerprint and not cfg.data.allow_changed:
        raise UserError(
            f"{saved.place} was trained on other images than data.train={cfg.data.train} holds now "
            f"(fingerprint {saved.meta['fingerprint'][:12]}, now {index.fingerprint[:12]}); "
            "bring them back, use another run.name, or set data.allow_changed=true"
        )
    if len(saved.meta["classes"]) != len(index.classes):
        raise UserError(
            f"data.train={cfg.data.train}: holds {len(index.classes)} classes, and {saved.place} was trained with "
            f"{len(saved.meta['classes'])}; bring them back, or give a new run.name the weights: "
            f"model.weights={saved.place}"
        )
    if saved.step > num_steps:
        raise UserError(
            f"{saved.place} is at step {saved.step}, and this configuration ends at step {num_steps}; "
            "raise train.epochs or train.steps, or use another run.name"
        )
