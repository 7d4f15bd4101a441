"""Whole trainings in environments that users have: any user, any directory, and what other programs left over."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from commands import PIPELINE, ROOT, history
from pyarrow import parquet

NOBODY = 12345
LEFT_OVER = {
    "PYTHONOPTIMIZE": "2",
    "PYTHONWARNINGS": "error",
    "RAY_TRAIN_V2_ENABLED": "0",
    "RAY_OVERRIDE_RESOURCES": '{"CPU": 1}',
    "WORLD_SIZE": "4",
    "RANK": "2",
    "LOCAL_RANK": "2",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "http_proxy": "http://127.0.0.1:9",
    "HOME": "/no/such/home",
}
NOT_UTF8 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def command(digits: Path, *settings: str) -> list[str]:
    short = ["model.depth=18", "train.steps=5", "mlflow.log_model=false", "mlflow.report=false"]
    data = [f"data.train={digits}/train", f"data.val={digits}/val"]
    return [PIPELINE, "train", str(ROOT / "configs/digits.yaml"), *data, *short, *settings, "--json"]


def finish(words: list[str], env: dict[str, str], cwd: Path) -> tuple[int, dict[str, Any], str]:
    """Exit code, what it told programs, what it told people."""
    done = subprocess.run(words, text=True, capture_output=True, check=False, timeout=200, env=env, cwd=cwd)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_what_others_left_over_stops_no_training(digits: Path, tmp_path: Path) -> None:
    """And none of it costs another try: variables, a current directory with names of modules, a long TMPDIR, an é."""
    here, temporary = tmp_path / "here", tmp_path / ("x" * 100)
    (here / "pipeline").mkdir(parents=True)
    temporary.mkdir()
    for name in ("random.py", "torch.py", "pipeline/__init__.py"):
        (here / name).write_text("raise SystemExit('the wrong module')", encoding="utf-8")
    env = {**os.environ, **LEFT_OVER, **NOT_UTF8, "TMPDIR": str(temporary)}
    settings = [f"run.storage={tmp_path}/café", "run.name=odd", "mlflow.uri=sqlite:///here.db"]
    code, summary, said = finish(command(digits, *settings), env, here)
    assert code == 0, said
    assert (summary["attempts"], summary["step"]) == (1, 5)
    assert "failure" not in said
    for note in ("TORCHELASTIC_USE_AGENT_STORE", "RAY_TRAIN_V2_ENABLED=0", "HOME=/no/such/home", "Ray uses /tmp"):
        assert said.count(note) == 1, said
    assert history(f"sqlite:///{here}/here.db", "odd", "val/top1"), "beside the command, not beside the workers"
    # What one locale has written another one reads.
    latin = env | {"LC_ALL": "en_US.ISO-8859-1"}
    code, scores, said = finish([PIPELINE, "evaluate", f"{tmp_path}/café/odd", "--json"], latin, here)
    assert (code, scores.get("top1")) == (0, summary["top1"]), said


def as_nobody(words: list[str]) -> list[str]:
    """A command of a user without a passwd entry, to whom root's home shows nothing but its Pythons."""
    pythons = Path(sys.base_prefix)
    hide = "set -e; "
    if pythons.is_relative_to("/root"):
        hide += f"mount --make-rprivate /; d=$(mktemp -d); mount --bind {pythons} $d; "
        hide += f"mount -t tmpfs -o mode=755 none /root; mkdir -p {pythons}; mount --bind $d {pythons}; "
    run = f'exec setpriv --reuid {NOBODY} --regid {NOBODY} --clear-groups "$@"'
    return ["unshare", "--mount", "bash", "-c", hide + run, "bash", *words]


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_user_without_an_entry_and_a_home_trains_from_parquet(digits: Path, tmp_path: Path) -> None:
    """As `docker run --user 12345` and OpenShift start containers."""
    if os.getuid() != 0 or subprocess.run(as_nobody([sys.executable, "-c", "import ray"]), check=False).returncode != 0:
        pytest.skip("needs root, and a Python that any user can read, to run as another user")
    place = Path("/tmp", f"pipeline-nobody-{uuid.uuid4().hex[:8]}")  # pytest's own directories are root's alone
    place.mkdir()
    try:
        images = sorted(digits.glob("val/*/*"))
        data = [{"image": {"bytes": path.read_bytes()}, "label": int(path.parent.name)} for path in images]
        parquet.write_table(pa.Table.from_pylist(data), place / "images.parquet")
        os.chown(place, NOBODY, NOBODY)
        gone = ["HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "TERM", "LANG"]
        gone += [
            "TORCHINDUCTOR_CACHE_DIR"
        ]  # torch sets it to this user's, in any process that has imported its compiler
        env = {name: value for name, value in os.environ.items() if name not in gone}
        words = command(digits, f"run.storage={place}/runs", f"data.train={place}", f"data.val={place}")
        code, summary, said = finish(as_nobody(words), env, Path("/"))
        assert (code, summary.get("step")) == (0, 5), said
        assert "warning" not in said
    finally:
        shutil.rmtree(place)
        shutil.rmtree(f"/tmp/pipeline-{NOBODY}", ignore_errors=True)


@pytest.fixture
def small() -> Iterator[Path]:
    """A cgroup of version 1 with 1 GB of memory."""
    folder = Path("/sys/fs/cgroup/memory", f"pipeline-test-{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(10**9), encoding="utf-8")
    except OSError as e:
        pytest.skip(f"no cgroup can be made here: {e}")
    yield folder
    folder.rmdir()


def test_too_little_memory_is_named_before_anything_starts(digits: Path, tmp_path: Path, small: Path) -> None:
    words = command(digits, f"run.storage={tmp_path}/runs")
    enter = ["bash", "-c", f'echo $$ >{small}/cgroup.procs; exec "$@"', "bash"]
    code, told, said = finish([*enter, *words], dict(os.environ), tmp_path)
    assert (code, told["status"]) == (2, "wrong")
    assert said.startswith("pipeline: cluster.workers=2: there are 1.0 GB of memory here, and that takes 3.0 GB")
    assert said.count("\n") == 1
