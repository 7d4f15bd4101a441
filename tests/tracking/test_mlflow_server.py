"""A team's MLflow server: on Postgres, with login, artifacts through it; and a run of which nothing else is left."""

import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import mlflow
import pandas as pd
import pytest
from commands import BIN, PIPELINE, ROOT, descendants, differences, kill, loss_series, state_of
from odd_images import as_text
from postgres import binaries, postgres
from s3 import free_port, wait_for_port

from pipeline.runs.manifest import RunManifest
from pipeline.storage import Storage
from pipeline.tracking.mlflow_run import RUN_TAG

SCRIPT = ROOT / "scripts/mlflow_server.sh"
LOGIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "not-a-secret-1"}
NUM_STEPS = 16


@dataclass
class Server:
    uri: str
    pid: int
    database: dict[str, str]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, port = tmp_path_factory.mktemp("server"), free_port()
    with postgres(Path("/tmp", f"pipeline-postgres-{os.getpid()}")) as database:  # where another user gets to
        env = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder),
            "MLFLOW_AUTH_ADMIN_USERNAME": LOGIN["MLFLOW_TRACKING_USERNAME"],
            "MLFLOW_AUTH_ADMIN_PASSWORD": LOGIN["MLFLOW_TRACKING_PASSWORD"],
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "not-a-secret-2",
            "MLFLOW_FOLDER": str(folder),
            "MLFLOW_HOST": "127.0.0.1",
            "MLFLOW_PORT": str(port),
        }
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen([SCRIPT], env=env | database, stdout=log, stderr=log)
        try:
            wait_for_port(port, process, timeout_s=120)
            yield Server(f"http://127.0.0.1:{port}", process.pid, database)
        finally:
            for pid in [process.pid, *descendants(process.pid)]:
                kill(pid)
            process.wait(10)
    shutil.rmtree(Path("/tmp", f"pipeline-postgres-{os.getpid()}"))


