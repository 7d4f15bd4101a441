"""Jobs on a cluster: what is refused before anything is sent; and on a real one, with a token, from outside."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from commands import BIN, PIPELINE, ROOT, loss_series, trainings
from nodes import AUTHENTICATION, Cluster
from s3 import free_port

from pipeline.cli import app
from pipeline.cluster.jobs import submission
from pipeline.config.loading import load
from pipeline.errors import UserError

ABSOLUTE = ["run.storage=/storage/runs", "data.train=/data/train", "data.val=/data/val"]
NUM_STEPS = 2000  # more than the commands below take


def on_a_cluster(test: Any) -> Any:
    return pytest.mark.e2e(pytest.mark.timeout(300)(test))


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working tree with a configuration, which is the current folder."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/pets.yaml").write_text("model: {depth: 18}\n")
    (tmp_path / ".gitignore").write_text("big/\n*.log\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_job_has_its_run_s_name_on_its_command_line(tree: Path) -> None:
    config = str(tree / "configs/pets.yaml")
    named = submission.plan(config, [*ABSOLUTE, "run.name=pets", "train.epochs=30"], ["A", "B"], image=False)
    assert named.entrypoint == (
        "exec pipeline train --needs A --needs B configs/pets.yaml run.storage=/storage/runs data.train=/data/train "
        "data.val=/data/val train.epochs=30 run.name=pets"
    )
    assert (named.run, named.tree) == ("pets", tree)
    unnamed = submission.plan(config, [*ABSOLUTE, "data.train=s3://b/{000..146}.tar"], [], image=False)
    assert re.fullmatch(r"pets-\d{8}-\d{6}", unnamed.run)
    assert "'data.train=s3://b/{000..146}.tar'" in unnamed.entrypoint
    assert unnamed.entrypoint.endswith(f" run.name={unnamed.run}")
    image = submission.plan("conf/there.yaml", ["run.name=7"], [], image=True)
    assert (image.entrypoint, image.tree) == ("exec pipeline train conf/there.yaml run.name=7", None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ([*ABSOLUTE, "train.epoch=3"], "train.epoch=3: no such key; did you mean train.epochs?"),
        (ABSOLUTE[1:], "run.storage=runs: means nothing on a cluster; give an absolute path"),
        ([*ABSOLUTE, "data.train=photos"], "data.train=photos: means nothing on a cluster"),
        ([*ABSOLUTE, "data.cache_dir=cache"], "data.cache_dir=cache: means nothing on a cluster"),
        ([*ABSOLUTE, "mlflow.uri=sqlite:///runs.db"], "mlflow.uri=sqlite:///runs.db: means nothing on a cluster"),
        ([*ABSOLUTE, "cluster.address=head:6379"], "cluster.address=head:6379: leave it out"),
    ],
)
def test_what_means_nothing_on_a_cluster_is_refused(tree: Path, settings: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        submission.plan("configs/pets.yaml", settings, [], image=False)


def test_settings_for_an_image_are_checked_as_far_as_they_are_known(tree: Path) -> None:
    for word in ("run.storage=runs", "run.storage=s3://KEY:hush@bucket/runs", "run.name=../x"):
        with pytest.raises(UserError) as error:
            submission.plan("conf/there.yaml", [word], [], image=True)
        assert "hush" not in str(error.value)


def test_only_a_small_tree_with_the_configuration_is_sent(
    tree: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "pets.yaml"
    shutil.copy("configs/pets.yaml", elsewhere)
    (tree / "big").mkdir()
    for ignored in (tree / "big/pets.yaml", tree / ".venv"):
        ignored.parent.mkdir(exist_ok=True)
    shutil.copy("configs/pets.yaml", "big")
    for config in (str(elsewhere), "big/pets.yaml"):
        with pytest.raises(UserError, match="is not in what is sent, the folder"):
            submission.plan(config, ABSOLUTE, [], image=False)
    monkeypatch.setattr(submission, "MAX_TREE_MB", 1)
    (tree / "photos").mkdir()
    for name in ("big/x", "photos/a.log", "photos/a", "photos/b"):
        (tree / name).write_bytes(bytes(700_000))
    with pytest.raises(UserError, match=r"has 1 MB, and at most 1 MB are sent; the largest is photos, 1 MB"):
        submission.plan("configs/pets.yaml", ABSOLUTE, [], image=False)
    (tree / "photos/b").unlink()
    assert submission.plan("configs/pets.yaml", ABSOLUTE, [], image=False).tree == tree


@pytest.mark.parametrize(
    ("key", "value", "refused"),
    [
        ("run.storage", "s3://KEY:hush@bucket/runs", True),
        ("run.storage", "s3://KEY:hu/sh@bucket/runs", True),  # AWS's secrets have slashes
        ("mlflow.uri", "http://user:hush@host:5000", True),
        ("mlflow.uri", "http://user:12345@host:5000", True),
        ("mlflow.uri", "postgresql+psycopg2://user:hush@host/db", True),
        ("data.train", "https://user:hush@host/train-{000..146}.tar", True),
        ("data.val", "S3://KEY:hush@bucket/val", True),
        ("run.storage", "s3://bucket/runs@home:1/a@b", False),
        ("data.train", "http://host:8080/a@b/train", False),
        ("data.train", "http://[::1]:8080/a@b/train", False),
        ("mlflow.uri", "postgresql://user@host/db", False),  # with $PGPASSWORD
    ],
)
def test_a_login_in_a_uri_is_refused_and_not_repeated(key: str, value: str, refused: bool) -> None:
    settings = ["data.train=/a", "data.val=/b", f"{key}={value}"]
    if not refused:
        load(None, settings)
        return
    with pytest.raises(UserError, match=f"^{key}: leave the login out of it.*MLFLOW_TRACKING_PASSWORD") as error:
        load(None, settings)
    assert "hush" not in str(error.value)
    assert "hu/sh" not in str(error.value)


def test_a_training_that_needs_a_secret_does_not_start_without_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HUB_TOKEN", raising=False)
    assert app.main(["train", "--needs", "HUB_TOKEN", "configs/none.yaml"]) == 2
    assert "HUB_TOKEN: not set in the environment here" in capsys.readouterr().err
    assert app.main(["submit", "--secret", "HUB_TOKEN=hush", "configs/none.yaml"]) == 2
    err = capsys.readouterr().err
    assert "give the name of an environment variable, without its value" in err
    assert "hush" not in err


@pytest.mark.parametrize(
    ("address", "code", "message"),
    [
        (None, 2, "name the cluster: --address http://HEAD:8265"),
        ("ray://head:10001", 2, "--address ray://head:10001: give the URL of Ray's dashboard"),
        ("head:8265", 2, "--address head:8265: give the URL of Ray's dashboard"),
        ("http://127.0.0.1:9", 1, "http://127.0.0.1:9 does not answer"),
    ],
)
def test_a_wrong_address_is_told_in_one_line(
    address: str | None,
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in AUTHENTICATION.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", address or "")
    assert app.main(["jobs"]) == code
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_stop_wants_a_job_or_all(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["pets", "--all"]):
        assert app.main(["stop", *words]) == 2
        assert "name one job, such as: pipeline stop pets; or --all" in capsys.readouterr().err


class Relay:
    """A way to a port of this machine that can be cut, as a port-forward can."""

    def __init__(self, port: int):
        self._to, self.port = port, free_port()
        self._open: list[socket.socket] = []

    def start(self) -> None:
        self._open = [socket.create_server(("127.0.0.1", self.port))]
        threading.Thread(target=self._accept, args=(self._open[0],), daemon=True).start()

    def _accept(self, server: socket.socket) -> None:
        try:
            while True:
                pair = [server.accept()[0], socket.create_connection(("127.0.0.1", self._to))]
                self._open += pair
                for a, b in (pair, pair[::-1]):
                    threading.Thread(target=self._pass_on, args=(a, b), daemon=True).start()
        except OSError:
            return  # cut

    @staticmethod
    def _pass_on(a: socket.socket, b: socket.socket) -> None:
        try:
            while data := a.recv(65536):
                b.sendall(data)
            b.shutdown(socket.SHUT_WR)
        except OSError:
            return  # cut

    def cut(self) -> None:
        for connection in self._open:
            with suppress(OSError):  # the other end may have gone
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


class Outside:
    """A machine outside of the cluster, with the token and a working tree of its own."""

    def __init__(self, url: str, port: int, folder: Path, digits: Path):
        self.url, self.port, self.storage = url, port, folder / "runs"
        self.tree, self.imports = folder / "tree", folder / "imports"
        self.imports.mkdir()
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "pipeline", self.tree / "pipeline", ignore=ignore)
        shutil.copytree(ROOT / "configs", self.tree / "configs")
        tell = f"import os, pathlib\npathlib.Path('{self.imports}', str(os.getpid())).write_text(__file__ + ' ' + "
        with (self.tree / "pipeline/__init__.py").open("a") as file:
            file.write(tell + "pathlib.Path('/proc/self/cmdline').read_text())\n")
        data = [f"data.train={digits}/train", f"data.val={digits}/val", f"run.storage={self.storage}"]
        short = [
            "model.depth=18",
            f"train.steps={NUM_STEPS}",
            "train.log_every=1",
            "train.eval_every=9",
            "mlflow.log_model=false",
        ]
        self.settings = [*data, *short, "checkpoint.every=1000"]
        self.env = {**AUTHENTICATION, "RAY_API_SERVER_ADDRESS": url}

    def call(self, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        environment = {**os.environ, **self.env, **env}
        return subprocess.run(
            [PIPELINE, *words], cwd=self.tree, env=environment, text=True, capture_output=True, check=False, timeout=120
        )

    def raw_jobs(self) -> Any:
        """All that the cluster tells of its jobs."""
        token = {"Authorization": f"Bearer {AUTHENTICATION['RAY_AUTH_TOKEN']}"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/api/jobs/", headers=token)) as answer:
            return json.load(answer)

    def jobs(self) -> dict[str, dict[str, Any]]:
        return {job["job"]: job for job in json.loads(self.call("jobs", "--json").stdout)}


@pytest.fixture(scope="module")
def outside(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outside]:
    """A head that takes jobs, and a node with room for two workers."""
    port = free_port()
    options = ["--include-dashboard=true", "--dashboard-host=127.0.0.1", f"--dashboard-port={port}"]
    env = {"PATH": f"{BIN}:{os.environ['PATH']}", "HUB_TOKEN": "hush"}
    with ExitStack() as stack:
        cluster = Cluster(free_port(), dashboard=(*options, f"--dashboard-agent-listen-port={free_port()}"), env=env)
        stack.callback(cluster.stop)
        cluster.add(num_cpus=2)
        yield Outside(f"http://127.0.0.1:{port}", port, tmp_path_factory.mktemp("outside"), digits)


@on_a_cluster
def test_without_the_token_nothing_is_told(outside: Outside) -> None:
    for headers, status in (({}, 401), ({"Authorization": "Bearer wrong"}, 403)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{outside.url}/api/jobs/", headers=headers))
        assert refused.value.code == status
        refused.value.close()
    submit = ["submit", "configs/digits.yaml", *outside.settings, "run.name=nobody"]
    for env in ({"RAY_AUTH_TOKEN": "wrong" * 8}, {"RAY_AUTH_MODE": "disabled"}):
        done = outside.call(*submit, **env)
        assert done.returncode == 2, done.stderr
        assert re.fullmatch(r"pipeline: .*set RAY_AUTH_MODE=token, .* ~/\.ray/auth_token\n", done.stderr)
    assert outside.call(*submit, RAY_AUTH_TOKEN="", HOME="/nonexistent").returncode == 2
    assert "nobody" not in outside.jobs()


@on_a_cluster
def test_what_only_the_job_can_know_has_its_code_and_line(outside: Outside) -> None:
    """Of --image too: the path is one where the cluster's processes started."""
    done = outside.call("submit", "--image", "nowhere/pets.yaml", "run.storage=/tmp/x", "run.name=odd")
    assert done.returncode == 2, done.stdout
    assert "pipeline: no config file nowhere/pets.yaml" in done.stdout
    done = outside.call("submit", "--secret", "ABSENT", "--json", "configs/digits.yaml", *outside.settings)
    assert done.returncode == 2
    result = json.loads(done.stdout)
    assert (result["status"], result["run"]) == ("failed", result["job"])
    assert "ABSENT: not set in the environment here" in result["why"]
    assert result["why"] in done.stderr
    assert done.stderr.count("\tINFO ") == 1  # Ray's only own line is the log's first


