"""The driver's environment: what is left out, what is put in its place, and what is told."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from commands import PIPELINE, ROOT

from pipeline import environment
from pipeline.cli import app
from pipeline.environment import driver_environment
from pipeline.errors import UserError

LONG = "x" * 100


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, str]:
    """An environment in which nothing is to be told."""
    (tmp_path / "home").mkdir()
    return {"HOME": str(tmp_path / "home"), "LANG": "en_US.UTF-8", "PATH": "/bin", "USER": "me"}


def test_a_good_environment_stays_and_nothing_is_told(plain: dict[str, str]) -> None:
    of_ray = {
        "RAY_ADDRESS": "head:6379",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "t",
        "RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {"working_dir": "gcs://tree.zip"}}',
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "9",
        "PYTHONPATH": "/tree",
        "PYTHONWARNINGS": "ignore",
        "OMP_NUM_THREADS": "3",
        "CUDA_VISIBLE_DEVICES": "1",
        "NCCL_SOCKET_IFNAME": "eth1",
        "MLFLOW_TRACKING_URI": "http://server:5000",
    }
    made, notes = driver_environment(plain | of_ray)
    assert notes == []
    assert {name: made.get(name) for name in of_ray if name != "RAY_TRAIN_V2_ENABLED"} == {
        name: value for name, value in of_ray.items() if name != "RAY_TRAIN_V2_ENABLED"
    }
    assert {name: value for name, value in made.items() if name not in plain | of_ray} == {
        "PYTHONSAFEPATH": "1",
        "PYTHONUTF8": "1",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ENABLE_AUTO_CONNECT": "0",
        "RAY_TMPDIR": "/tmp",
    }
    assert driver_environment(made) == (made, []), "it is the same a second time"


@pytest.mark.parametrize(
    ("given", "made", "note"),
    [
        ({"PYTHONOPTIMIZE": "2"}, {"PYTHONOPTIMIZE": None}, "PYTHONOPTIMIZE=2 is left out"),
        ({"PYTHONWARNINGS": "error,ignore::UserWarning"}, {"PYTHONWARNINGS": "ignore::UserWarning"}, "PYTHONWARNINGS="),
        ({"PYTHONINSPECT": "1"}, {"PYTHONINSPECT": None}, "PYTHONINSPECT=1"),
        ({"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": None}, "PYTHONIOENCODING=ascii"),
        ({"PYTHONUTF8": "0", "LC_ALL": "C"}, {"PYTHONUTF8": "1", "LC_ALL": None, "LC_CTYPE": "C.UTF-8"}, None),
        ({"LC_ALL": "de_DE.ISO-8859-1"}, {"LC_ALL": None, "LC_CTYPE": "C.UTF-8"}, None),
        ({"LC_ALL": "C.utf8"}, {"LC_ALL": "C.utf8", "LC_CTYPE": None}, None),
        ({"RAY_TRAIN_V2_ENABLED": "0"}, {"RAY_TRAIN_V2_ENABLED": None}, "RAY_TRAIN_V2_ENABLED=0 is left out"),
        ({"RAY_OVERRIDE_RESOURCES": '{"CPU": 1}'}, {"RAY_OVERRIDE_RESOURCES": None}, "RAY_OVERRIDE_RESOURCES="),
        (
            {"RANK": "3", "MASTER_ADDR": "node7", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            {"RANK": None, "MASTER_ADDR": None, "TORCHELASTIC_USE_AGENT_STORE": None},
            "MASTER_ADDR, RANK, TORCHELASTIC_USE_AGENT_STORE: left out",
        ),
        ({"TMPDIR": "/no/such"}, {"TMPDIR": None, "RAY_TMPDIR": "/tmp"}, "TMPDIR=/no/such cannot be written to"),
        ({"TMPDIR": "relative"}, {"TMPDIR": None, "RAY_TMPDIR": "/tmp"}, "TMPDIR=relative cannot be written to"),
        ({"RAY_TMPDIR": "/dev/shm", "TMPDIR": "/tmp"}, {"RAY_TMPDIR": "/dev/shm", "TMPDIR": "/tmp"}, None),
        ({"RAY_TMPDIR": "/no", "TMPDIR": "/var/tmp"}, {"RAY_TMPDIR": "/var/tmp"}, "RAY_TMPDIR=/no cannot be"),
        ({"MLFLOW_TRACKING_URI": "sqlite:///runs.db"}, {"MLFLOW_TRACKING_URI": f"sqlite:///{ROOT}/runs.db"}, None),
        ({"GOOGLE_APPLICATION_CREDENTIALS": "key.json"}, {"GOOGLE_APPLICATION_CREDENTIALS": f"{ROOT}/key.json"}, None),
        ({"PYTHONPATH": f"{ROOT}:lib"}, {"PYTHONPATH": f"{ROOT}:{ROOT}/lib"}, None),
        ({"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1"}, {"RAY_ENABLE_UV_RUN_RUNTIME_ENV": "1"}, None),
    ],
)
def test_what_would_break_a_training_is_left_out(
    plain: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    given: dict[str, str],
    made: dict[str, str | None],
    note: str | None,
) -> None:
    monkeypatch.chdir(ROOT)
    variables, notes = driver_environment(plain | given)
    assert {name: variables.get(name) for name in made} == made
    assert len(notes) == (note is not None)
    assert note is None or notes[0].startswith(note)


def test_an_empty_entry_of_the_python_path_is_not_the_current_directory(
    plain: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    variables, _ = driver_environment(plain | {"PYTHONPATH": ":/mine"})
    assert variables["PYTHONPATH"] == "/mine"


def test_a_long_temporary_directory_is_kept_but_not_for_sockets(plain: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / LONG).mkdir()
    variables, notes = driver_environment(plain | {"TMPDIR": f"{tmp_path}/{LONG}"})
    assert (variables["TMPDIR"], variables["RAY_TMPDIR"]) == (f"{tmp_path}/{LONG}", "/tmp")
    assert [text for text in notes if "too long a path for Ray's sockets; Ray uses /tmp" in text] == notes


def test_without_a_place_for_sockets_the_mend_is_named(
    plain: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "TEMPORARY", ("/none",))
    (tmp_path / LONG).mkdir()
    given = plain | {"TMPDIR": f"{tmp_path}/{LONG}"}
    with pytest.raises(UserError, match=r"TMPDIR=.*: Ray can keep no sockets there.*set RAY_TMPDIR to .* 39 bytes"):
        driver_environment(given)
    assert driver_environment(given, starts_ray=False)[1] == [], "Ray has its sockets where it was started"


def test_ray_s_longest_socket_is_as_long_as_assumed() -> None:
    from ray._private import node

    text = Path(node.__file__).read_text(encoding="utf-8")
    assert 'default_prefix="plasma_store"' in text
    assert len(environment.SOCKET) == len("/ray/session_2026-11-28_14-45-53_519421_4194304/sockets/plasma_store")


@pytest.mark.parametrize("home", ["", "relative", "/no/such/home"])
def test_without_a_home_there_is_a_private_one(
    plain: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, home: str
) -> None:
    def nobody(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr("pwd.getpwuid", nobody)
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    given = {name: value for name, value in plain.items() if name != "USER"} | {"HOME": home, "TMPDIR": str(tmp_path)}
    variables, notes = driver_environment(given)
    made = Path(variables["HOME"])
    assert made == tmp_path / f"pipeline-{os.getuid()}" / "home"
    assert made.stat().st_mode & 0o777 == 0o700
    assert variables["USER"] == variables["LOGNAME"] == str(os.getuid())
    assert len([text for text in notes if text.startswith("HOME=")]) == bool(home)


def test_a_home_that_cannot_be_written_to_stays_for_what_is_in_it(
    plain: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An object store's login lies there, and Ray's token."""
    monkeypatch.setattr(os, "access", lambda place, mode: str(place) != plain["HOME"])
    variables, notes = driver_environment(plain)
    assert variables["HOME"] == plain["HOME"]
    assert Path(variables["XDG_CACHE_HOME"]).is_dir()
    assert variables["XDG_CACHE_HOME"] == variables["MPLCONFIGDIR"]
    assert len(variables["RAY_AUTH_TOKEN"]) == 64
    assert notes == [f"HOME={plain['HOME']} cannot be written to; caches are kept in {variables['XDG_CACHE_HOME']}"]
    Path(plain["HOME"], ".ray").mkdir()
    Path(plain["HOME"], ".ray/auth_token").touch()
    assert "RAY_AUTH_TOKEN" not in driver_environment(plain)[0]