@pytest.fixture
def login(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LOGIN.items():
        monkeypatch.setenv(name, value)


def pipeline(*words: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [PIPELINE, *words],
        env={**os.environ, **(LOGIN if env is None else env)},
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )


@pytest.mark.parametrize("missing", ["MLFLOW_FOLDER", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"])
def test_a_setting_that_is_missing_is_named(missing: str, tmp_path: Path) -> None:
    names = (
        "MLFLOW_FOLDER",
        "MLFLOW_AUTH_ADMIN_USERNAME",
        "MLFLOW_AUTH_ADMIN_PASSWORD",
        "MLFLOW_FLASK_SERVER_SECRET_KEY",
    )
    env = {name: f"{tmp_path}/longer" for name in names if name != missing}
    done = subprocess.run([SCRIPT], env=env | {"PATH": os.environ["PATH"]}, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"mlflow_server.sh: {missing} is not set")


def test_a_short_password_is_refused(tmp_path: Path) -> None:
    env = {"MLFLOW_FOLDER": str(tmp_path), "MLFLOW_AUTH_ADMIN_USERNAME": "admin", "MLFLOW_FLASK_SERVER_SECRET_KEY": "x"}
    env |= {"MLFLOW_AUTH_ADMIN_PASSWORD": "short", "PATH": os.environ["PATH"]}
    done = subprocess.run([SCRIPT], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "mlflow_server.sh: MLFLOW_AUTH_ADMIN_PASSWORD is too short; MLflow asks for at least 12 characters\n"
    )


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_without_the_login_nothing_is_told(server: Server) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{server.uri}/api/2.0/mlflow/experiments/search?max_results=1")
    assert refused.value.code == 401
    refused.value.close()
    assert urllib.request.urlopen(f"{server.uri}/health").status == 200
    secrets = ("not-a-secret", server.database["PGPASSWORD"])
    for pid in [server.pid, *descendants(server.pid)]:
        line = Path(f"/proc/{pid}/cmdline").read_text()
        assert not any(secret in line for secret in secrets), line
    wrong = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "wrong"}
    done = pipeline("train", "--resume", "0" * 32, f"mlflow.uri={server.uri}", env=wrong)
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1
    assert "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD" in done.stderr


@pytest.mark.e2e
@pytest.mark.long
@pytest.mark.timeout(400)
def test_a_run_of_which_only_mlflow_is_left_goes_on_bitwise(
    server: Server, digits: Path, tmp_path: Path, login: None
) -> None:
    """Stopped, its storage deleted, resumed elsewhere by its MLflow id; the newest artifact is damaged besides."""
    data = [f"data.train={digits}/train", f"data.val={digits}/val"]
    size = [
        "model.depth=18",
        "train.ema_decay=0.99",
        f"train.steps={NUM_STEPS}",
        "train.log_every=1",
        "train.eval_every=9",
    ]
    own = [f"mlflow.uri={server.uri}", "mlflow.checkpoints=all", "checkpoint.every=5"]
    command = ["train", str(ROOT / "configs/digits.yaml"), *data, *size, *own]
    whole = pipeline(*command, f"run.storage={tmp_path}/whole", "run.name=whole", "mlflow.log_model=false")
    assert whole.returncode == 0, whole.stderr
    first = pipeline(*command, f"run.storage={tmp_path}/first", "run.name=left", "run.stop_at_step=12")
    assert first.returncode == 0, first.stderr
    run_id = run_id_of(server.uri, "left")
    shutil.rmtree(tmp_path / "first")
    damage_the_newest(server.uri, run_id, tmp_path)

    (tmp_path / "taken/left").mkdir(parents=True)
    RunManifest("another training").write(Storage(tmp_path / "taken/left"))
    taken = pipeline("train", "--resume", run_id, f"mlflow.uri={server.uri}", f"run.storage={tmp_path}/taken")
    assert taken.returncode == 2, taken.stderr
    assert (
        f"run.storage={tmp_path}/taken: already has another training named left; use another run.storage"
        in taken.stderr
    )

    resumed = pipeline("train", "--resume", run_id, f"mlflow.uri={server.uri}", f"run.storage={tmp_path}/second")
    assert resumed.returncode == 0, resumed.stderr
    assert "attempt 2: step 10 of 16, resumed from" in resumed.stdout  # 12's is damaged
    assert differences(state_of(tmp_path / "whole/whole"), state_of(tmp_path / "second/left")) == []
    assert run_id_of(server.uri, "left") == run_id
    assert loss_series(server.uri, "left") == loss_series(server.uri, "whole")
    tags = mlflow.MlflowClient(server.uri).get_run(run_id).data.tags
    assert (tags[RUN_TAG], tags["pipeline.attempts"]) == (str(tmp_path / "second/left"), "2")
    (model,) = mlflow.MlflowClient(server.uri).search_logged_models(
        [mlflow.MlflowClient(server.uri).get_run(run_id).info.experiment_id], f"source_run_id = '{run_id}'"
    )
    mlflow.set_tracking_uri(server.uri)
    image = as_text(next((digits / "val").glob("*/*.jpg")).read_bytes())
    answers = mlflow.pyfunc.load_model(model.model_uri).predict(pd.DataFrame({"image": [image, "broken"]}))
    assert (answers["error"] == "").tolist() == [True, False]
    registered = pipeline("register", str(tmp_path / "second/left"), "left", "--json")
    assert registered.returncode == 0, registered.stderr
    assert json.loads(registered.stdout)["model"] == "models:/left/1"
    (registered_version,) = mlflow.MlflowClient(server.uri).search_model_versions("name = 'left'")
    assert registered_version.source == f"models:/{model.model_id}"  # not a second copy

    tags = {RUN_TAG: str(tmp_path / "third/left")}
    bare = mlflow.MlflowClient(server.uri).create_run("0", tags=tags).info.run_id
    lost = pipeline("train", "--resume", bare, f"mlflow.uri={server.uri}")
    assert lost.returncode == 2, lost.stderr
    assert "has no valid checkpoint among its artifacts: mlflow.checkpoints=all uploads each one" in lost.stderr


def run_id_of(uri: str, name: str) -> str:
    """The id of the only MLflow run of this name."""
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs(
        [e.experiment_id for e in client.search_experiments()], f"attributes.run_name = '{name}'"
    )
    return str(run.info.run_id)


def damage_the_newest(uri: str, run_id: str, folder: Path) -> None:
    client = mlflow.MlflowClient(uri)
    assert [a.path for a in client.list_artifacts(run_id, "checkpoints")][-1] == "checkpoints/step_00000012"
    (folder / "state.pt").write_bytes(b"not what meta.json says")
    client.log_artifact(run_id, str(folder / "state.pt"), "checkpoints/step_00000012")


@pytest.mark.e2e
@pytest.mark.timeout(200)
def test_the_database_can_be_backed_up_and_restored(server: Server, tmp_path: Path) -> None:
    """As docs/cluster.md says it; what was deleted meanwhile is there again."""
    mlflow_env = {**os.environ, **LOGIN}
    create = "import mlflow,sys; mlflow.MlflowClient(sys.argv[1]).create_experiment('kept')"
    subprocess.run([BIN / "python", "-c", create, server.uri], env=mlflow_env, check=True)
    address = f"-h 127.0.0.1 -p {server.database['POSTGRES_PORT']} -U mlflow -d mlflow".split()
    env = {**os.environ, "PGPASSWORD": server.database["PGPASSWORD"]}

    def postgres_tool(name: str, *words: str) -> str:
        command = [str(binaries() / name), *address, *words]
        return subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout.strip()

    def number() -> str:
        return postgres_tool("psql", "-Atc", "select count(*) from experiments where name = 'kept'")

    dump = str(tmp_path / "dump")
    postgres_tool("pg_dump", "--format=custom", f"--file={dump}")
    postgres_tool("psql", "-c", "delete from experiments where name = 'kept'")
    assert number() == "0"
    postgres_tool("pg_restore", "--clean", "--if-exists", dump)
    assert number() == "1"
