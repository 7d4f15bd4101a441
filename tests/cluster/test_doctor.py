"""What `pipeline doctor` makes of facts; and what it finds on real clusters, sound and broken ones."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import PIPELINE, ROOT, Start
from nodes import AUTHENTICATION, NO_DASHBOARD, Cluster, Node
from prometheus_client.parser import text_string_to_metric_families
from s3 import free_port
from test_prometheus import OF_GPUS, shown

from pipeline.cluster import ray_cluster
from pipeline.cluster.doctor import check_results
from pipeline.cluster.doctor import examine as doctors
from pipeline.cluster.doctor.node_checks import AllReduce
from pipeline.cluster.ray_cluster import Answer
from pipeline.cluster.ray_cluster import Node as Member
from pipeline.config.loading import load

pytestmark = pytest.mark.timeout(400)  # a busy machine starts clusters slowly
GIB = 2**30


def member(**resources: float) -> Member:
    return Member("id", "10.0.0.1", dict(resources))


def heard(value: object) -> Answer:
    return Answer(value, 0.0, 1.0)


def test_nodes_that_do_not_answer_are_named() -> None:
    nodes = {"a": member(CPU=4, GPU=1), "b": member(CPU=0)}
    good = check_results.check_nodes(nodes, {"a": heard({}), "b": heard({})}, 60)
    assert str(good) == "ok  nodes: 2: a (1 GPU, 4 CPU), b (0 CPU)"
    silent = check_results.check_nodes(nodes, {"a": heard({})}, 60)
    assert str(silent).startswith("bad nodes: no answer within 60 s from b; see the logs of these nodes")
    failed = check_results.check_nodes(
        nodes, {"a": heard({}), "b": heard(ImportError("No module named 'pipeline'"))}, 60
    )
    assert str(failed).startswith("bad nodes: No module named 'pipeline' on b; install this package there")


def test_versions_that_differ_are_named_with_their_node() -> None:
    here = {"torch": "2.14.1", "mlflow": "3.17.2"}
    facts = {"a": {"versions": here}, "b": {"versions": {"torch": "2.13.0"}}}
    check = check_results.check_versions(facts, here)
    assert check.text == "mlflow is 3.17.2 here and missing on b, torch is 2.14.1 here and 2.13.0 on b"
    assert check_results.check_versions({"a": facts["a"]}, here).ok


@pytest.mark.parametrize(("gpus", "shm_gib", "ok"), [(0, 0.2, True), (0, 0.06, False), (8, 0.9, False), (8, 1.2, True)])
def test_shared_memory_holds_the_object_store_and_nccl(gpus: int, shm_gib: float, ok: bool) -> None:
    nodes = {"a": member(GPU=gpus, object_store_memory=0.1 * GIB)}
    check = check_results.check_shm(nodes, {"a": {"shm": shm_gib * GIB}})
    assert check.ok == ok
    assert ok or f"{shm_gib:.2f} GiB where {0.1 + (gpus > 0):.2f} are needed on a" in check.text


@pytest.mark.parametrize(("free", "total", "ok"), [(10e9, 100e9, True), (1.9e9, 10e9, False), (10e9, 1000e9, False)])
def test_a_full_disk_is_bad_by_bytes_and_by_share(free: float, total: float, ok: bool) -> None:
    assert check_results.check_tmp({"a": {"tmp_free": free, "tmp_total": total}}).ok == ok


def test_clocks_are_off_only_where_the_round_trip_does_not_explain_it() -> None:
    check = check_results.check_clocks({"a": (0.0, 0.01), "b": (-3.0, 0.5), "c": (1.4, 0.5)})
    assert check.text == "b is 3.0 s behind"
    assert check_results.check_clocks({"a": (0.2, 0.01)}).text == "within 0.210 s of this one's"


def test_workers_on_gpus_talk_by_gloo_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As training does: gradients by NCCL, and each step's message to all ranks by gloo."""
    there = {name: member(GPU=1, CPU=8) for name in "ab"}
    cfg = load(None, ["data.train=x", "data.val=x"])

    def on_nodes(_: object, calls: list[tuple[str, tuple[str, ...]]], **__: object) -> list[Answer]:
        kind = calls[0][1][0]
        return [heard(AllReduce(0.01, "")) if kind == "nccl" else heard(OSError("no route to host")) for _ in calls]

    monkeypatch.setattr(ray_cluster, "on_nodes", on_nodes)
    monkeypatch.setattr(ray_cluster, "on_each_node", lambda there, *_, **__: dict.fromkeys(there, heard(1234)))
    by_nccl, by_gloo = doctors._try_network(there, cfg)
    assert by_nccl.ok
    assert "over gloo: no route to host on a (rank 0), b (rank 1)" in str(by_gloo)
    monkeypatch.setattr(ray_cluster, "on_each_node", lambda *_, **__: {})
    checks = doctors._try_network(there, cfg)
    assert ["no answer in time on a" in str(check) for check in checks] == [True, True]
    assert doctors._measure_clocks(there) == {}


