"""The configuration: its schema, its only defaults, and every check that needs no data.

What is wrong is told in one line that names the key, the value and the fix.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.config.fields import Section, num, refuse_credentials, show

Precision = Literal["bf16", "fp16", "fp32"]  # what can be computed in


@dataclass(frozen=True)
class RunConfig(Section):
    name: str | None = None  # a name used before resumes that run; null makes a new one
    storage: str = "runs"  # of all runs: a directory that every node mounts, or a URI such as s3://bucket/runs
    seed: int = num(0, low=0, high=2**63 - 1)
    stop_at_step: int | None = num(None, low=1)  # end this attempt there, after a checkpoint

    def __post_init__(self) -> None:
        super().__post_init__()
        # A leading dot would hide the run, a slash would leave the storage directory.
        legal = self.name is None or re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}", self.name) is not None
        self.require(legal, "name", "use letters, digits, '.', '_' and '-', at most 100, not starting with '.' or '-'")
        self.require(bool(self.storage.strip()), "storage", "name a directory, such as runs, or a URI")
        refuse_credentials("run.storage", self.storage)


@dataclass(frozen=True)
class DataConfig(Section):
    # A folder of class/image files, tar shards or Parquet files, shards as s3://BUCKET/train-{000..146}.tar, or an
    # index file of any of these; paths or URIs. Must be given.
    train: str = ""
    val: str = ""
    image_size: int = num(224, low=8, high=4096)  # height and width of what the model trains on, pixels
    start_size: int | None = num(None, low=8, high=4096)  # progressive: the first epochs' size; null: image_size
    grow_epochs: tuple[float, float] = num((0.0, 0.0), low=0)  # from start_size at the first to image_size at the last
    val_size: int | None = num(None, low=8, high=4096)  # of what is evaluated; null: image_size
    val_resize: int = num(256, low=8, high=4096)  # evaluation: short side before the centre crop, pixels
    shuffle_block: int | None = num(None, low=1)  # shuffle blocks of so many rows, read in sequence; null: all rows
    shuffle_window: int = num(64, low=1)  # blocks that are shuffled into each other
    repeated_aug: int = num(1, low=1)  # repeated augmentation: copies of each image in a global batch
    crop_scale: tuple[float, float] = num((0.08, 1.0), above=0, high=1)  # area of the random crop
    # The paper's scale augmentation instead: the short side's length is drawn, then a square of image_size cut out.
    crop_short: tuple[int, int] | None = num(None, low=8, high=4096)  # pixels
    crop_ratio: tuple[float, float] = num((3 / 4, 4 / 3), above=0)  # width / height of the random crop
    flip: float = num(0.5, low=0, high=1)  # probability of a horizontal flip
    # Brightness, contrast, saturation, hue.
    jitter: tuple[float, float, float, float] = num((0.0, 0.0, 0.0, 0.0), low=0)
    auto_augment: Literal["none", "trivial", "rand", "auto"] = "none"  # TrivialAugmentWide, RandAugment, AutoAugment
    rand_ops: int = num(2, low=1, high=8)  # RandAugment: operations in a row
    rand_magnitude: int = num(9, low=0, high=30)  # RandAugment: their strength
    erase: float = num(0.0, low=0, high=1)  # probability of erasing a rectangle
    erase_scale: tuple[float, float] = num((0.02, 0.33), above=0, high=1)  # its area
    erase_ratio: tuple[float, float] = num((0.3, 3.3), above=0)  # its width / height
    mixup: float = num(0.0, low=0, high=100)  # alpha of the Beta distribution; 0: off
    cutmix: float = num(0.0, low=0, high=100)  # likewise; with both on, each pair takes one of them
    decode_threads: int | None = num(None, low=1)  # per worker; null: its share of the node's cores
    decode_on_gpu: bool = True  # where training is on one; false: on CPU cores, and only the rest there
    hw_decoder_load: float = num(0.65, low=0, high=1)  # share of images for a GPU's own JPEG decoder, if it has one
    read_threads: int = num(4, low=1, high=256)  # per worker, reading files ahead
    prefetch: int = num(2, low=1, high=64)  # batches decoded ahead of the one in use
    cache_dir: str | None = None  # for data at a URI, one a node; null: in the machine's temporary directory
    cache_gb: float = num(20.0, above=0)  # at most, of all data in cache_dir
    max_bad_fraction: float = num(0.01, low=0, high=1)  # of all images; a worker that meets more stops the run
    log_samples: bool = False  # write down each step's time and rows of the index, in the run's folder
    allow_changed: bool = False  # resume although the images' index is another than the checkpoint's

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("train", "val"):
            refuse_credentials(self.key(name), getattr(self, name))
        name = "image_size" if self.val_size is None else "val_size"
        holds = self.val_resize >= self.size_to_evaluate
        self.require(holds, "val_resize", f"must be at least {name}={self.size_to_evaluate}")
        for name in ("crop_scale", "crop_ratio", "erase_scale", "erase_ratio", "grow_epochs"):
            low, high = getattr(self, name)
            self.require(low <= high, name, "must be [low,high] with low <= high")
        self.require(self.jitter[3] <= 0.5, "jitter", "the hue's, the last, must be at most 0.5")
        if self.crop_short is not None:
            low, high = self.crop_short
            holds = self.image_size <= low <= high
            self.require(holds, "crop_short", f"must be [low,high] with image_size={self.image_size} <= low <= high")
        grows = self.start_size is None or self.start_size <= self.image_size
        self.require(grows, "start_size", f"must be at most image_size={self.image_size}")

    @property
    def size_to_evaluate(self) -> int:
        return self.val_size or self.image_size

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


@dataclass(frozen=True)
class ModelConfig(Section):
    depth: Literal[18, 34, 50, 101, 152] = 152
    stride_on: Literal["3x3", "1x1"] = "3x3"  # of a downsampling bottleneck: v1.5, or the paper's v1
    # "d": three 3x3 convolutions for the first 7x7, and shortcuts that average before they project (ResNet-D).
    variant: Literal["plain", "d"] = "plain"
    zero_init_residual: bool = True  # the last BN of each branch starts at 0, so blocks start as identity
    drop_path: float = num(0.0, low=0, high=0.9)  # stochastic depth: of the last block; rises from 0 at the first
    sync_bn: bool = False  # BatchNorm over all workers' images; needs GPUs
    activation_checkpointing: bool = False  # compute each block again in the backward pass, instead of keeping it all
    weights: str | None = None  # to begin with: a file of torchvision's or timm's, or a run, as RUN of `--resume`
    # This part and all before it stay as they are: for fine-tuning. Their BatchNorms do not follow the data either.
    freeze: Literal["none", "stem", "layer1", "layer2", "layer3", "layer4"] = "none"
    # torch.compile's mode, for training; evaluation is not compiled. reduce-overhead uses CUDA graphs.
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_credentials("model.weights", self.weights)


@dataclass(frozen=True)
class OptimConfig(Section):
    name: Literal["sgd", "adamw", "lamb", "lars"] = "sgd"
    lr: float = num(0.1, above=0)  # at the top of the schedule
    lr_batch: int | None = num(None, low=1)  # the global batch that lr and final_lr are for; null: whatever it is
    lr_scaling: Literal["none", "linear", "sqrt"] = "none"  # how they follow another global batch
    layer_decay: float = num(1.0, above=0, high=1)  # lr of each part (stem, layer1, ..., fc) by that of the next one
    momentum: float = num(0.9, low=0, high=0.9999)  # SGD, LARS
    nesterov: bool = True  # SGD, LARS
    betas: tuple[float, float] = num((0.9, 0.999), low=0, high=0.999999)  # AdamW, LAMB
    weight_decay: float = num(1e-4, low=0)  # not on parameters with ndim <= 1
    schedule: Literal["cosine", "step", "linear"] = "cosine"
    warmup_epochs: float = num(5.0, low=0)  # linear from lr / warm-up steps
    final_lr: float = num(0.0, low=0)  # where cosine and linear end
    step_epochs: tuple[float, ...] = num((30.0, 60.0, 80.0), above=0)  # where "step" multiplies by step_gamma
    step_gamma: float = num(0.1, above=0, high=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.final_lr <= self.lr, "final_lr", f"must be at most lr={self.lr}")
        uses_momentum = self.name in ("sgd", "lars")
        self.require(not (self.nesterov and uses_momentum) or self.momentum > 0, "nesterov", "needs optim.momentum")
        given = self.lr_scaling == "none" or self.lr_batch is not None
        self.require(given, "lr_scaling", "give optim.lr_batch, the global batch that optim.lr is for")
        self.require(list(self.step_epochs) == sorted(set(self.step_epochs)), "step_epochs", "must be rising")


@dataclass(frozen=True)
class TrainConfig(Section):
    epochs: int = num(90, low=1)
    steps: int | None = num(None, low=1)  # instead of epochs: the length of the schedule in steps
    global_batch: int = num(256, low=1)  # images per optimizer step over all workers
    micro_batch: int | None = num(None, low=1)  # images per forward pass of a worker; null: its whole share
    # auto: bf16, or fp16 on a GPU before that, where all workers have it in hardware, else fp32; a resume keeps it.
    precision: Literal["auto", Precision] = "auto"
    loss: Literal["cross_entropy", "bce"] = "cross_entropy"  # bce: each class on its own, mean over the classes
    bce_threshold: float | None = num(None, low=0, high=0.9999)  # shares above it count as 1; null: as they are
    label_smoothing: float = num(0.0, low=0, high=0.9999)
    clip_norm: float | None = num(None, above=0)  # of the global gradient
    ema_decay: float | None = num(None, above=0, high=0.999999)  # per step; null: no averaged weights
    log_every: int = num(10, low=1)  # steps
    eval_every: int = num(1, low=1)  # epochs
    eval_batch: int = num(128, low=1)  # images per forward pass; part of the figures' exactness
    profile: tuple[int, int] | None = num(None, low=1)  # trace these steps, first and last one, for Perfetto

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = self.bce_threshold is None or self.loss == "bce"
        self.require(holds, "bce_threshold", "needs train.loss=bce")
        self.require(self.profile is None or self.profile[0] <= self.profile[1], "profile", "must be [first,last] step")


@dataclass(frozen=True)
class CheckpointConfig(Section):
    every: int = num(1000, low=1)  # steps
    keep: int = num(3, low=1)  # the newest ones; the best is kept besides


@dataclass(frozen=True)
class MlflowConfig(Section):
    uri: str | None = None  # null: $MLFLOW_TRACKING_URI, else SQLite in run.storage
    experiment: str = "pipeline"
    checkpoints: Literal["all", "best", "last", "none"] = "last"  # uploaded as artifacts
    log_model: bool = True  # the final model with its signature
    register: str | None = None  # the final model as a new version of this name in MLflow's Model Registry
    report: bool = True  # at the end, as `pipeline report` makes it

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.experiment.strip()), "experiment", "name an experiment, such as pipeline")
        legal = self.register is None or re.fullmatch(r"[^/:.%\"']{1,100}", self.register) is not None
        self.require(legal, "register", "must be a name without / : . % and quotes")
        self.require(self.register is None or self.log_model, "register", "needs mlflow.log_model")
        refuse_credentials("mlflow.uri", self.uri)
        legal = self.uri is None or ("://" in self.uri and not self.uri.startswith("file:"))
        self.require(legal, "uri", "MLflow keeps no runs in plain files; use sqlite:///FILE.db or http://HOST:PORT")


@dataclass(frozen=True)
class ClusterConfig(Section):
    workers: Any = 1  # DDP ranks, one process each; [min,max]: as many as the cluster has room for
    device: Literal["auto", "cpu", "gpu"] = "auto"  # auto: a GPU for each worker where the cluster has them
    cpus_per_worker: int | None = num(None, low=1)  # null: the cores there are at the start shared out evenly
    address: str | None = None  # of a running Ray cluster; null: $RAY_ADDRESS, else one on this machine
    max_failures: int = num(3, low=-1)  # to recover from without a new checkpoint in between; -1: without end
    timeout_s: int = num(600, low=10)  # a rank, a storage or a cluster silent for so long counts as failed
    # Where a worker's threads run: near its GPU; or on cores of its own, if nothing else runs on the nodes.
    cpu_affinity: Literal["none", "numa", "cores"] = "numa"
    gradients: Literal["fp32", "bf16"] = "fp32"  # as workers exchange them; bf16 cost accuracy
    bucket_mb: int = num(25, low=1)  # of gradients that are exchanged together, while others are being computed
    grow_after_s: float = num(60.0, low=0)  # at the earliest, after workers have started, more are taken in

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
            self.data.require(given, name, "give a folder of class/image files or an index")
        train, workers, unit = self.train, self.cluster.max_workers, self._unit
        units = {"data.repeated_aug copies": self.data.repeated_aug, "pairs for data.mixup or data.cutmix": unit}
        for why, number in units.items():
            holds = train.global_batch % number == 0
            train.require(holds, "global_batch", f"must be a multiple of {number}, for {why}")
        some = f"gives some of cluster.workers={show(self.cluster.workers)} nothing"
        fix = f"{some}; raise it to {workers * unit} or lower cluster.workers"
        train.require(train.global_batch >= workers * unit, "global_batch", fix)
        smallest = min(n // self._num_passes(n) for n in self._shares(workers))
        size = self.data.start_size or self.data.image_size
        single = f"gives some forward pass a single image, which at a size of {size} is one value a channel"
        fix = f"{single}, too few for BatchNorm; raise it or train.micro_batch"
        train.require(smallest > 1 or size > 32, "global_batch", fix)
        self._require_equal_passes()
        holds = not self.model.activation_checkpointing or self.model.compile == "none"
        fix = "does not go together with model.compile; choose one of them"
        self.model.require(holds, "activation_checkpointing", fix)
        fits = train.steps is not None or self.optim.warmup_epochs <= train.epochs
        self.optim.require(fits, "warmup_epochs", f"longer than train.epochs={train.epochs}")

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
