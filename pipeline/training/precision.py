"""Which precision a training computes in: what its devices have in hardware, and what is told where they have not.

`train.precision=auto` is decided at a training's first attempt from all its workers, and the configuration then says
what it became. So a resume keeps it wherever it runs, and nothing but this module has to know "auto".
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from pipeline.config.schema import Config
from pipeline.config.training import Precision

if TYPE_CHECKING:  # the driver uses this module, and starts faster without torch
    import torch

# What oneDNN can be held to by ONEDNN_MAX_CPU_ISA on x86; each includes those before it.
ISAS = (
    *("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"),
    *("AVX512_CORE_BF16", "AVX512_CORE_FP16", "AVX512_CORE_AMX", "AVX512_CORE_AMX_FP16"),
)
LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
# torch's name of a CPU's feature: what it computes, oneDNN's name of it on x86, and its common name.
FEATURES: dict[str, tuple[Precision, str, str]] = {
    "amx_bf16": ("bf16", "AVX512_CORE_AMX", "AMX"),
    "avx512_bf16": ("bf16", "AVX512_CORE_BF16", "AVX512_BF16"),
    "bf16": ("bf16", "", "Arm's bf16"),
    "avx512_fp16": ("fp16", "AVX512_CORE_FP16", "AVX512_FP16"),
}
# What emulation takes, in times of fp32: CPU time of ResNet-18's step at 64 pixels, batch 16, one thread, by turns.
# On AVX2 bf16 took 4.9 to 6.1 (Zen 3) and 7.4 to 8.4 (Zen 5 held to AVX2), fp16 8.6 to 10.1 (the latter); on AVX-512
# bf16 1.4 to 1.8 (Zen 5 held to AVX512_CORE and to AVX512_CORE_VNNI), fp16 13.0 to 15.2 (Zen 5, which has no fp16).
ON_AVX2: dict[Precision, str] = {"bf16": "5 to 8", "fp16": "9 to 10"}
ON_AVX512: dict[Precision, str] = {"bf16": "1.4 to 1.8", "fp16": "13 to 15"}


@dataclass(frozen=True)
class Hardware:
    """What a device computes in hardware.

    native: precisions, the one to prefer first. reason: how that one is known. slowdown: of the others, in times of
    fp32, where it was measured.
    """

    device: Literal["CPU", "GPU"]
    native: tuple[Precision, ...]
    reason: str
    slowdown: dict[Precision, str] = field(default_factory=dict)

    @property
    def has_tf32(self) -> bool:
        """It came with bf16."""
        return self.device == "GPU" and "bf16" in self.native


@dataclass(frozen=True)
class Decision:
    """precision: what all workers compute in. reason: why, in words. warning: what it costs where it is emulated."""

    precision: Precision
    reason: str
    warning: str | None = None


def hardware_of(device: "torch.device") -> Hardware:
    """What this process has on `device`."""
    import torch

    if device.type == "cuda":
        return gpu(torch.cuda.get_device_capability(device))
    return cpu(torch.cpu.get_capabilities(), torch.backends.cpu.get_cpu_capability(), os.environ)


def gpu(capability: tuple[int, int]) -> Hardware:
    """What a GPU of a compute capability has: tensor cores for bf16 from 8.0 on, for fp16 from 7.0 on."""
    native: tuple[Precision, ...] = ("bf16", "fp16", "fp32")
    native = native if capability >= (8, 0) else native[1:] if capability >= (7, 0) else native[2:]
    return Hardware("GPU", native, f"compute capability {capability[0]}.{capability[1]}")


def cpu(features: Mapping[str, Any], vectors: str, environ: Mapping[str, str]) -> Hardware:
    """What a CPU has; fp16 is never preferred there, as it would need a scaler for nothing.

    Args:
        features: as `torch.cpu.get_capabilities` names them.
        vectors: what torch's own kernels use, as `torch.backends.cpu.get_cpu_capability` says.
        environ: where oneDNN and torch may be held to less than the CPU has.
    """
    allowed = _allowed(vectors, environ)
    features_here = [feature for name, feature in FEATURES.items() if features.get(name)]
    used = {precision: name for precision, isa, name in reversed(features_here) if isa in allowed}
    native: list[Precision] = [p for p in ("bf16", "fp32", "fp16") if p in used or p == "fp32"]
    reason = used.get("bf16", "no bf16 arithmetic in this CPU")
    limits = [f"{name}={environ[name]}" for name in LIMITS if environ.get(name)]
    if "bf16" not in used and any(precision == "bf16" for precision, _, _ in features_here) and limits:
        reason = f"{' and '.join(limits)} leaves out this CPU's bf16 arithmetic"
    x86 = features.get("avx2", False)
    slowdown = {} if not x86 else ON_AVX512 if features.get("avx512_f") and "AVX512_CORE" in allowed else ON_AVX2
    return Hardware("CPU", tuple(native), reason, slowdown)


def _allowed(vectors: str, environ: Mapping[str, str]) -> set[str]:
    """Of oneDNN's names those that may be used, and "" for what isn't on x86 and has none."""
    limit = (environ.get("ONEDNN_MAX_CPU_ISA") or environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    allowed = ISAS[: ISAS.index(limit) + 1] if limit in ISAS else ISAS
    if vectors in ("DEFAULT", "NO AVX", "AVX2"):
        allowed = tuple(isa for isa in allowed if not isa.startswith("AVX512"))
    return {"", *allowed}


def decide(setting: str, workers: Sequence[Hardware], kept: str | None = None, *, tf32: bool = False) -> Decision:
    """What a training computes in: the same on every rank, from the same arguments.

    Args:
        setting: train.precision; "auto": what the training began with, and in a new one what all workers have.
        workers: by rank.
        kept: what the training began with, where it is not new.
        tf32: train.tf32, which is told where fp32 is not what it says.
    """
    if setting == "auto" and kept in (None, "auto"):
        best = best_of(workers)
        rank = next(i for i, hardware in enumerate(workers) if hardware.native[0] == best)
        return Decision(best, workers[rank].reason if rank == 0 else f"worker {rank}: {workers[rank].reason}")
    precision = _checked(kept if setting == "auto" else setting)
    reason = "as before" if precision == kept else "as configured"
    if precision == "fp32" and tf32 and any(hardware.has_tf32 for hardware in workers):
        reason += "; products in TF32, of 10 bits: train.tf32=false for all 23"
    return Decision(precision, reason, emulation(precision, workers))


def best_of(workers: Sequence[Hardware]) -> Precision:
    """The first of rank 0's that every worker has."""
    return next(p for p in workers[0].native if all(p in hardware.native for hardware in workers))