def test_many_nodes_with_one_trouble_are_one_reason() -> None:
    answers = {f"n{i}": heard(OSError("away")) for i in range(7)} | {"good": heard(None)}
    check = check_results.check_each("data", "data.train=/x", [*answers, "silent"], answers, good="read", fix="fix it")
    assert str(check) == (
        "bad data: data.train=/x: no answer in time on silent, away on n0, n1, n2, n3, n4 and 2 more; fix it"
    )


@pytest.fixture(scope="module")
def metrics_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def cluster(metrics_port: int) -> Iterator[Cluster]:
    """A head without CPUs, and two nodes."""
    started = Cluster(free_port(), dashboard=(*NO_DASHBOARD, f"--metrics-export-port={metrics_port}"))
    try:
        started.add()
        started.add()
        yield started
    finally:
        started.stop()


def doctor(cluster: Cluster, tmp_path: Path, digits: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    data = [f"data.train={digits}/train", f"data.val={digits}/val"]
    place = [f"run.storage={tmp_path}/runs", f"cluster.address={cluster.address}"]
    command = [PIPELINE, "doctor", "--cluster", str(ROOT / "configs/digits.yaml"), *data, *place, *words]
    env = {**os.environ, **AUTHENTICATION}
    return subprocess.run(command, text=True, capture_output=True, check=False, timeout=150, env=env, cwd=tmp_path)


@pytest.mark.e2e
def test_a_sound_cluster_is_ok(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    done = doctor(cluster, tmp_path, digits, "mlflow.uri=sqlite:///mine.db")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    names = ["nodes", "workers", "versions", "/dev/shm", "temporary disk", "clocks", "storage", "data", "data"]
    assert [line.partition(":")[0] for line in lines] == [f"ok  {name}" for name in [*names, "MLflow", "all-reduce"]]
    assert re.search(r"^ok  nodes: 3: .*\(0 CPU\)", done.stdout, re.MULTILINE)
    assert re.search(r"^ok  all-reduce: 2 gloo workers, 64 MiB in 0\.\d+ s", done.stdout, re.MULTILINE)
    assert "experiment pipeline from" in done.stdout
    assert list((tmp_path / "runs").iterdir()) == []
    assert (tmp_path / "mine.db").exists(), "where the command was given, not where its workers are"


@pytest.mark.long
@pytest.mark.e2e
def test_a_broken_node_is_named_in_each_line(cluster: Cluster, tmp_path: Path, digits: Path) -> None:
    """A node with a storage and images of its own, little shared memory, another clock, version and network."""
    (tmp_path / "runs").mkdir()
    odd = tmp_path / "odd"
    (odd / "mlflow-9.9.dist-info").mkdir(parents=True)
    (odd / "mlflow-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: mlflow\nVersion: 9.9\n")
    (odd / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 30\n")
    mounts = 'mount -t tmpfs none "$1" && mount -t tmpfs none "$2" && mount -t tmpfs -o size=16m none /dev/shm'
    inside = ("unshare", "--mount", "sh", "-c")
    if subprocess.run([*inside, "mount -t tmpfs none /mnt"], capture_output=True, check=False).returncode:
        pytest.skip("this machine does not let its user mount anything")
    node = Node(
        f"--address={cluster.address}",
        "--node-ip-address=127.0.0.1",
        inside=(*inside, f'{mounts} && shift 2 && exec "$@"', "sh", str(tmp_path / "runs"), str(digits / "val")),
        env={"PYTHONPATH": str(odd), "GLOO_SOCKET_IFNAME": "nowhere0"},
    )
    try:
        node.wait_until_up()
        done = doctor(cluster, tmp_path, digits, "cluster.device=gpu", "mlflow.uri=http://127.0.0.1:9", "--json")
    finally:
        node.stop()
    assert done.returncode == 1, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "bad"
    bad = {check["name"]: check for check in result["checks"] if not check["ok"]}
    assert set(bad) == {"workers", "versions", "/dev/shm", "clocks", "storage", "data", "MLflow", "all-reduce"}
    (name,) = re.findall(r"mlflow is [\d.]+ here and 9.9 on (\S+)$", bad["versions"]["text"])
    assert bad["workers"]["text"] == "cluster.workers=2, each with 1 GPU, 1 CPU; the nodes have room for 0"
    assert bad["/dev/shm"]["text"] == f"0.02 GiB where 0.07 are needed on {name}"
    assert re.fullmatch(rf"{name} is (29\.\d|30\.\d) s ahead", bad["clocks"]["text"])
    assert name in bad["storage"]["text"]
    assert "wrote is not there" in bad["storage"]["text"]
    assert bad["data"]["text"] == (
        f"data.val={digits}/val: no images, tar shards or Parquet files in {digits}/val on {name}"
    )
    assert "http://127.0.0.1:9 fails: " in bad["MLflow"]["text"]
    assert re.search(rf"nowhere0.* on {name}", bad["all-reduce"]["text"])
    assert "GLOO_SOCKET_IFNAME" in bad["all-reduce"]["fix"]
    assert "Traceback" not in done.stdout + done.stderr


WORKER_WITHOUT_OTHER = """
import threading, time
from pipeline.cluster import connection, ray_cluster
from pipeline.cluster.doctor import node_checks
connection.join({address!r}, 0, threading.Event())
there = [n for n in ray_cluster.nodes().values() if n.resources.get("CPU")]  # perhaps with the last test's, just ended
answers = ray_cluster.on_nodes(node_checks.now, [(n.id, ()) for n in there], timeout_s=30)
node = next(n for n, answer in zip(there, answers) if answer and not isinstance(answer.value, Exception))
began = time.monotonic()
where = "tcp://127.0.0.1:" + str(node_checks.free_port())
print(ray_cluster.on_nodes(node_checks.all_reduce, [(node.id, ("gloo", where, 0, 2, 60.0))], timeout_s=2))
assert time.monotonic() - began < 5
"""


@pytest.mark.e2e
def test_a_check_that_hangs_is_given_up(cluster: Cluster) -> None:
    """A worker whose partner never comes, as behind a firewall."""
    program = WORKER_WITHOUT_OTHER.format(address=cluster.address)
    env = {**os.environ, **AUTHENTICATION}
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, timeout=60, env=env)
    assert done.stdout.splitlines()[-1] == "[None]", done.stderr  # Ray may have a word on the last test's node


def test_a_cluster_that_is_away_is_a_wrong_request(tmp_path: Path) -> None:
    command = [PIPELINE, "doctor", "--cluster", "cluster.address=127.0.0.1:9", f"run.storage={tmp_path}/runs"]
    done = subprocess.run(command, text=True, capture_output=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "cluster.address=127.0.0.1:9 cannot be reached" in done.stderr


@pytest.mark.e2e
@pytest.mark.long
def test_a_training_is_among_the_metrics_of_its_node(
    cluster: Cluster, metrics_port: int, start: Start, digits: Path, tmp_path: Path
) -> None:
    """And all that the dashboard shows is there, but for GPUs."""
    data = [f"data.train={digits}/train", f"data.val={digits}/val"]
    size = ["model.depth=18", "train.steps=3000", "train.log_every=1", "checkpoint.every=5", "train.eval_every=1"]
    place = [f"cluster.address={cluster.address}", f"run.storage={tmp_path}/runs", "run.name=seen"]
    config = str(ROOT / "configs/digits.yaml")
    training = start([PIPELINE, "train", config, *data, *size, *place, "mlflow.log_model=false"], AUTHENTICATION)
    training.wait_for("^step .*top-1")
    time.sleep(20)  # what is not set again is gone by now
    samples: dict[str, float] = {}
    deadline = time.monotonic() + 60  # Ray exports every ten seconds
    while not (samples.get("ray_pipeline_step", 0) > 30 and "ray_pipeline_top1_ratio" in samples):
        assert time.monotonic() < deadline, training.said
        time.sleep(0.5)
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=10) as answer:
            families = text_string_to_metric_families(answer.read().decode())
        there = [sample for family in families for sample in family.samples]
        samples = {one.name: one.value for one in there if one.labels.get("run", "seen") == "seen"}
    training.signal_group(signal.SIGINT)
    assert training.finish() == 130
    assert shown() - set(samples) == OF_GPUS
    assert samples["ray_pipeline_steps"] == 3000
    assert samples["ray_pipeline_workers"] == 2
    assert samples["ray_pipeline_failures"] == 0
    assert samples["ray_pipeline_images_per_second"] > 0
    assert 0 < samples["ray_pipeline_goodput_ratio"] < 1
    assert 0 <= samples["ray_pipeline_data_wait_ratio"] < 1
    assert 0 < samples["ray_pipeline_checkpoint_step"] <= samples["ray_pipeline_step"]
    assert 0 < samples["ray_pipeline_learning_rate"] <= 0.1
