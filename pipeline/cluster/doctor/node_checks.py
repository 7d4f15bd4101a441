"""What `pipeline doctor` has each node try; what goes wrong is raised. Heavy imports are late: nodes wait for them."""

import os
import re
import shutil
import socket
import statistics
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.storage import Storage
from pipeline.versions import versions

ALL_REDUCE_BYTES = 64 * 2**20
NUM_ALL_REDUCES = 5


def facts() -> dict[str, Any]:
    """Versions, bytes of /dev/shm, and bytes of the disk of the temporary directory: free, total."""
    disk = shutil.disk_usage(tempfile.gettempdir())
    shm = shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0
    return {"versions": versions(), "shm": shm, "tmp_free": disk.free, "tmp_total": disk.total}


def begin(folder: Storage) -> None:
    """Make the folder and write to it, as the first of all nodes."""
    if folder.local:
        folder.local.mkdir(parents=True)
    folder.write_bytes("first", b"first")


def write(folder: Storage, first_node: str) -> str:
    """See what the first node wrote, and write beside it; the file's name."""
    name = uuid.uuid4().hex
    _expect(folder, "first", first_node)
    folder.write_bytes(name, name.encode())
    return name


def read_back(folder: Storage, files: Mapping[str, str]) -> None:
    """See what the nodes wrote: node -> file."""
    for node, name in files.items():
        _expect(folder, name, node)


def _expect(folder: Storage, name: str, writer: str) -> None:
    try:
        content = folder.read_bytes(name)
    except FileNotFoundError:
        raise OSError(f"what {writer} wrote is not there") from None
    if content != name.encode():
        raise OSError(f"what {writer} wrote has come out different")


def now() -> float:
    return time.time()


def read(source: str, cfg: Config) -> None:
    """Read some of the images: the first and the last of an index, else of what is found first."""
    from pipeline.data.indexing.build import fetch_index
    from pipeline.data.indexing.find import find_source, is_index, kind_of
    from pipeline.data.loading.read import Reader

    folder = Storage(source).local
    if is_index(source):
        index = fetch_index(source)
        with closing(Reader(index, cfg.data, retry_timeout_s=10.0)) as reader:
            for row in (0, len(index) - 1):
                reader.read(row)
    elif folder and folder.is_dir():  # a million files are not listed here
        files = (Path(parent, name) for parent, _, names in os.walk(folder) for name in names if kind_of(name))
        first = next(files, None)
        if first is None:
            raise UserError(f"no images, tar shards or Parquet files in {source}")
        with first.open("rb") as f:
            f.read(1)
    else:
        images = find_source(source)
        with images.root.open(images.units[0].files[0]) as f:
            f.read(1)


def log(cfg: Config, storage: Storage) -> str:
    """Write to MLflow as a training's first worker would; the address of the store."""
    from pipeline.tracking import mlflow_run, mlflow_store

    uri = mlflow_store.tracking_uri(cfg.mlflow.uri, storage)
    try:
        mlflow_run.try_out(uri, cfg.mlflow.experiment)
    except Exception as e:  # MLflow raises whatever its transport raises
        raise OSError(f"{uri} fails: {mlflow_store.reason(e)}") from None
    return uri


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("", 0))
        return int(s.getsockname()[1])


def all_reduce(backend: str, address: str, rank: int, num_workers: int, timeout_s: float) -> float:
    """Seconds that summing ALL_REDUCE_BYTES over all workers takes, as the gradients of a step are.

    Args:
        address: tcp://HOST:PORT, for the workers to find each other.
    """
    import torch
    import torch.distributed as dist

    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=num_workers, timeout=timeout)
    try:
        device = "cuda" if backend == "nccl" else "cpu"
        values, seconds = torch.zeros(ALL_REDUCE_BYTES // 4, device=device), []
        for _ in range(1 + NUM_ALL_REDUCES):
            began = time.perf_counter()
            dist.all_reduce(values)
            values[0].item()  # waits for the device
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[1:])  # the first one connects
    finally:
        dist.destroy_process_group()


class AllReduce(NamedTuple):
    """How long it took; network: what NCCL says it uses, such as IB or Socket, empty where it says nothing."""

    seconds: float
    network: str


def measure_all_reduce(backend: str, address: str, rank: int, num_workers: int, timeout_s: float) -> AllReduce:
    """`all_reduce`, and by which network. NCCL leaves RDMA for TCP without an error, and only its log says so."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "nccl.log")
        os.environ.update(NCCL_DEBUG="INFO", NCCL_DEBUG_SUBSYS="INIT", NCCL_DEBUG_FILE=str(log))
        seconds = all_reduce(backend, address, rank, num_workers, timeout_s)
        return AllReduce(seconds, network_of(log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""))


def network_of(log: str) -> str:
    """What a log of NCCL's says it took for one communicator; the last one's, if there are several."""
    found = re.findall(r"NCCL INFO Using network (.+)$", log, re.MULTILINE)
    return found[-1].strip() if found else ""