@pytest.mark.parametrize(
    "given",
    [
        {"PYTHONOPTIMIZE": "2"},
        {"PYTHONWARNINGS": "error"},
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    ],
)
def test_a_command_has_an_interpreter_that_reads_utf8(tmp_path: Path, given: dict[str, str]) -> None:
    """`config` shows a path with an é as it was given, in a directory whose files are named as Python's modules."""
    for name in ("random.py", "torch.py", "json.py"):
        (tmp_path / name).write_text("raise SystemExit('the wrong module')", encoding="utf-8")
    words: list[str | bytes] = [PIPELINE, "config", str(ROOT / "configs/digits.yaml"), "data.train=/photos/é".encode()]
    done = subprocess.run(words, capture_output=True, check=False, cwd=tmp_path, env={**os.environ, **given})
    assert done.returncode == 0, done.stderr.decode()
    assert "train: /photos/é\n" in done.stdout.decode()
    assert done.stderr == b""


def test_a_path_in_another_encoding_is_refused_in_one_line(tmp_path: Path) -> None:
    words: list[str | bytes] = [PIPELINE, "config", str(ROOT / "configs/digits.yaml"), b"data.train=/photos/\xe9"]
    done = subprocess.run(words, capture_output=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(rb"pipeline: data\.train=/photos/\\xe9: is not UTF-8.*\n", done.stderr), done.stderr


def test_the_clock_starts_with_the_command(tmp_path: Path) -> None:
    """Not with the process, as which a script may have installed for minutes before it became this one."""
    told = "from pipeline import clock; from pipeline.cli import app; import time; print(clock.BEGAN)"
    script = f"sleep 2; date +%s.%N; exec {sys.executable} -c '{told}'"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, cwd=tmp_path)
    before, began = map(float, done.stdout.split())
    assert 0 <= began - before < 1, "and the command's own imports count"


