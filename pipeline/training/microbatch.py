"""How many images a rank computes at a time, so that they fit into its GPU's memory.

The global batch and what a step computes stay: a rank whose share does not fit goes through it in several
micro-batches, whose gradients add up. A shape is tried out before its first step, when a failure disturbs nobody; in
the middle of a step the other ranks would be waiting for this one's gradients. In an evaluation nobody
waits before its end, so what does not fit is simply computed once more, in smaller parts.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.schema import Config
from pipeline.config.training import GRAPH_MODES, CompileMode, TrainConfig
from pipeline.data.loading.loader import Batch
from pipeline.errors import UserError
from pipeline.training.state import TrainState
from pipeline.training.step import accumulate


def may_try_out(cfg: Config, device: torch.device, world_size: int) -> bool:
    """Whether a rank may try sizes out: on a CPU the system would rather end a process than let its memory run short;
    and with synchronised BatchNorm a rank that does it alone would wait for the others' statistics.
    """
    return device.type == "cuda" and not (cfg.model.sync_bn and world_size > 1)


class AutoMicrobatch:
    """The size of a rank's micro-batches.

    Args:
        try_out: see `may_try_out`.
        warn: told where a size does not fit.
        mode: of torch.compile, which compiles parts of each size for themselves: so all of a batch are tried out.
    """

    def __init__(self, cfg: TrainConfig, try_out: bool, warn: Callable[[str], None], mode: CompileMode = "none"):
        self._cfg, self._try_out, self._warn, self._mode = cfg, try_out, warn, mode
        self._fitting: dict[torch.Size, int] = {}

    def size(self, state: TrainState, net: nn.Module, batch: Batch) -> int:
        """Images of the batch to compute at a time.

        Raises:
            UserError: a single image does not fit, or all do not and must.
        """
        size = min(self._cfg.micro_batch or len(batch.labels), len(batch.labels))
        if not self._try_out:
            return size
        shape = batch.images.shape
        if shape not in self._fitting:
            while not self._fits(state, net, batch, size):
                if size == 1:
                    raise _too_large(
                        f"data.image_size={shape[-1]}", "lower it, or set model.activation_checkpointing=true"
                    )
                if self._mode in GRAPH_MODES:
                    raise UserError(
                        f"model.compile={self._mode}: a worker's {size} images do not fit into the GPU's memory at "
                        "once, and CUDA graphs get gradients wrong that add up; set model.compile=default"
                    )
                size = _half(size, self._warn, "the global batch stays, and this step is computed anew")
            self._fitting[shape] = size
        return self._fitting[shape]

    def _fits(self, state: TrainState, net: nn.Module, batch: Batch, size: int) -> bool:
        """Compute micro-batches as in a step, and forget them."""
        parameters, buffers = list(state.model.parameters()), list(state.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        some = batch if self._mode != "none" else batch.part(0, 2 * size)
        try:
            # What the optimizer takes at its first step, at most.
            ballast = [] if state.optimizer.state else [torch.empty_like(p) for p in parameters for _ in range(2)]
            with net.no_sync() if isinstance(net, DistributedDataParallel) else nullcontext():
                accumulate(state, net, some, self._cfg, world_size=1, micro_batch=size)
            del ballast
            return True
        except torch.OutOfMemoryError:
            return False
        finally:
            state.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for buffer, value in zip(buffers, before, strict=True):
                    buffer.copy_(value)
            torch.cuda.empty_cache()


class OomSplitter:
    """Computes images without gradients, in parts whose size goes down where they do not fit, and stays so.

    Args:
        warn: told where a size does not fit.
    """

    def __init__(self, warn: Callable[[str], None]):
        self._warn, self._size = warn, sys.maxsize

    def __call__(self, compute: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        """What `compute` makes of images (B, 3, S, S): (B, ...), of which each row must be of its own image alone.

        Raises:
            UserError: a single image does not fit.
        """
        while True:
            size = min(self._size, len(images))
            try:
                return torch.cat([compute(part) for part in torch.split(images, size)])
            except torch.OutOfMemoryError:
                if size == 1:
                    raise _too_large(f"data.val_size={images.shape[-1]}", "lower it") from None
            torch.cuda.empty_cache()  # not before the error is dropped, which holds what was computed
            self._size = _half(size, self._warn, "the figures stay, to within rounding (train.eval_batch)")


def _half(size: int, warn: Callable[[str], None], then: str) -> int:
    warn(f"the GPU's memory is short: {-(-size // 2)} instead of {size} images at a time; {then}")
    return -(-size // 2)


def _too_large(setting: str, fix: str) -> UserError:
    return UserError(f"{setting}: a single image does not fit into the GPU's memory; {fix}")
