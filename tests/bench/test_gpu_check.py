"""scripts/gpu_check.sh, on a pretended GPU: what it runs, and that it goes on after parts that fail and hang."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import ROOT
from test_trace_gaps import whole

SCRIPT = str(ROOT / "scripts" / "gpu_check.sh")
QUICK_S = 24

# What stands in for the commands. Each writes its words into $CALLS; $HANGS and $FAILS name what does so.
PIPELINE = f"""#!{sys.executable} -IS
import json, os, pathlib, signal, sys, time
words = sys.argv[1:]
with open(os.environ["CALLS"], "a") as calls:
    calls.write(" ".join(words) + "\\n")
if os.environ.get("HANGS", "-") in words:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print("hanging", flush=True)
    time.sleep(100)
if os.environ.get("FAILS", "-") in words:
    sys.exit("out of memory")
def write(folder, name, value):
    pathlib.Path(folder).mkdir(parents=True)
    pathlib.Path(folder, name).write_text(json.dumps(value))
settings = dict(word.split("=", 1) for word in words if "=" in word)
kind = words[1] if words[0] == "bench" else "run"
if kind == "run":
    folder = settings["run.storage"] + "/" + settings["run.name"]
    write(folder, "summary.json", {{"step": 40, "precision": "bf16", "top1": 0.5}})
else:
    names = {{"step": ["as configured", "model.compile=none"], "train": ["pipeline"], "scale": []}}[kind]
    rows = {{name: {{"images_per_s": 6826.4 - 2000 * i, "ratio": 0.8364}} for i, name in enumerate(names)}}
    write(words[words.index("--out") + 1], kind + ".json", {{"rows": rows, "bound": "host"}})
"""
PYTEST = """#!/bin/sh
echo "pytest $*" >>"$CALLS"
echo "==== 20 passed, 4 skipped in 90.1s ===="
echo "Exception ignored in: a process that ends"
"""
PYTHON = f"""#!/bin/sh
case "$1" in
*/make_photos.py) echo "wrote photographs" ;;
*/mlflow_run.py) mkdir "$3/profile" && cp "$TRACE" "$3/profile/steps_20_24.json.gz" && echo "run 1 is FINISHED" ;;
-m) echo "torch==2.14.1" ;;
*) exec {sys.executable} "$@" ;;
esac
"""


def check(tmp_path: Path, *words: str, **env: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """What became of it, and the words of all calls of `pipeline` and `pytest`."""
    stubs = {"pipeline": PIPELINE, "pytest": PYTEST, "python": PYTHON, "nvidia-smi": "#!/bin/sh\necho 'GPU 0: H200'\n"}
    (tmp_path / "bin").mkdir()
    for name, text in stubs.items():
        (tmp_path / "bin" / name).write_text(text, encoding="utf-8")
        (tmp_path / "bin" / name).chmod(0o755)
    trace, calls = tmp_path / "trace.json", tmp_path / "calls"
    trace.write_text(json.dumps(whole()), encoding="utf-8")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    environ = {**os.environ, "PATH": path, "CALLS": str(calls), "TRACE": str(trace), "TMPDIR": str(tmp_path), **env}
    command = [SCRIPT, *words, str(tmp_path / "out")]
    done = subprocess.run(command, env=environ, text=True, capture_output=True, check=False, timeout=120)
    return done, calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []


def summary(tmp_path: Path) -> dict[str, tuple[str, str]]:
    """Of each part: how it ended, and its figures."""
    _, *lines = (tmp_path / "out" / "summary.txt").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines]
    return {part: (result, figures) for part, _, result, figures in cells}


STEP, BY_CPU = "step_50", "train_50_default_cpu"


def test_a_quick_check_is_of_all_parts(tmp_path: Path) -> None:
    done, calls = check(tmp_path, "--quick", QUICK_S=str(QUICK_S))
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path) == {
        "photos": ("ok", "wrote photographs"),
        STEP: ("ok", "images/s: compiled 6,826, model.compile=none 4,826"),
        "train_50_default_gpu": ("ok", "6,826 images/s, 0.836 of the bare step; bound: host"),
        BY_CPU: ("ok", "6,826 images/s, 0.836 of the bare step; bound: host"),
        "ray_50": ("ok", "40 steps in bf16, top-1 0.5000"),
        "mlflow_50": ("ok", "run 1 is FINISHED"),
        "gaps_50": ("ok", "GPU busy 72.0%, gaps 0.28 of 1.00 ms a step; host launches nothing for 0.98 ms"),
        "tests": ("ok", "20 passed, 4 skipped in 90.1s"),
    }
    step, by_gpu, by_cpu, training, tests = calls
    assert "--try model.compile=none --try model.compile=reduce-overhead --rounds" in step
    assert "data.hw_decoder_load=1" in by_gpu
    assert "data.decode_on_gpu=false" in by_cpu
    assert "train.steps=40 train.profile=[20,24]" in training
    assert all(
        "model.depth=50" in call and "model.compile=default" in call for call in (step, by_gpu, by_cpu, training)
    )
    assert tests.startswith("pytest -m gpu tests/gpu --within=")
    assert list(tmp_path.glob("tmp.*")) == [], "its own folder is gone"


def test_a_quick_check_goes_on_after_parts_that_hang_and_fail(tmp_path: Path) -> None:
    """The hanging one does not heed a request to stop, either."""
    began = time.monotonic()
    done, calls = check(tmp_path, "--quick", QUICK_S=str(QUICK_S), HANGS="step", FAILS="data.decode_on_gpu=false")
    assert time.monotonic() - began < QUICK_S + 5
    assert done.returncode == 1
    ended = summary(tmp_path)
    assert ended[STEP] == ("stopped", "hanging")
    assert ended[BY_CPU] == ("failed (1)", "out of memory")
    assert {result for part, (result, _) in ended.items() if part not in (STEP, BY_CPU)} == {"ok"}
    assert "== step_50: stopped after" in done.stdout
    assert len(calls) == 5


def test_a_whole_check_has_both_depths_and_each_way_of_decoding(tmp_path: Path) -> None:
    done, calls = check(tmp_path, FAILS="scale")
    assert done.returncode == 1
    ended = summary(tmp_path)
    assert {part for part, (result, _) in ended.items() if result != "ok"} == {"scale_50", "scale_152"}
    assert len([part for part in ended if part.startswith("train_152_")]) == 6
    steps = [call for call in calls if call.startswith("bench step")]
    assert len(steps) == 2
    assert all("--try train.precision=fp16" in step for step in steps)
    assert calls[-1] == "pytest -m gpu tests/gpu"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--quik"], "gpu_check: --quik: unknown option; give --quick, or none\n"),
        (["one"], "gpu_check: {out}: one folder takes it all; one is named already\n"),
    ],
)
def test_wrong_words_are_refused_in_a_line(words: list[str], told: str, tmp_path: Path) -> None:
    done, calls = check(tmp_path, *words)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told.format(out=tmp_path / "out"))
    assert calls == []


def test_without_a_gpu_nothing_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, "--quick", str(tmp_path / "out")],
        env={**os.environ, "PATH": f"{tmp_path}:/usr/bin:/bin"},
        text=True,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check: no NVIDIA GPU here")
