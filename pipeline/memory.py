"""How many images a rank computes at a time, so that they fit into its GPU's memory.

The global batch and what a step computes stay: a rank whose share does not fit goes through it in several
micro-batches, whose gradients add up. A shape is tried out before its first step, when a failure disturbs nobody; in
the middle of a step the other ranks would be waiting for this one's gradients.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.config import ConfigError, TrainConfig
from pipeline.data.loader import Batch
from pipeline.state import TrainState
from pipeline.step import accumulate


class MicroBatches:
    """The size of a rank's micro-batches.

    Args:
        try_out: whether memory can run short; on a CPU the system would rather end the process.
        say: told where a size does not fit.
    """

    def __init__(self, cfg: TrainConfig, try_out: bool, say: Callable[[str], None]):
        self._cfg, self._try_out, self._say = cfg, try_out, say
        self._fitting: dict[torch.Size, int] = {}

    def size(self, state: TrainState, net: nn.Module, batch: Batch) -> int:
        """Images of the batch to compute at a time.

        Raises:
            ConfigError: a single image does not fit.
        """
        size = min(self._cfg.micro_batch or len(batch.labels), len(batch.labels))
        if not self._try_out:
            return size
        shape = batch.images.shape
        if shape not in self._fitting:
            while not self._fits(state, net, batch, size):
                if size == 1:
                    raise ConfigError(
                        f"data.image_size={shape[-1]}: a single image does not fit into the GPU's memory; lower it, or "
                        "set model.recompute=true"
                    )
                self._say(
                    f"the GPU's memory is short: {-(-size // 2)} instead of {size} images at a time; "
                    "the global batch stays, and this step is computed anew"
                )
                size = -(-size // 2)
            self._fitting[shape] = size
        return self._fitting[shape]

    def _fits(self, state: TrainState, net: nn.Module, batch: Batch, size: int) -> bool:
        """Compute two micro-batches as in a step, and forget them."""
        parameters, buffers = list(state.model.parameters()), list(state.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        some = batch.part(0, 2 * size)
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
