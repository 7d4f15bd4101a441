"""Ranks whose weights drift apart are found, named, and nothing of it is saved."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import differences
from ranks import FAST, context, final_state, run_ranks

from pipeline.config.loading import load
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training import loop
from pipeline.training.loop import fit
from pipeline.training.replicas import ReplicasDifferError, compare_replicas
from pipeline.training.state import TrainState

SETTINGS = [
    *("train.steps=9", "train.global_batch=8", "data.image_size=16", "data.val_resize=16"),
    "checkpoint.every=3",
    "train.log_every=100",
    "train.eval_every=100",
    "train.precision=fp32",
]


HOSTS = ["a", "b", "c"]


def make_spec(index: Path, folder: Path, *settings: str) -> RunSpec:
    cfg = load(None, [f"data.train={index}", f"data.val={index}", *FAST, *SETTINGS, f"run.storage={folder}", *settings])
    folder.mkdir()
    return RunSpec(cfg, Storage(folder), str(index), str(index))


def flip_bit(tensor: torch.Tensor) -> None:
    """The lowest one of an element."""
    tensor.detach().view(torch.int32).flatten()[-1:] ^= 1


def compared(rank: int, world_size: int, spec: RunSpec, faults: dict[str, list[int]]) -> dict[str, str]:
    """What is said of each fault: a bit of a part of the state that is flipped on some ranks."""
    state = TrainState.create(spec.cfg, 10, torch.device("cpu"))
    for p in state.model.parameters():
        p.grad = torch.ones_like(p)
    state.optimizer.step()
    assert state.ema is not None
    momentum = state.optimizer.state[state.model.fc.weight]["momentum_buffer"]
    parts = {"weights": state.model.fc.weight, "optimizer state": momentum, "averaged weights": state.ema.fc.weight}
    state.model.get_buffer("bn1.running_mean").add_(rank)  # each rank's own
    compare_replicas(state, context(rank, world_size), HOSTS)
    said = {}
    for part, ranks in faults.items():
        if rank in ranks:
            flip_bit(parts[part])
        with pytest.raises(ReplicasDifferError) as e:
            compare_replicas(state, context(rank, world_size), HOSTS)
        said[part] = str(e.value)
        if rank in ranks:
            flip_bit(parts[part])
        compare_replicas(state, context(rank, world_size), HOSTS)
    return said


def test_who_differs_in_what_is_named_on_all_ranks(digits_index: Callable[[str], Path], tmp_path: Path) -> None:
    spec = make_spec(digits_index("few"), tmp_path / "run")
    said = run_ranks(compared, 3, spec, {"weights": [1], "optimizer state": [0, 1], "averaged weights": [2]})
    assert said[0] == said[1] == said[2]
    one, two, averaged = said[0].values()
    assert one.startswith("after step 0 worker 1 (on ")
    assert "): other weights than the other 2 have; nothing of it is saved" in one
    assert two.startswith("after step 0 worker 2 (on "), "most have the flipped bit"
    assert "worker 2 (on " in averaged
    assert "other averaged weights than" in averaged


def test_two_are_named_both(digits_index: Callable[[str], Path], tmp_path: Path) -> None:
    (said, _) = run_ranks(compared, 2, make_spec(digits_index("few"), tmp_path / "run"), {"weights": [0]})
    assert said["weights"].startswith("after step 0 workers 0 (on ")
    assert ") differ in their weights; nothing" in said["weights"]


# Every how many steps ranks compare, the step in which a bit flips on rank 1, and the one after which that is seen.
FLIPS = [(1000, 4, 6), (2, 7, 8)]


def train(rank: int, world_size: int, whole: RunSpec, *disturbed: RunSpec) -> list[tuple[str, list[str]]]:
    """A sound training, and others in which a bit flips and which then go on: what is said of it, and is saved then."""
    fit(whole, context(rank, world_size))
    own_step, found = vars(loop)["train_step"], []
    for spec, (every, step, _) in zip(disturbed, FLIPS, strict=True):

        def flips(state: TrainState, *args: Any, step: int = step, **kwargs: Any) -> Any:
            loss = own_step(state, *args, **kwargs)
            if rank == 1 and state.step == step:
                flip_bit(state.model.fc.weight)
            return loss

        cfg = dataclasses.replace(spec.cfg, train=dataclasses.replace(spec.cfg.train, check_replicas=every))
        vars(loop)["train_step"] = flips
        with pytest.raises(ReplicasDifferError) as e:
            fit(dataclasses.replace(spec, cfg=cfg), context(rank, world_size))
        vars(loop)["train_step"] = own_step
        dist.barrier()  # rank 0 has written what was under way
        found.append((str(e.value), sorted(spec.checkpoints.names())))
        dist.barrier()
        fit(spec, context(rank, world_size))
    return found


def test_a_training_goes_on_from_where_all_agreed(digits_index: Callable[[str], Path], tmp_path: Path) -> None:
    """Found before the next checkpoint at the latest, which is not written; the end is that of a sound training."""
    whole, *disturbed = (make_spec(digits_index("few"), tmp_path / name) for name in ("whole", "first", "second"))
    for of_rank in run_ranks(train, 2, whole, *disturbed):
        for (said, names), (_, _, seen_after) in zip(of_rank, FLIPS, strict=True):
            assert said.startswith(f"after step {seen_after} workers 0 (on ")
            # One that comes while another is written is postponed.
            assert "step_00000003" in names
            assert set(names) <= {f"step_{n:08d}" for n in range(1, seen_after)}
    for spec in disturbed:
        assert differences(final_state(whole), final_state(spec)) == []


def test_nothing_is_compared_where_that_is_not_wanted(
    digits_index: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = list[int]()
    monkeypatch.setattr(loop, "compare_replicas", lambda state, ctx, hosts: calls.append(state.step))
    for name, every in (("never", 0), ("some", 2)):
        short = ["train.steps=4", f"train.check_replicas={every}"]
        fit(make_spec(digits_index("few"), tmp_path / name, *short), context())
    assert calls == [2, 3, 4], "also before the checkpoint after step 3"