def test_no_process_s_start_time_is_a_command_s() -> None:
    assert not [path for path in ROOT.glob("pipeline/**/*.py") if "create_time" in path.read_text(encoding="utf-8")]


def test_all_text_has_its_encoding_named() -> None:
    """Else it is the locale's, and a run that one user has made another cannot resume."""
    found = []
    for path in [*ROOT.glob("pipeline/**/*.py"), *ROOT.glob("scripts/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _is_text(node) and "encoding" not in [k.arg for k in node.keywords]:
                found.append(f"{path}:{node.lineno}")
    assert found == []


def _is_text(call: ast.Call) -> bool:
    if ast.unparse(call.func) == "tarfile.open":
        return False
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("read_text", "write_text"):
        return True
    words = [word.value for word in [*call.args, *(k.value for k in call.keywords)] if isinstance(word, ast.Constant)]
    modes = [word for word in words if isinstance(word, str) and re.fullmatch(r"[rwax]\+?t?", word)]
    return name in ("open", "fdopen") and bool(modes)


@pytest.mark.parametrize(("given", "expected"), [(None, "3"), ("1", "1")])
def test_workers_that_lost_nccl_do_not_go_on(given: str | None, expected: str) -> None:
    """Ray would set 1, under which an aborted communicator may return what was never summed."""
    pair = {} if given is None else {"TORCH_NCCL_ASYNC_ERROR_HANDLING": given}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCH_NCCL")}
    code = (
        "import os; from ray.train.torch import config; from pipeline.cluster.trainer import _prepare; "
        "config._set_torch_distributed_env_vars = lambda: None; "
        "_prepare('127.0.0.1', 1, 'gloo', 1); "
        "config.dist.init_process_group = lambda **_: print(os.environ['TORCH_NCCL_ASYNC_ERROR_HANDLING']); "
        "config._setup_torch_process_group('nccl', 0, 1, 'env://', 9)"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**environ, **pair}, text=True, capture_output=True, check=False)
    assert done.stdout.split() == [expected], done.stderr


@pytest.mark.parametrize("kind", ["file", "below a file", "too long", "missing", "relative"])
def test_a_folder_for_kernels_that_cannot_be_used_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    """torch would fail with it, "[Errno 17] File exists", in each attempt, also where nothing is compiled."""
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    folders = {"file": "file", "below a file": "file/kernels", "too long": "x" * 300, "missing": "new/kernels"}
    given = "kernels" if kind == "relative" else str(tmp_path / folders[kind])
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", given)
    assert app.main(["config", str(ROOT / "configs/digits.yaml")]) == 0
    told = capsys.readouterr().err
    if kind in ("missing", "relative"):
        assert told == ""
        assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / given)
    else:
        assert told.startswith(f"warning: TORCHINDUCTOR_CACHE_DIR={given} is no folder that can be written to; ")
        assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
