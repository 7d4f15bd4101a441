"""Nodes come and go while a training runs: it shrinks and grows, and the data stream does not notice."""

import json
import re
import signal
from collections import defaultdict
from pathlib import Path

import mlflow
import pytest
from commands import PIPELINE, ROOT, Start, kill, loss_series
from nodes import AUTHENTICATION, cluster
from s3 import free_port

from pipeline.config.loading import load
from pipeline.data.batch_spec import make_sampler
from pipeline.training.schedule import Schedule, lr_at

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

NUM_STEPS = 5000  # it is stopped when all has happened
NUM_IMAGES = 1437
SETTINGS = [
    "model.depth=18",
    "data.image_size=32",
    "data.val_resize=32",
    "data.log_samples=true",
    f"train.steps={NUM_STEPS}",
    "train.log_every=1",
    "train.eval_every=1000",
    "checkpoint.every=25",
    "mlflow.log_model=false",
    "mlflow.checkpoints=none",
]


def lines(run: Path) -> list[dict[str, int]]:
    return [json.loads(line) for file in (run / "samples").iterdir() for line in file.read_text().splitlines()]


def surviving_rows(run: Path) -> dict[int, list[int]]:
    """step -> the rows it was trained on, by all ranks together, the last time."""
    parts: dict[int, dict[int, list[int]]] = defaultdict(dict)
    widths: dict[int, list[int]] = defaultdict(list)
    for line in lines(run):
        parts[line["step"]][line["rank"]] = line["rows"]  # type: ignore[assignment]
        if line["rank"] == 0:
            widths[line["step"]].append(line["world_size"])
    return {step: [row for rank in range(widths[step][-1]) for row in parts[step][rank]] for step in sorted(parts)}


def times_trained(run: Path) -> dict[int, int]:
    counts: dict[int, int] = defaultdict(int)
    for line in lines(run):
        counts[line["step"]] += line["rank"] == 0
    return counts


def test_shrinks_grows_and_makes_way_with_the_same_data(digits: Path, start: Start, tmp_path: Path) -> None:
    """Two workers; a node is killed: one; a node comes: two; a node is drained: one."""
    storage = tmp_path / "runs"
    data = [f"data.train={digits}/train", f"data.val={digits}/val"]
    config = str(ROOT / "configs/digits.yaml")
    with cluster(free_port()) as nodes:
        first, second = nodes.add(), nodes.add()
        place = [f"cluster.address={nodes.address}", f"run.storage={storage}", "run.name=elastic"]
        size = ["cluster.workers=[1,3]", "cluster.grow_after_s=3", "cluster.timeout_s=60"]
        training = start([PIPELINE, "train", config, *data, *SETTINGS, *place, *size], AUTHENTICATION)
        training.wait_for(r"attempt 1: .*; 2 workers")
        training.wait_for_step(35)
        kill(second.raylet())
        killed = training.wait_for(r"attempt 2: step (\d+) of .*; 1 workers .* (\d+) s after the failure")
        training.wait_for_step(int(killed.group(1)) + 20)
        third = nodes.add()
        grown = training.wait_for(r"attempt 3: step (\d+) of .*; 2 workers")
        training.wait_for_step(int(grown.group(1)) + 20)
        third.terminate()
        drained = training.wait_for(r"attempt 4: step (\d+) of .*; 1 workers")
        training.wait_for_step(int(drained.group(1)) + 5)
        training.signal_group(signal.SIGINT)
        assert training.finish() == 130, training.said
        first.terminate()
    for line in re.findall(r"^(?:failure|attempt|there is|a node).*", training.said, re.MULTILINE):
        print(line[:200])

    cfg = load(ROOT / "configs/digits.yaml", [*data, *SETTINGS])
    sampler = make_sampler(cfg.data, NUM_IMAGES, cfg.train.global_batch, cfg.run.seed)
    num_steps = int(training.wait_for(r"interrupted at step (\d+) of").group(1))
    expected = {step + 1: sampler.rows(*sampler.positions(step, 0, 1)).tolist() for step in range(num_steps)}
    assert surviving_rows(storage / "elastic") == expected

    again = {step for step, times in times_trained(storage / "elastic").items() if times > 1}
    assert len(again) <= 25  # a checkpoint's interval, for the kill
    assert all(step <= int(grown.group(1)) for step in again)  # growing and draining cost no step
    assert int(drained.group(1)) > int(grown.group(1))

    uri = f"sqlite:///{storage}/mlflow.db"
    assert [step for step, _ in loss_series(uri, "elastic")] == list(range(1, num_steps + 1))
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(["1"])
    workers = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "attempt/workers")]
    assert workers == [(1, 2), (2, 1), (3, 2), (4, 1)]
    assert run.data.tags["pipeline.failures"] == "1"
    assert "worker" in run.data.tags["pipeline.failure_1"]
    schedule = Schedule.create(cfg, NUM_IMAGES)
    rates = {m.step: m.value for m in client.get_metric_history(run.info.run_id, "train/lr")}
    assert rates == {step: lr_at(step - 1, cfg.optim, schedule) for step in range(1, num_steps + 1)}
