"""Two hosts, each a network namespace with an address of its own; one is cut off while they train together."""

import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import PIPELINE, ROOT, Start, loss_series
from hosts import Host, bridge
from nodes import AUTHENTICATION, Node

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

TIMEOUT_S = 30  # cluster.timeout_s


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    with bridge(2) as made:
        yield made


@pytest.fixture
def nodes(hosts: list[Host], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Node]]:
    """A Ray node on each host, with room for one worker."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # this machine's name stands for neither host
    head, other = hosts
    started: list[Node] = []
    options = ["--include-dashboard=false", "--head", f"--node-ip-address={head.address}", "--port=6379"]
    try:
        for host, extra in ((head, options), (other, [f"--address={head.address}:6379"])):
            address = [] if host is head else [f"--node-ip-address={host.address}"]
            folder = f"--temp-dir=/tmp/{host.name}" if host is head else ""
            started.append(Node(*extra, *address, *([folder] if folder else []), inside=host.inside))
            started[-1].wait_until_up()
        yield started
    finally:
        for node in started:
            node.stop()


def test_a_host_that_is_cut_off_is_noticed_and_done_without(
    hosts: list[Host], nodes: list[Node], digits: Path, start: Start, tmp_path: Path
) -> None:
    head, other = hosts
    data = [f"data.train={digits}/train", f"data.val={digits}/val"]
    model = ["model.depth=18", "train.steps=5000", "train.log_every=1", "train.eval_every=1000", "checkpoint.every=10"]
    place = [f"run.storage={tmp_path}/runs", "run.name=hosts", f"cluster.address={head.address}:6379"]
    size = ["cluster.workers=[1,2]", f"cluster.timeout_s={TIMEOUT_S}", "mlflow.log_model=false"]
    command = [PIPELINE, "train", str(ROOT / "configs/digits.yaml"), *data, *model, *place, *size]
    training = start([*head.inside, *command], AUTHENTICATION)
    training.wait_for(r"attempt 1: .*; 2 workers")
    training.wait_for_step(30)
    began = time.monotonic()
    other.cut_off()
    training.wait_for(r"^failure: ")
    noticed_s = time.monotonic() - began
    recovered = training.wait_for(r"attempt 2: step (\d+) of .*; 1 workers")
    recovered_s = time.monotonic() - began
    training.wait_for(rf"^step {int(recovered.group(1)) + 5}/")
    training.signal_group(signal.SIGINT)
    assert training.finish() == 130, training.said
    again = re.search(r"(\d+) steps to do again", training.said)
    assert again
    print(f"noticed after {noticed_s:.1f} s, training again after {recovered_s:.1f} s, {again.group(1)} steps again")
    assert noticed_s < TIMEOUT_S + 15
    assert int(again.group(1)) <= 10
    series = loss_series(f"sqlite:///{tmp_path}/runs/mlflow.db", "hosts")
    assert [step for step, _ in series] == list(
        range(1, int(training.wait_for(r"interrupted at step (\d+) of").group(1)) + 1)
    )