def emulation(precision: str, workers: Sequence[Hardware], fix: str = "") -> str | None:
    """A line on what `precision` costs where it is emulated; None where every worker has it in hardware.

    Args:
        fix: what to do about it; else the setting that is quicker.
    """
    emulating = [hardware for hardware in workers if precision not in hardware.native]
    if not emulating:
        return None
    hardware, best = emulating[0], best_of(workers)
    where = f"this {hardware.device}" if len(workers) == 1 else f"{len(emulating)} of {len(workers)} workers"
    where += f" ({hardware.reason})" if hardware.device == "GPU" else ""
    factor = hardware.slowdown.get(_checked(precision))
    cost = f"{factor} times as long as in fp32" if factor else f"longer than in {best}"
    fix = fix or f"set train.precision={best}"
    return f"{precision} is emulated on {where}: a step takes {cost}; {fix}"


def settle(cfg: Config, device: "torch.device") -> Config:
    """The configuration with what a single process on `device` computes in, where it says auto."""
    return with_precision(cfg, decide(cfg.train.precision, [hardware_of(device)]).precision)


def with_precision(cfg: Config, precision: str) -> Config:
    return replace(cfg, train=replace(cfg.train, precision=_checked(precision)))


def _checked(precision: str | None) -> Precision:
    assert precision in get_args(Precision), f"train.precision={precision}: not decided yet"
    return cast(Precision, precision)
