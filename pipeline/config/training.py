"""The settings `model.*`, `optim.*` and `train.*`: the network, and how it learns."""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import Section, refuse_credentials, setting

CompileMode = Literal["auto", "none", "default", "reduce-overhead", "max-autotune"]
GRAPH_MODES = ("reduce-overhead", "max-autotune")  # that use CUDA graphs
Precision = Literal["bf16", "fp16", "fp32"]  # what can be computed in


@dataclass(frozen=True)
class ModelConfig(Section):
    depth: Literal[18, 34, 50, 101, 152] = setting(152, "layers of the ResNet")
    stride_on: Literal["3x3", "1x1"] = setting(
        "3x3", "the convolution of a bottleneck that halves the size: 3x3 is v1.5, 1x1 is the paper's v1"
    )
    variant: Literal["plain", "d"] = setting(
        "plain", "d is ResNet-D: three 3x3 convolutions instead of the first 7x7, and shortcuts that average"
    )
    zero_init_residual: bool = setting(
        True, "the last BatchNorm of each block starts at 0, so that the block starts as the identity"
    )
    drop_path: float = setting(
        0.0, "stochastic depth: the last block's probability; it rises from 0 at the first", low=0, high=0.9
    )
    sync_bn: bool = setting(False, "BatchNorm over all workers' images; needs GPUs")
    activation_checkpointing: bool = setting(
        False, "compute each block again in the backward pass instead of keeping it: less memory, more time"
    )
    weights: str | None = setting(
        None, "initial weights: a file of torchvision's or timm's, or a run (its name, id or checkpoint); null: random"
    )
    freeze: Literal["none", "stem", "layer1", "layer2", "layer3", "layer4"] = setting(
        "none", "fine-tuning: this part and all before it stay as they are, their BatchNorm statistics too"
    )
    compile: CompileMode = setting(
        "auto",
        "torch.compile's mode for training; auto: default on GPUs, in trainings of 5000 steps or more, where each node "
        "has a C compiler and it succeeds, else none; reduce-overhead uses CUDA graphs; evaluation is not compiled",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_credentials("model.weights", self.weights)


@dataclass(frozen=True)
class OptimConfig(Section):
    name: Literal["sgd", "adamw", "lamb", "lars"] = setting("sgd", "the optimizer")
    lr: float = setting(
        0.1, "learning rate at the top of the schedule, for a global batch of lr_batch images; see lr_scaling", above=0
    )
    lr_batch: int | None = setting(
        None, "the global batch that lr and final_lr are for; null: whatever train.global_batch is", "images", low=1
    )
    lr_scaling: Literal["none", "linear", "sqrt"] = setting(
        "none", "how lr and final_lr follow a global batch other than lr_batch"
    )
    layer_decay: float = setting(
        1.0, "learning rate of each part (stem, layer1, ..., fc) as a share of the next one's", above=0, high=1
    )
    momentum: float = setting(0.9, "of sgd and lars", low=0, high=0.9999)
    nesterov: bool = setting(True, "Nesterov's momentum, for sgd and lars")
    betas: tuple[float, float] = setting((0.9, 0.999), "of adamw and lamb", low=0, high=0.999999)
    weight_decay: float = setting(1e-4, "not on biases and BatchNorm", low=0)
    schedule: Literal["cosine", "step", "linear"] = setting("cosine", "how the learning rate falls after the warm-up")
    warmup_epochs: float = setting(
        5.0, "length of the warm-up, in which the learning rate rises linearly", "epochs", low=0
    )
    final_lr: float = setting(0.0, "learning rate at the end of the cosine and linear schedules", low=0)
    step_epochs: tuple[float, ...] = setting(
        (30.0, 60.0, 80.0), "where the schedule step multiplies by step_gamma", "epochs", above=0
    )
    step_gamma: float = setting(0.1, "factor of the schedule step", above=0, high=1)

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
    epochs: int = setting(90, "passes over the training images", low=1)
    steps: int | None = setting(None, "instead of epochs: the length of the training", "steps", low=1)
    global_batch: int = setting(256, "images of one optimizer step, over all workers", "images", low=1)
    micro_batch: int | None = setting(
        None, "images of one forward pass of a worker; null: its whole share of the batch", "images", low=1
    )
    precision: Literal["auto", Precision] = setting(
        "auto", "auto: bf16, or fp16 on older GPUs, where all workers compute it in hardware, else fp32"
    )
    tf32: bool = setting(
        True, "on GPUs fp32 computes products of 10 bits (TF32), from compute capability 8.0 on; false: of all 23"
    )
    deterministic: bool = setting(
        False, "on GPUs the same bits each time, also after a resume: slower kernels, and none that are compiled"
    )
    loss: Literal["cross_entropy", "bce"] = setting(
        "cross_entropy", "bce: binary cross-entropy of each class on its own, averaged over the classes"
    )
    bce_threshold: float | None = setting(
        None, "bce: a class with a larger share of the image counts as 1; null: as its share", low=0, high=0.9999
    )
    label_smoothing: float = setting(0.0, "share of the target that goes to all classes alike", low=0, high=0.9999)
    clip_norm: float | None = setting(None, "largest norm of the gradient; null: no clipping", above=0)
    ema_decay: float | None = setting(
        None, "decay of the averaged weights, per step; null: none are kept", above=0, high=0.999999
    )
    log_every: int = setting(10, "number of steps between two log entries", "steps", low=1)
    eval_every: int = setting(1, "number of epochs between two evaluations", "epochs", low=1)
    eval_batch: int = setting(128, "images of one forward pass of the evaluation, per worker", "images", low=1)
    check_replicas: int = setting(
        1000, "steps between comparisons of all workers' weights, also before each checkpoint; 0: none", "steps", low=0
    )
    profile: tuple[int, int] | None = setting(
        None, "record a trace of these steps, from and to, for ui.perfetto.dev; null: none", "steps", low=1
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        holds = self.bce_threshold is None or self.loss == "bce"
        self.require(holds, "bce_threshold", "needs train.loss=bce")
        self.require(self.profile is None or self.profile[0] <= self.profile[1], "profile", "must be [first,last] step")
