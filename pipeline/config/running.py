"""The settings `run.*`, `checkpoint.*`, `mlflow.*` and `cluster.*`: where a training runs, and what it leaves."""

import re
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.config.fields import Section, refuse_credentials, setting


@dataclass(frozen=True)
class RunConfig(Section):
    name: str | None = setting(None, "a name used before resumes that run; null: a new run with a name of its own")
    storage: str = setting("runs", "where runs lie: a directory that every node mounts, or a URI (s3://..., gs://...)")
    seed: int = setting(
        0, "seed of the images' order, the augmentations and the initial weights", low=0, high=2**63 - 1
    )
    stop_at_step: int | None = setting(
        None, "save a checkpoint at this step and end there; the next attempt goes on", "steps", low=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # A leading dot would hide the run, a slash would leave the storage directory.
        legal = self.name is None or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", self.name) is not None
        self.require(legal, "name", "use letters, digits, '.', '_' and '-', at most 100, not starting with '.' or '-'")
        self.require(bool(self.storage.strip()), "storage", "name a directory, such as runs, or a URI")
        refuse_credentials("run.storage", self.storage)


@dataclass(frozen=True)
class CheckpointConfig(Section):
    every: int = setting(1000, "number of steps between two checkpoints", "steps", low=1)
    keep: int = setting(3, "how many of the newest to keep; the best one is kept as well", "checkpoints", low=1)


@dataclass(frozen=True)
class MlflowConfig(Section):
    uri: str | None = setting(
        None, "the tracking server or database; null: $MLFLOW_TRACKING_URI, else mlflow.db in run.storage"
    )
    public_url: str | None = setting(
        None, "where people reach the server, for the links that are printed: behind an Ingress or a port-forward"
    )
    experiment: str = setting("pipeline", "the experiment that runs belong to")
    checkpoints: Literal["all", "best", "last", "none"] = setting("last", "which checkpoints are uploaded as artifacts")
    log_model: bool = setting(True, "log the final model, with its signature")
    register: str | None = setting(
        None, "the final model becomes a new version of this name in the Model Registry; null: it does not"
    )
    report: bool = setting(True, "log a report at the end, as `pipeline report` makes it")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.experiment.strip()), "experiment", "name an experiment, such as pipeline")
        legal = self.register is None or re.fullmatch(r"[^/:.%\"']{1,100}", self.register) is not None
        self.require(legal, "register", "must be a name without / : . % and quotes")
        self.require(self.register is None or self.log_model, "register", "needs mlflow.log_model")
        refuse_credentials("mlflow.uri", self.uri)
        legal = self.uri is None or ("://" in self.uri and not self.uri.startswith("file:"))
        self.require(legal, "uri", "MLflow keeps no runs in plain files; use sqlite:///FILE.db or http://HOST:PORT")
        refuse_credentials("mlflow.public_url", self.public_url)
        legal = (
            self.public_url is None
            or re.fullmatch(r"https?://[^\s/?#:]+(:[1-9]\d{0,4})?(/[^\s?#]*)?", self.public_url) is not None
        )
        self.require(legal, "public_url", "must be http://HOST:PORT or https://HOST, as a browser takes it")


@dataclass(frozen=True)
class ClusterConfig(Section):
    workers: Any = setting(1, "processes that train together, one a GPU; [min,max]: as many as there is room for")
    device: Literal["auto", "cpu", "gpu"] = setting("auto", "auto: a GPU for each worker where the cluster has them")
    cpus_per_worker: int | None = setting(
        None, "cores of a worker; null: those there are at the start, shared out evenly", "cores", low=1
    )
    address: str | None = setting(
        None, "a running Ray cluster, such as HOST:6379; null: $RAY_ADDRESS, else Ray is started here"
    )
    max_failures: int = setting(
        3, "failures without a new checkpoint in between, before the run fails; -1: without end", low=-1
    )
    timeout_s: int = setting(
        600, "a worker, a storage or a cluster that is silent for so long counts as failed", "seconds", low=10
    )
    cpu_affinity: Literal["none", "numa", "cores"] = setting(
        "numa",
        "numa: a worker's threads run on cores near its GPU; cores: on its own ones there, if nothing else runs "
        "on them; none: on any",
    )
    gradients: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32",
        "what workers exchange gradients in; bf16 keeps 8 bits of each, which costs accuracy, fp16 11, but none "
        "above 65504 and below 6e-8",
    )
    bucket_mb: int = setting(25, "gradients that are exchanged together while others are computed", "MB", low=1)
    grow_after_s: float = setting(
        60.0,
        "with [min,max] workers: how long to train before going on with more, where there is room",
        "seconds",
        low=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        numbers = list(self.workers) if isinstance(self.workers, (list, tuple)) else [self.workers]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in numbers)
        legal = whole and len(numbers) in (1, 2) and numbers == sorted(numbers)
        self.require(legal, "workers", "must be a whole number, at least 1, or [min,max] of them")

    @property
    def min_workers(self) -> int:
        return int(self.workers[0] if isinstance(self.workers, (list, tuple)) else self.workers)

    @property
    def max_workers(self) -> int:
        return int(self.workers[-1] if isinstance(self.workers, (list, tuple)) else self.workers)
