"""Whether and how the network is compiled: what `model.compile=auto` becomes, and what compiling takes of a machine.

Decided at the beginning of an attempt from all its workers, alike on each, and written into its configuration. A resume
keeps it: a compiled network rounds otherwise.
"""

import math
import os
import shutil
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

from pipeline.config.schema import Config
from pipeline.config.training import CompileMode
from pipeline.data.augment_params import size_at
from pipeline.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn

SHORT_STEPS = 5000  # of ResNet-50 on one H200 compiling took what it saves in 2,200
MODE: CompileMode = "default"  # CUDA graphs gave 2% more on one H200, and take memory for each size of images


@dataclass(frozen=True)
class CompileDecision:
    """mode: of torch.compile, or "none". reason: why, in words; "" where nobody wants to know."""

    mode: CompileMode
    reason: str

    def __str__(self) -> str:
        return self.reason and f"{'eager' if self.mode == 'none' else 'compiled'} ({self.reason})"

    def applied_to(self, cfg: Config) -> Config:
        return replace(cfg, model=replace(cfg.model, compile=self.mode))


def missing_tool(device: "torch.device") -> str:
    """What torch.compile lacks on this machine, in words; "" where it has all.

    For a GPU Triton builds an extension of Python in C (`triton.runtime.build`); for a CPU inductor builds it in C++.
    """
    variable, names = ("CC", ["gcc", "clang"]) if device.type == "cuda" else ("CXX", ["g++"])
    names = [os.environ[variable]] if os.environ.get(variable) else names
    if not any(shutil.which(name) for name in names):
        return f"a {'C' if device.type == 'cuda' else 'C++'} compiler ({' or '.join(names)})"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    return "" if header.exists() else f"Python's headers ({header})"


def decide(
    cfg: Config, device: "torch.device", *, missing: Sequence[str], num_steps: int, kept: CompileMode | None = None
) -> CompileDecision:
    """The same on every rank, from the same arguments.

    Args:
        missing: of each rank, what it lacks, see `missing_tool`.
        num_steps: of the whole training.
        kept: what the training began with, where it is not new.

    Raises:
        UserError: it is to be compiled, and a machine cannot.
    """
    if cfg.model.compile == "none":
        return CompileDecision("none", "")
    for key in ("activation_checkpointing", "sync_bn"):
        if getattr(cfg.model, key) and cfg.model.compile == "auto":
            return CompileDecision("none", f"model.{key} is not compiled")
    wanted = cfg.model.compile if cfg.model.compile != "auto" else kept
    if wanted == "none":
        return CompileDecision("none", "as the run began")
    if wanted is not None and wanted != "auto":
        if lack := next(filter(None, missing), ""):
            raise UserError(
                f"model.compile={wanted}: needs {lack}, which is not on every node; install it, or set "
                "model.compile=none"
            )
        if cfg.model.sync_bn:
            raise UserError(f"model.sync_bn=true: was never tried with model.compile={wanted}; set model.compile=none")
        return CompileDecision(wanted, "as configured" if wanted == cfg.model.compile else "as the run began")
    if device.type != "cuda":
        return CompileDecision("none", "on a CPU")
    if num_steps < SHORT_STEPS:
        return CompileDecision("none", f"{num_steps} steps are too few for it to pay")
    if lack := next(filter(None, missing), ""):
        # Eager bf16 does without cuDNN's BatchNorm, which fp16 and fp32 have.
        also = "; train.precision=fp16 may be quicker" if cfg.train.precision == "bf16" else ""
        return CompileDecision("none", f"for half as much speed again, install {lack} on each node{also}")
    return CompileDecision(MODE, "a GPU")


def num_shapes(cfg: Config) -> int:
    """How many shapes of micro-batches a rank may compute: of each size of images two, as parts may be unequal; and as
    many of each half, quarter, ... that is tried where memory runs short.
    """
    num_sizes = len({size_at(epoch, cfg.data) for epoch in range(math.ceil(cfg.data.grow_epochs[1]) + 1)})
    return 2 * num_sizes * (1 + cfg.train.global_batch.bit_length())


def compiled(net: "nn.Module", mode: str, num_shapes: int = 1) -> "nn.Module":
    """The network in `mode` of torch.compile, for so many shapes of batches, each compiled for itself.

    `state.model` stays as it is: evaluation would take a compilation more.

    Raises (when it is called):
        torch._dynamo.exc.FailOnRecompileLimitHit: there are more shapes; it would go on uncompiled.
    """
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    # With the second size that comes torch would take sizes for variable ones, which costs speed in each step.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, num_shapes)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # torch 2.14 takes kernels of another kind of CPU from its cache; they write past the ends of their buffers.
    torch.compiler.config.cache_key_tag = f"{torch.backends.cpu.get_cpu_capability()} {torch.cpu.get_capabilities()}"
    if not isinstance(net, DistributedDataParallel):
        return cast(nn.Module, torch.compile(net, mode=mode, dynamic=False))
    net.module = torch.compile(net.module, mode=mode, dynamic=False)  # torch cuts it where buckets end
    return net
