"""The settings `data.*`: which images, and how they become batches."""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.fields import Section, refuse_credentials, setting

SOURCE = "a folder of class/image files, tar shards or Parquet files, or an index file of these; a path or URI"


@dataclass(frozen=True)
class DataConfig(Section):
    train: str = setting("", f"the images to train on: {SOURCE}; must be given")
    val: str = setting("", "the images to evaluate on, likewise; must be given")
    image_size: int = setting(224, "height and width of what the model trains on", "pixels", low=8, high=4096)
    start_size: int | None = setting(
        None, "progressive resizing: image_size of the first epochs; null: off", "pixels", low=8, high=4096
    )
    grow_epochs: tuple[float, float] = setting(
        (0.0, 0.0), "progressive resizing: the size is start_size up to the first, image_size from the last", low=0
    )
    val_size: int | None = setting(
        None, "height and width of what is evaluated; null: image_size", "pixels", low=8, high=4096
    )
    val_resize: int = setting(256, "evaluation: the short side before the centre crop", "pixels", low=8, high=4096)
    shuffle_block: int | None = setting(
        None, "shuffle blocks of so many rows, each read in sequence; null: shuffle all rows", "rows", low=1
    )
    shuffle_window: int = setting(64, "with shuffle_block: blocks that are shuffled into each other", "blocks", low=1)
    repeated_aug: int = setting(1, "repeated augmentation: copies of each image in a global batch", low=1)
    crop_scale: tuple[float, float] = setting(
        (0.08, 1.0), "random-resized crop: its share of the image's area, from and to", above=0, high=1
    )
    crop_ratio: tuple[float, float] = setting(
        (3 / 4, 4 / 3), "random-resized crop: its width / height, from and to", above=0
    )
    crop_short: tuple[int, int] | None = setting(
        None,
        "He et al.'s scale augmentation instead: the short side is drawn from this range, then image_size cut out",
        "pixels",
        low=8,
        high=4096,
    )
    flip: float = setting(0.5, "probability of a horizontal flip", low=0, high=1)
    jitter: tuple[float, float, float, float] = setting(
        (0.0, 0.0, 0.0, 0.0), "colour jitter: strength of brightness, contrast, saturation and hue", low=0
    )
    auto_augment: Literal["none", "trivial", "rand", "auto"] = setting(
        "none", "TrivialAugmentWide, RandAugment or AutoAugment"
    )
    rand_ops: int = setting(2, "RandAugment: operations in a row", low=1, high=8)
    rand_magnitude: int = setting(9, "RandAugment: their strength", low=0, high=30)
    erase: float = setting(0.0, "random erasing: the probability of a rectangle", low=0, high=1)
    erase_scale: tuple[float, float] = setting(
        (0.02, 0.33), "random erasing: its share of the area, from and to", above=0, high=1
    )
    erase_ratio: tuple[float, float] = setting((0.3, 3.3), "random erasing: its width / height, from and to", above=0)
    mixup: float = setting(0.0, "mixup: alpha of its Beta distribution; 0: off", low=0, high=100)
    cutmix: float = setting(
        0.0, "CutMix: likewise; with both on, each pair of images takes one of them", low=0, high=100
    )
    decode_threads: int | None = setting(
        None, "threads that decode, per worker; null: its share of the node's cores, on a GPU all but two", low=1
    )
    decode_on_gpu: bool = setting(True, "decode on the GPU that trains; false: on CPU cores, and only augment there")
    hw_decoder_load: float = setting(
        1.0, "whether a GPU's own JPEG decoder, if any, takes the images that it can decode: 1 or 0"
    )
    read_processes: int = setting(1, "processes that read files ahead, per worker", low=1, high=64)
    read_threads: int = setting(4, "threads of each of them", low=1, high=256)
    prefetch: int = setting(2, "batches decoded ahead of the one in use", "batches", low=1, high=64)
    cache_dir: str | None = setting(
        None, "where a node keeps data that comes from a URI; null: in the machine's temporary directory"
    )
    cache_gb: float = setting(20.0, "the most that cache_dir may hold", "GB", above=0)
    max_bad_fraction: float = setting(
        0.01,
        "share of an index's images that may turn out to be broken, one at least if above 0; a worker that meets more "
        "stops the run. What cannot be read while an index is made is left out, and does not count",
        low=0,
        high=1,
    )
    log_samples: bool = setting(False, "write each step's time and rows of the index into the run's folder")
    allow_changed: bool = setting(False, "resume although the images are not those of the checkpoint")

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
        # Its pixels differ from CUDA's in the last bit, and between 0 and 1 an image's place in the batch decides.
        fix = "must be 0 or 1: a share in between would have pixels depend on the number of workers"
        self.require(self.hw_decoder_load in (0, 1), "hw_decoder_load", fix)
        grows = self.start_size is None or self.start_size <= self.image_size
        self.require(grows, "start_size", f"must be at most image_size={self.image_size}")

    @property
    def size_to_evaluate(self) -> int:
        return self.val_size or self.image_size

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0
