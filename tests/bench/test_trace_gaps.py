"""scripts/trace_gaps.py: the gaps of the GPU and of the threads that launch, on a trace made by hand."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT

SCRIPT = str(ROOT / "scripts" / "trace_gaps.py")
TRAINING, AUTOGRAD, DALI, GPU = 1, 2, 9, 0  # threads, and a stream
ZERO_GRAD = "Optimizer.zero_grad#SGD.zero_grad"
OPTIMIZE = "Optimizer.step#SGD.step"
CONVOLVE = "autograd::engine::evaluate_function: ConvolutionBackward0"

Row = tuple[str, str, int, float, float, int | None]  # category, name, thread, from, to (in us), correlation

# Two steps. The second one's kernel is in two parts, 10 us apart, as a graph's are.
HOST: list[Row] = [
    ("user_annotation", "forward", TRAINING, 0, 400, None),
    ("user_annotation", ZERO_GRAD, TRAINING, 0, 10, None),
    ("cuda_runtime", "cudaLaunchKernel", TRAINING, 100, 110, 1),
    ("user_annotation", "backward", TRAINING, 400, 800, None),
    ("cpu_op", CONVOLVE, AUTOGRAD, 480, 600, None),
    ("cuda_driver", "cuLaunchKernelEx", AUTOGRAD, 550, 560, 2),
    ("cuda_runtime", "cudaLaunchKernel", DALI, 700, 705, 9),
    ("user_annotation", "optimizer", TRAINING, 800, 1000, None),
    ("user_annotation", OPTIMIZE, TRAINING, 850, 980, None),
    ("user_annotation", "data wait", TRAINING, 1000, 1100, None),
    ("cuda_runtime", "cudaMemcpyAsync", TRAINING, 1000, 1005, 3),
    ("user_annotation", "forward", TRAINING, 1100, 1500, None),
    ("user_annotation", ZERO_GRAD, TRAINING, 1100, 1110, None),
    ("cuda_runtime", "cudaEventSynchronize", TRAINING, 1115, 1190, None),
    ("cuda_runtime", "cudaGraphLaunch", TRAINING, 1200, 1210, 4),
    ("user_annotation", "backward", TRAINING, 1500, 1900, None),
    ("user_annotation", "optimizer", TRAINING, 1900, 2000, None),
]
WORK: list[Row] = [
    ("kernel", "conv", GPU, 120, 420, 1),
    ("kernel", "conv_backward", GPU, 570, 720, 2),
    ("kernel", "decode", GPU, 710, 810, 9),
    ("gpu_memcpy", "Memcpy HtoD", GPU, 1010, 1020, 3),
    ("kernel", "conv", GPU, 1220, 1500, 4),
    ("kernel", "conv_backward", GPU, 1510, 2120, 4),
]
# What is no work of the GPU, although it lies on its streams.
OTHER: list[Row] = [
    ("gpu_user_annotation", "forward", GPU, 0, 2200, None),
    ("Trace", "PyTorch Profiler", 0, 0, 3000, None),
]


def trace(rows: list[Row]) -> dict[str, Any]:
    events = [
        {
            "ph": "X",
            "cat": category,
            "name": name,
            "pid": 7,
            "tid": thread,
            "ts": 1e12 + begin,
            "dur": end - begin,
            "args": {} if correlation is None else {"correlation": correlation},
        }
        for category, name, thread, begin, end, correlation in rows
    ]
    return {"schemaVersion": 1, "traceEvents": [*events, {"ph": "M", "name": "process_name", "pid": 7, "ts": 0}]}


def whole() -> dict[str, Any]:
    return trace([*HOST, *WORK, *OTHER])


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SCRIPT, *words], text=True, capture_output=True, check=False, timeout=60)


def test_gaps_are_added_up_per_step_and_by_phase(tmp_path: Path) -> None:
    file = tmp_path / "steps_20_21.json.gz"
    file.write_bytes(gzip.compress(json.dumps(whole()).encode()))
    done = run("--json", str(file))
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {
        "steps": 2,
        "min_gap_us": 20,
        "gpu": {
            "ms_per_step": 1.0,  # 120 to 2120 us
            "busy_share": 0.72,
            "busy_share_without_others": 0.675,  # 90 us are DALI's alone
            "idle_ms_per_step": 0.28,
            "gaps_per_step": 1.5,
            "gap_ms_per_step": 0.275,
        },
        "host": {
            "ms_per_step": 1.0,
            "launches_per_step": 1.5,
            "launching_ms_per_step": 0.015,
            "gaps_per_step": 2.0,
            "gap_ms_per_step": 0.985,
            "gap_ms_per_step_by_phase": {"forward": 0.39, "backward": 0.395, "optimizer": 0.15, "data wait": 0.05},
        },
        "launches_per_step_by_thread": {"1": 1.0, "2": 0.5, "9 (not of the step)": 0.5},
        "longest_gpu_gaps": [
            {"ms": 0.2, "at_ms": 0.69, "phase": "optimizer", "range": OPTIMIZE},
            {"ms": 0.2, "at_ms": 0.9, "phase": "forward", "range": "cudaEventSynchronize"},
            {"ms": 0.15, "at_ms": 0.3, "phase": "backward", "range": CONVOLVE},
        ],
    }


def test_people_read_a_table(tmp_path: Path) -> None:
    file = tmp_path / "steps_20_21.json"
    file.write_text(json.dumps(whole()), encoding="utf-8")
    done = run(str(file), "--min-gap", "180")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[:4] == ["of 2 steps, per step ms", "GPU 1.00", "idle, 28.0% 0.28", "in 1.0 gaps over 180 us 0.20"]
    assert lines[-3:] == [
        "longest gaps of the GPU, ms at ms phase the host was in",
        "0.200 0.69 optimizer Optimizer.step#SGD.step",
        "0.200 0.90 forward cudaEventSynchronize",
    ]


def test_where_threads_of_calls_are_not_those_of_operations_the_busiest_launches(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    moved = [(*row[:2], 100 + row[2], *row[3:]) if row[0].startswith("cuda_") else row for row in HOST]
    file.write_text(json.dumps(trace([*moved, *WORK])), encoding="utf-8")
    result = json.loads(run("--json", str(file)).stdout)
    assert result["launches_per_step_by_thread"] == {
        "101": 1.0,
        "102 (not of the step)": 0.5,
        "109 (not of the step)": 0.5,
    }
    assert result["host"]["launches_per_step"] == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"step 1: 20 ms\n", "{file}: is no trace of torch.profiler"),
        (b'{"traceEvents": 3}', "{file}: is no trace of torch.profiler"),
        (gzip.compress(json.dumps(whole()).encode())[:-20], "{file}: is no trace of torch.profiler"),
        (json.dumps(trace(HOST)).encode(), "no GPU events in {file}: it was recorded on a CPU"),
        (json.dumps(trace(WORK)).encode(), "no steps in {file}: it was not recorded by train.profile"),
        (None, "{file}: No such file or directory"),
    ],
    ids=["text", "other JSON", "cut off", "of a CPU", "of no training", "missing"],
)
def test_what_is_no_trace_of_a_gpus_steps_is_refused_in_a_line(
    content: bytes | None, told: str, tmp_path: Path
) -> None:
    file = tmp_path / "trace.json.gz"
    if content is not None:
        file.write_bytes(content)
    done = run(str(file))
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told.format(file=file) + "\n")
