"""An object store's checkpoints on the machines of a training: fetched once for each, and not kept."""

import shutil
import tempfile
from pathlib import Path

import pytest
import torch.distributed as dist
from ranks import context, run_ranks
from s3 import s3_storage

from pipeline.config.loading import load
from pipeline.runs import checkpoint
from pipeline.runs.spec import RunSpec
from pipeline.storage import Storage
from pipeline.training.setup import choose_checkpoint

META = {"training_id": "t", "fingerprint": "f", "classes": ["a"], "metrics": {}}


def restart(rank: int, world_size: int, spec: RunSpec, folder: Path, num_machines: int) -> list[tuple[list[str], int]]:
    """The copies on this rank's machine after each of three restarts, and how many states it has fetched for each."""
    tempfile.tempdir = str(folder / f"machine{rank % num_machines}")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    fetched, download, seen = [0], Storage.download, list[tuple[list[str], int]]()

    def counted(self: Storage, name: str, to: Path) -> None:
        fetched[0] += name.startswith("state")
        download(self, name, to)

    Storage.download = counted  # type: ignore[method-assign]
    for step in (1, 2, 3):
        if rank == 0:
            checkpoint.save(spec.checkpoints, {"step": step}, spec.cfg, META)
            shutil.rmtree(spec.checkpoints.local_dir / checkpoint.name_of(step))  # rank 0 was elsewhere before
        dist.barrier()
        fetched[0] = 0
        _, _, saved, _ = choose_checkpoint(spec, context(rank, world_size))
        assert saved is not None
        assert saved.state()["step"] == step
        dist.barrier()
        seen.append((sorted(path.name for path in spec.checkpoints.local_dir.glob("step_*")), fetched[0]))
        dist.barrier()
    return seen


@pytest.mark.parametrize("num_machines", [1, 2])
def test_each_machine_fetches_once_and_keeps_none_before(tmp_path: Path, num_machines: int) -> None:
    """ResNet-152's takes 724 MB: 40 restarts would fill a pod's 30 GiB, and eight ranks fetch 5.8 GB at once."""
    with s3_storage() as bucket:
        cfg = load(None, ["data.train=x", "data.val=x", "train.precision=fp32", f"run.storage={bucket}"])
        spec = RunSpec(cfg, bucket / "run", "", "")
        of_ranks = run_ranks(restart, 2, spec, tmp_path, num_machines)
    for restart_of_ranks, step in zip(zip(*of_ranks, strict=True), (1, 2, 3), strict=True):
        assert [copies for copies, _ in restart_of_ranks] == [[checkpoint.name_of(step)]] * 2
        assert sum(fetched for _, fetched in restart_of_ranks) == num_machines