@on_a_cluster
def test_followed_cut_off_stopped_and_resumed_each_step_is_trained_once(outside: Outside) -> None:
    submit = ["submit", "--secret", "HUB_TOKEN", "configs/digits.yaml", *outside.settings, "run.name=pets"]
    relay = Relay(outside.port)
    relay.start()
    with trainings(outside.tree) as start:
        follower = start([PIPELINE, *submit, "--address", f"http://127.0.0.1:{relay.port}"], outside.env)
        follower.wait_for_step(3)
        relay.cut()
        follower.wait_for("lost the connection to http://127.0.0.1:")
        relay.start()
        busy = outside.call(*submit)
        assert busy.returncode == 2
        assert "run.name=pets: is being trained by job pets, RUNNING; pipeline stop pets stops it" in busy.stderr
        assert (outside.jobs()["pets"]["status"], outside.jobs()["pets"]["run"]) == ("RUNNING", "pets")
        stopped = outside.call("stop", "pets")
        assert stopped.returncode == 0, stopped.stderr
        message = re.fullmatch(r"job pets: STOPPED, interrupted at step (\d+) of \d+, (\S+)\n", stopped.stdout)
        assert message is not None, stopped.stdout
        assert follower.finish() == 130, follower.said
        relay.cut()
        step = int(message[1])
        assert message[2] == f"{outside.storage}/pets/checkpoints/step_{step:08d}"
        steps = [int(n) for n in re.findall(r"^step (\d+)/", follower.said, re.MULTILINE)]
        assert steps == list(range(1, step + 1))  # no line twice, none lost
        assert outside.call("stop", "pets").stdout == stopped.stdout
        unknown = outside.call("stop", "pest")
        assert (unknown.returncode, unknown.stderr) == (2, "pipeline: no job pest (did you mean pets?)\n")

        last = step + 30
        # What is started in the background ignores Ctrl-C, and so would its children.
        interactive = ["env", "--default-signal=INT"]
        follower = start([*interactive, PIPELINE, *submit, f"run.stop_at_step={last}"], outside.env)
        follower.wait_for(rf"attempt 2: step {step} of .*, resumed from .*step_{step:08d}; 2 workers")
        follower.process.send_signal(signal.SIGINT)
        assert follower.finish() == 130, follower.said
        assert (
            f"job pets-2 goes on; pipeline jobs --follow pets-2 --address {outside.url} shows its log" in follower.said
        )
    done = outside.call("jobs", "--follow", "pets", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["job"] == "pets-2"
    assert f" at step {last} of {NUM_STEPS}" in done.stderr
    losses = loss_series(f"sqlite:///{outside.storage}/mlflow.db", "pets")
    assert [step for step, _ in losses] == list(range(1, last + 1))
    assert outside.call("stop", "--all").stdout == "no job is active\n"

    table = outside.call("jobs").stdout.splitlines()
    assert table[0].split() == ["JOB", "STATUS", "RUN", "STARTED", "TOOK"]
    assert re.match(r"pets-2  +SUCCEEDED  pets  +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  0:\d\d:\d\d$", table[-1])
    shown = json.dumps(outside.raw_jobs())
    assert "HUB_TOKEN" in shown
    assert "hush" not in shown


@on_a_cluster
def test_all_processes_of_a_job_import_the_tree_that_was_sent(outside: Outside) -> None:
    """Of the jobs above."""
    commands = [file.read_text().replace("\0", " ") for file in outside.imports.iterdir()]
    for process in ("pipeline train", "pipeline.cluster.driver", "RayTrainWorker"):
        of_it = [text for text in commands if process in text]
        assert of_it, (process, commands)
        assert all("/_ray_pkg_" in text.split()[0] for text in of_it), of_it
