"""The configuration: all its sections, and every check across them that needs no data.

What is wrong is told in one line that names the key, the value and the fix.
"""

from dataclasses import dataclass, field

from pipeline.config.data import DataConfig
from pipeline.config.fields import show
from pipeline.config.running import CheckpointConfig, ClusterConfig, MlflowConfig, RunConfig
from pipeline.config.training import GRAPH_MODES, ModelConfig, OptimConfig, TrainConfig


@dataclass(frozen=True)
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    mlflow: MlflowConfig = field(default_factory=MlflowConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        for name in ("train", "val"):
            given = bool(getattr(self.data, name).strip())
            self.data.require(
                given, name, "is not set; give a folder of CLASS/image files, tar shards or Parquet files, or an index"
            )
        train, workers, unit = self.train, self.cluster.max_workers, self._unit
        units = {"data.repeated_aug copies": self.data.repeated_aug, "pairs for data.mixup or data.cutmix": unit}
        for why, number in units.items():
            holds = train.global_batch % number == 0
            train.require(holds, "global_batch", f"must be a multiple of {number}, for {why}")
        some = f"leaves some of cluster.workers={show(self.cluster.workers)} without images"
        fix = f"{some}; raise it to {workers * unit} or lower cluster.workers"
        train.require(train.global_batch >= workers * unit, "global_batch", fix)
        smallest = min(n // self._num_passes(n) for n in self._shares(workers))
        size = self.data.start_size or self.data.image_size
        single = f"leaves a forward pass with one image, which at {size} pixels ends as one value per channel"
        fix = f"{single}, too few for BatchNorm; raise it or train.micro_batch"
        train.require(smallest > 1 or size > 32, "global_batch", fix)
        self._require_equal_passes()
        fix = f"cannot be combined with model.compile={self.model.compile}; set it to false, or model.compile=none"
        is_compiled = self.model.compile not in ("auto", "none")
        self.model.require(not (self.model.activation_checkpointing and is_compiled), "activation_checkpointing", fix)
        train.require(not (train.deterministic and is_compiled), "deterministic", fix)
        # A graph's memory is written to again by its next run, and gradients that are added up lie in it.
        at_once = all(self._num_passes(n) == 1 for n in self._shares(workers) | self._shares(self.cluster.min_workers))
        fix = f"adds gradients up, which CUDA graphs (model.compile={self.model.compile}) get wrong"
        fix += "; leave it out, or set model.compile=default"
        train.require(at_once or self.model.compile not in GRAPH_MODES, "micro_batch", fix)
        fits = train.steps is not None or self.optim.warmup_epochs <= train.epochs
        self.optim.require(fits, "warmup_epochs", f"must be at most train.epochs={train.epochs}")

    def _require_equal_passes(self) -> None:
        """With model.sync_bn each forward pass waits for one of every other worker."""
        for workers in range(self.cluster.min_workers, self.cluster.max_workers + 1) if self.model.sync_bn else ():
            passes = sorted({self._num_passes(share) for share in self._shares(workers)})
            fix = f"{workers} workers go through it in {passes[0]} or {passes[-1]} forward passes, and would wait for"
            fix += " each other for ever with model.sync_bn=true; change it or train.micro_batch"
            self.train.require(len(passes) == 1, "global_batch", fix)

    @property
    def _unit(self) -> int:
        """Images that stay together on one rank."""
        return 2 if self.data.mixes else 1

    def _shares(self, workers: int) -> set[int]:
        """How many images of a global batch each of so many workers gets."""
        units = self.train.global_batch // self._unit
        return {units // workers * self._unit, -(-units // workers) * self._unit}

    def _num_passes(self, share: int) -> int:
        """In which a worker goes through its share of a batch."""
        return -(-share // (self.train.micro_batch or share))
