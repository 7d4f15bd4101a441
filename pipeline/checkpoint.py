"""Checkpoints: a training state as a directory that is either whole or not there.

    step_00000120/
        state.pt      model, EMA, optimizer, scaler, step; loaded with weights_only, never unpickled
        config.yaml   the resolved configuration
        meta.json     format, SHA-256 and size of each file, versions, index fingerprint, metrics, ids

It is written under a temporary name, fsynced, and renamed: a crash leaves a temporary behind, never
half a checkpoint. Which one to resume from is found by reading the storage, not by anyone's records.
"""

import hashlib
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import pipeline
from pipeline.config import Config, ConfigError
from pipeline.model import ResNet
from pipeline.settings import dump, flatten, load
from pipeline.state import TrainState, load_weights

FORMAT = 1
STREAM_KEYS = ("run.seed", "train.global_batch")  # with the step they say which images come next
STATE, CONFIG, META = "state.pt", "config.yaml", "meta.json"


class CheckpointError(RuntimeError):
    """A checkpoint that must not be loaded; the text says which and why."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what its meta.json says."""

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

    def state(self) -> dict[str, Any]:
        """The saved `TrainState.state_dict()`, on the CPU. Executes no code of the file."""
        loaded: dict[str, Any] = torch.load(self.path / STATE, map_location="cpu", weights_only=True, mmap=True)
        return loaded


def save(folder: Path, state: TrainState, cfg: Config, meta: dict[str, Any]) -> Checkpoint:
    """Write `state` to `folder/step_NNNNNNNN`, replacing what has that name.

    Args:
        meta: what else to remember: "fingerprint" of the training index, "classes", "metrics" of an evaluation
            at this step, "training_id" and "mlflow_run_id".

    Raises:
        OSError: the disk is full or gone; nothing of that name has changed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"step_{state.step:08d}"
    temporary = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        torch.save(state.state_dict(), temporary / STATE)
        (temporary / CONFIG).write_text(dump(cfg))
        files = {name: _digest(temporary / name) for name in (STATE, CONFIG)}
        full_meta = {"format": FORMAT, "step": state.step, "files": files, **_provenance(), **meta}
        (temporary / META).write_text(json.dumps(full_meta, indent=2))
        for name in (STATE, CONFIG, META):
            _fsync(temporary / name)
        _fsync(temporary)
        shutil.rmtree(target, ignore_errors=True)  # a damaged one, or we would have resumed from it
        temporary.rename(target)
        _fsync(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return Checkpoint(target, full_meta)


def read(path: Path) -> Checkpoint:
    """Open a checkpoint after checking every byte of it.

    Raises:
        CheckpointError: it is not what its meta.json says, or has none that this version reads.
    """
    try:
        meta = json.loads((path / META).read_text())
        version, files = meta["format"], meta["files"]
        _ = meta["step"], meta["metrics"], meta["fingerprint"], meta["classes"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise CheckpointError(f"{path}: no usable {META} ({type(e).__name__}: {e})") from None
    if version != FORMAT:
        raise CheckpointError(f"{path}: has format {version}, this version reads {FORMAT}")
    for name in (STATE, CONFIG):
        try:
            found = _digest(path / name)
        except OSError as e:
            raise CheckpointError(f"{path}: {name} cannot be read ({e.strerror})") from None
        if found != files.get(name):
            raise CheckpointError(f"{path}: {name} is damaged (size or SHA-256 differs from {META})")
    return Checkpoint(path, meta)


def newest_valid(folder: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint in `folder`; damaged newer ones are reported and skipped."""
    for path in sorted(folder.glob("step_*"), reverse=True):
        try:
            return read(path)
        except CheckpointError as e:
            report(f"skipped a damaged checkpoint: {e}")
    return None


def load_model(path: Path) -> tuple[ResNet, Config, tuple[str, ...]]:
    """The network of a checkpoint (averaged weights where it has them), in eval mode on the CPU.

    Returns:
        The model, the configuration it was trained with, and its classes in the order of the logits.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    found = read(path)
    cfg, classes = load(path / CONFIG), tuple(found.meta["classes"])
    model = ResNet(cfg.model, len(classes)).to(memory_format=torch.channels_last)
    saved = found.state()
    load_weights(model, saved["ema"] or saved["model"])
    return model.eval(), cfg, classes


def best(folder: Path) -> Checkpoint | None:
    """The checkpoint with the highest top-1; of equals the newest. Reads no state."""
    scored = [(c.top1, c.step, c) for c in _listed(folder) if c.top1 is not None]
    return max(scored)[2] if scored else None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` and the best."""
    listed = sorted(_listed(folder), key=lambda c: c.step)
    spared = {c.path for c in listed[-keep:]}
    if top := best(folder):
        spared.add(top.path)
    for checkpoint in listed:
        if checkpoint.path not in spared:
            shutil.rmtree(checkpoint.path)
    for leftover in folder.glob(".step_*"):  # of a killed process: only one process writes here at a time
        shutil.rmtree(leftover, ignore_errors=True)


def restore(state: TrainState, checkpoint: Checkpoint, cfg: Config, fingerprint: str) -> None:
    """Load a checkpoint into `state`.

    Raises:
        ConfigError: the images, what orders them, or the network is another than the checkpoint's.
    """
    saved, now = flatten(load(checkpoint.path / CONFIG)), flatten(cfg)
    for key in STREAM_KEYS:
        if saved[key] != now[key]:
            raise ConfigError(
                f"{key}={now[key]}: {checkpoint.path} was trained with {saved[key]}, and its step would mean other "
                "images; keep it, or use another run.name"
            )
    if checkpoint.meta["fingerprint"] != fingerprint and not cfg.data.allow_changed:
        raise ConfigError(
            f"{checkpoint.path} was trained on other images than data.train={cfg.data.train} holds now "
            f"(fingerprint {checkpoint.meta['fingerprint'][:12]}, now {fingerprint[:12]}); "
            "bring them back, use another run.name, or set data.allow_changed=true"
        )
    try:
        state.load_state_dict(checkpoint.state())
    except ValueError as e:
        raise ConfigError(f"{checkpoint.path} does not fit this configuration: {e}; use another run.name") from None


def _listed(folder: Path) -> list[Checkpoint]:
    """Checkpoints by their meta.json alone; those without a readable one are left to `newest_valid` to report."""
    listed = []
    for path in folder.glob("step_*"):
        try:
            listed.append(Checkpoint(path, json.loads((path / META).read_text())))
        except (OSError, ValueError):
            continue
    return listed


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as f:
        return {"sha256": hashlib.file_digest(f, "sha256").hexdigest(), "size": path.stat().st_size}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _provenance() -> dict[str, Any]:
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "versions": {"pipeline": pipeline.__version__, "torch": torch.__version__},
        "git_commit": commit or None,
        "saved_at": time.time(),
    }
