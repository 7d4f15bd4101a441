"""Whether and how the network is compiled: what `model.compile=auto` becomes, and what compiling takes of a machine.

Decided at the beginning of an attempt from all its workers, alike on each, and written into its configuration. A resume
keeps it: a compiled network rounds otherwise.
"""

import math
import os
import shutil
import socket
import sysconfig
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pipeline.config.schema import Config
from pipeline.config.training import CompileMode
from pipeline.data.augment_params import size_at
from pipeline.errors import UserError
from pipeline.events import Note
from pipeline.failures import COMPILE_S, FatalError
from pipeline.runs.spec import WorkerContext

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pipeline.data.loading.loader import Batch

SHORT_STEPS = 5000  # of ResNet-50 on one H200 compiling took what it saves in 2,200
MAX_REASON = 300  # characters
MODE: CompileMode = "default"  # CUDA graphs gave 2% more on one H200, and take memory for each size of images


@dataclass(frozen=True)
class CompileDecision:
    """mode: of torch.compile, or "none". reason: why, in words; "" where nobody wants to know. saved: what later
    attempts are to keep, where it is another mode.
    """

    mode: CompileMode
    reason: str
    saved: CompileMode | None = None

    def __str__(self) -> str:
        return self.reason and f"{'eager' if self.mode == 'none' else 'compiled'} ({self.reason})"

    def applied_to(self, cfg: Config) -> Config:
        """For this attempt."""
        return replace(cfg, model=replace(cfg.model, compile=self.mode))

    @property
    def kept(self) -> CompileMode:
        """For checkpoints' meta.json, and so for later attempts; their config.yaml has what was configured."""
        return self.saved or self.mode


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
        missing: of each rank, what it lacks, see `missing_tool`, and on which host.
        num_steps: of the whole training.
        kept: what the checkpoint that it goes on from was compiled as, if there is one.

    Raises:
        UserError: it is to be compiled, and a machine cannot.
    """
    setting, lack = cfg.model.compile, next(filter(None, missing), "")
    if setting == "none":
        return CompileDecision("none", "")
    if setting != "auto":
        if lack:
            raise UserError(f"model.compile={setting}: needs {lack}; install it there, or set model.compile=none")
        if cfg.model.sync_bn:
            raise UserError(f"model.sync_bn=true: was never tried with model.compile={setting}; set model.compile=none")
        return CompileDecision(setting, "as configured")
    compiles = kept or "auto"
    if device.type != "cuda":  # in this attempt
        return CompileDecision("none", "on a CPU", saved=None if compiles == "auto" else compiles)
    given = {
        "model.activation_checkpointing": cfg.model.activation_checkpointing,
        "model.sync_bn": cfg.model.sync_bn,
        "train.deterministic": cfg.train.deterministic,  # the compiler times its kernels, too
    }
    if key := next((key for key, value in given.items() if value), None):
        return CompileDecision("none", f"{key} is not compiled")
    if compiles == "none":
        return CompileDecision("none", "as before")
    if compiles != "auto":  # sums round otherwise
        return CompileDecision("none", f"no {lack}", saved=compiles) if lack else CompileDecision(compiles, "as before")
    if num_steps < SHORT_STEPS:
        return CompileDecision("none", f"{num_steps} steps are too few for it to pay")
    if lack:
        # Eager bf16 does without cuDNN's BatchNorm, which fp16 and fp32 have.
        also = "; train.precision=fp16 may be quicker" if cfg.train.precision == "bf16" else ""
        return CompileDecision("none", f"for half as much speed again, install {lack}{also}")
    return CompileDecision(MODE, "a GPU")


def num_shapes(cfg: Config) -> int:
    """How many shapes of micro-batches a rank may compute: of each size of images two, as parts may be unequal; and as
    many of each half, quarter, ... that is tried where memory runs short.
    """
    num_sizes = len({size_at(epoch, cfg.data) for epoch in range(math.ceil(cfg.data.grow_epochs[1]) + 1)})
    return 2 * num_sizes * (1 + cfg.train.global_batch.bit_length())


class Compiler:
    """Compiles the network for each shape of batches, before the ranks wait for each other in its first step.

    Where a rank fails to, and nobody has insisted, all go on uncompiled, in this attempt.

    Args:
        mode: what was decided. is_auto: it may be given up. has_worked: it did, in an earlier attempt.
        try_out: computes a batch as in a step, and exchanges nothing with other ranks.
        gather: see `ControlBroadcast.gather_late`.
        feed: of the watchdog.
    """

    def __init__(
        self,
        mode: CompileMode,
        is_auto: bool,
        has_worked: bool,
        try_out: "Callable[[Batch], object]",
        gather: Callable[[str], list[str]],
        feed: Callable[[float], None],
        ctx: WorkerContext,
    ):
        self._mode, self._is_auto, self._has_worked = mode, is_auto, has_worked
        self._try_out, self._gather = try_out, gather
        self._feed, self._ctx = feed, ctx
        self._shapes = set[Any]()

    def is_new(self, batch: "Batch") -> bool:
        """Whether a batch's shape is not compiled yet; alike on all ranks, as sizes change with the epoch."""
        return self._mode != "none" and batch.images.shape not in self._shapes

    def compile_for(self, batch: "Batch") -> bool:
        """Compile for a batch of a new shape; called by all ranks alike.

        Returns:
            Whether that was done, and not given up.

        Raises:
            UserError: it does not fit into the memory.
            FatalError, RuntimeError: compiling fails, and the mode was asked for; another attempt may do better at the
                latter alone.
        """
        import torch

        self._feed(COMPILE_S)
        if self._ctx.rank == 0:
            side = batch.images.shape[-1]
            self._ctx.emit(Note(f"compiling for images of {side}x{side} pixels, which may take minutes the first time"))
        self._shapes.add(batch.images.shape)
        problem = ""
        try:
            self._try_out(batch)
        except UserError:
            raise
        except Exception as e:
            traceback.print_exc()  # into the worker's log
            error = getattr(e, "inner_exception", e)  # of torch._dynamo's that only says where it came from
            lines = str(error).strip().splitlines() or [""]
            problem = f"{socket.gethostname()} ({type(error).__name__}: {lines[0][:MAX_REASON]})"
            if not self._is_auto:
                fix = "fix that, or set model.compile=auto or none"
                kind = RuntimeError if self._has_worked or self._ctx.restarted else FatalError
                raise kind(f"model.compile={self._mode}: compiling fails on {problem}; {fix}") from None
        if failed := next(filter(None, self._gather(problem)), ""):
            torch.compiler.set_stance("force_eager")  # a fault that was not the compiler's comes again in the step
            if self._ctx.rank == 0:
                self._ctx.warn(f"compiling fails on {failed}: going on uncompiled until the next start")
            self._mode = "none"
        self._feed(0.0)
        return self._mode != "none"


def compiled(net: "nn.Module", mode: str, num_shapes: int = 1) -> "nn.Module":
    """The network in `mode` of torch.compile, for so many shapes of batches, each compiled for itself.

    `state.model` stays as it is: evaluation would take a compilation more.

    Raises (when it is called):
        torch._dynamo.exc.FailOnRecompileLimitHit: there are more shapes; it would go on uncompiled.
    """
    import torch
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    torch.compiler.set_stance("default")
    # With the second size that comes torch would take sizes for variable ones, which costs speed in each step.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, num_shapes)
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    # torch 2.14 takes kernels of another kind of CPU from its cache; they write past the ends of their buffers.
    torch.compiler.config.cache_key_tag = f"{torch.backends.cpu.get_cpu_capability()} {torch.cpu.get_capabilities()}"
    if not isinstance(net, DistributedDataParallel):
        return cast(nn.Module, torch.compile(net, mode=mode, dynamic=False))
    net.module = torch.compile(net.module, mode=mode, dynamic=False)  # torch cuts it where buckets end
    return net
