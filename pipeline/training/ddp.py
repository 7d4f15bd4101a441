"""The network as an attempt trains it: exchanging gradients with other ranks, compiled. `state.model` is inside it."""

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from pipeline.config.schema import Config
from pipeline.tracking.ledger import TimeLedger
from pipeline.training.backends import kernels_by_shape
from pipeline.training.compilation import compiled, num_shapes
from pipeline.training.step import autocast


def wrap_model(model: nn.Module, cfg: Config, world_size: int, device: torch.device, ledger: TimeLedger) -> nn.Module:
    """The model in DDP, where there are several ranks, and compiled, as was decided."""
    assert cfg.model.compile != "auto", "not decided yet, see `pipeline.training.compilation`"
    net = model
    if world_size > 1:
        net = _distributed(model, cfg, world_size, device)
        _watch_communication(model, ledger)
    return net if cfg.model.compile == "none" else compiled(net, cfg.model.compile, num_shapes(cfg))


def _distributed(model: nn.Module, cfg: Config, world_size: int, device: torch.device) -> nn.Module:
    """The model in DDP, with the buckets that it keeps.

    DDP lays its buckets out anew after the first backward pass, and the order of a ring's sums over three ranks
    or more follows the layout. A resumed run's first step would differ in the last bit from the same step
    in the middle of a run; so the first pass is one that changes nothing. On a CPU it has the shape of the others, for
    which oneDNN makes its kernels here and not in the first step; a GPU's memory may not hold it, and one image does.
    """
    # BN statistics stay local until they are read: see sync_buffers.
    net = DistributedDataParallel(
        model, forward_sync_buffers=False, gradient_as_bucket_view=True, bucket_cap_mb=cfg.cluster.bucket_mb
    )
    if hook := {"bf16": bf16_compress_hook, "fp16": fp16_compress_hook}.get(cfg.cluster.gradients):
        net.register_comm_hook(None, hook)
    model.eval()
    share = -(-cfg.train.global_batch // world_size)
    num_images, size = min(share, cfg.train.micro_batch or share) if device.type == "cpu" else 1, cfg.data.image_size
    images = torch.zeros(num_images, 3, size, size, dtype=torch.uint8, device=device)
    with kernels_by_shape():
        with autocast(cfg.train.precision, device):
            logits = net(images.contiguous(memory_format=torch.channels_last))
        logits.sum().backward()
    model.zero_grad(set_to_none=True)
    model.train()
    return net


def _watch_communication(model: nn.Module, ledger: TimeLedger) -> None:
    """Count the rest of a backward pass as waiting for other ranks once the last gradient is there."""

    def there(parameter: Tensor) -> None:
        ledger.start_phase("communication wait")

    last = next(p for p in model.parameters() if p.requires_grad)  # the first layer's
    last.register_post_accumulate_grad_hook(there)  # type: ignore[no-untyped-call]
