"""The container image: built without a Docker daemon, looked through, and run as on Kubernetes: read-only, no root."""

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import ROOT
from s3 import free_port, wait_for_port

pytestmark = [pytest.mark.e2e, pytest.mark.long, pytest.mark.timeout(1500)]

TOOLS = ("buildah", "debootstrap", "unshare")
NEEDED_BYTES = 40 * 2**30
USER = 1000
CA = "etc/ssl/certs/ca-certificates.crt"
# What may not be in it: names of commands, and of files and folders.
COMPILER = re.compile(r"(.*-)?(g\+\+|c\+\+|clang(\+\+)?|nvcc)(-[\d.]+)?")  # but for C's
LEFTOVERS = {".git", ".bash_history", ".python_history", ".cache", ".venv", "pip.conf"}
WRITABLE = {"tmp", "dev/shm"}  # a container has a /dev of its own

# Before what is to run: the image as its root, read-only; all else as Kubernetes gives it to a container.
AS_ON_KUBERNETES = """
set -e
mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"
mount -t tmpfs tmpfs "$1/tmp" && chmod 1777 "$1/tmp"
mount -t proc proc "$1/proc" && mount --rbind /dev "$1/dev" && mount --bind -o ro /sys "$1/sys"
ip link set lo up
exec chroot --userspec=1000:1000 "$1" /usr/bin/env -i "${@:3}" /bin/sh -c "cd /app && $2"
"""


class Image:
    """The built image, its files below `root`. about: as OCI has it. indexes: of packages, for the build alone."""

    def __init__(self, root: Path, about: dict[str, Any], indexes: list[str]):
        self.root, self.about, self.indexes = root, about, indexes

    def run(self, command: str) -> str:
        """Run a shell command in a container."""
        environment = self.about["config"]["Env"]
        inside = ["unshare", "--mount", "--pid", "--net", "--kill-child", "bash", "-c", AS_ON_KUBERNETES, "-"]
        done = subprocess.run(
            [*inside, str(self.root), command, *environment], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@contextmanager
def pip_conf(folder: Path) -> Iterator[Path]:
    """This machine's configuration of pip; what it finds in folders here goes over HTTP, for a build to see it."""
    said = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    pairs = (line.split("=", 1) for line in said.stdout.splitlines())
    given = {key.rpartition(".")[2]: value.strip("'") for key, value in pairs}
    port, lines, served = free_port(), ["[global]"], folder / "served"
    served.mkdir()
    for name in ("index-url", "extra-index-url", "find-links"):
        places = given.get(name, "").replace("file://", "").split()
        for number, place in enumerate(places):
            if place.startswith("/"):
                link = served / f"{name}-{number}"
                link.symlink_to(Path(place).parent)  # an index has its files beside it
                places[number] = f"http://127.0.0.1:{port}/{link.name}/{Path(place).name}/"
        lines += [f"{name} = {' '.join(places)}"] if places else []
    (folder / "pip.conf").write_text("\n".join(lines) + "\n")
    command = [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(served)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port, server)
        yield folder / "pip.conf"
    finally:
        server.kill()
        server.wait(10)


def call(*words: str | Path) -> str:
    began = time.monotonic()
    done = subprocess.run([str(w) for w in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}\n{done.stdout[-3000:]}{done.stderr[-3000:]}"
    print(f"{time.monotonic() - began:.0f} s: {' '.join(map(str, words))}")
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Image]:
    if os.geteuid() != 0:
        pytest.skip("building an image without a daemon needs root here")
    if missing := [tool for tool in TOOLS if shutil.which(tool) is None]:
        pytest.skip(f"no {missing[0]} on this machine")
    folder = tmp_path_factory.mktemp("image")
    if shutil.disk_usage(folder).free < NEEDED_BYTES:
        pytest.skip(f"less than {NEEDED_BYTES >> 30} GB of disk are free in {folder}")
    # Layers pass through TMPDIR: gigabytes, which are to go with the folder.
    buildah = ("env", f"TMPDIR={folder}", "buildah", "--root", folder / "root", "--runroot", folder / "run")
    with ExitStack() as cleanup:
        cleanup.callback(shutil.rmtree, folder)
        # As python:3.11-slim-bookworm, but Debian's Python.
        base = folder / "base"
        call("debootstrap", "--variant=minbase", "--include=python3-venv,python3-dev,ca-certificates", "bookworm", base)
        shutil.copy(f"/{CA}", base / CA)
        container = call(*buildah, "from", "scratch")
        cleanup.callback(call, *buildah, "rm", "--all")
        call(*buildah, "copy", "--quiet", container, base, "/")
        call(*buildah, "commit", "--quiet", container, "base")
        with pip_conf(folder) as conf:
            indexes = re.findall(r"https?://\S+", conf.read_text())
            options = ["--isolation", "chroot", "--build-arg", "BASE=localhost/base", "--secret", f"id=pip,src={conf}"]
            call(*buildah, "bud", *options, "--tag", "pipeline", ROOT)
        container = call(*buildah, "from", "pipeline")
        about = json.loads(call(*buildah, "inspect", "--type", "image", "pipeline"))["OCIv1"]
        yield Image(Path(call(*buildah, "mount", container)), about, indexes)


def test_its_configuration(image: Image) -> None:
    about = image.about["config"]
    assert (about["User"], about["WorkingDir"]) == ("1000:1000", "/app")
    assert "Healthcheck" not in about
    assert {"HOME=/tmp", "PYTHONUNBUFFERED=1", "RAY_AUTH_MODE=token", "RAY_USAGE_STATS_ENABLED=0"} <= set(about["Env"])
    assert "NVIDIA_DRIVER_CAPABILITIES=compute,utility,video" in about["Env"]
    labels = {name.removeprefix("org.opencontainers.image."): value for name, value in about["Labels"].items()}
    assert {"title", "description", "version", "licenses", "revision"} <= labels.keys()
    assert labels["version"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_its_files(image: Image) -> None:
    """Nothing that raises rights, nothing to build with, nothing left over, and nothing that its user could change."""
    found = []
    for folder, folders, files in os.walk(image.root):
        for path in (Path(folder) / name for name in (*folders, *files)):
            inside, about = path.relative_to(image.root), path.lstat()
            is_file, is_folder = stat.S_ISREG(about.st_mode), stat.S_ISDIR(about.st_mode)
            mine = about.st_uid == USER or about.st_gid == USER or about.st_mode & stat.S_IWOTH
            if is_file and about.st_mode & (stat.S_ISUID | stat.S_ISGID):
                found.append(f"/{inside} raises rights")
            elif (
                path.name in LEFTOVERS or str(inside) == "app/runs" or (not is_folder and COMPILER.fullmatch(path.name))
            ):
                found.append(f"/{inside}")
            elif mine and (is_file or is_folder) and str(inside) not in WRITABLE:
                found.append(f"/{inside} can be written to")
    assert found == []
    for empty in ("tmp", "root/.cache", "var/lib/apt/lists", "var/cache/apt", "var/log"):
        assert not [p for p in (image.root / empty).rglob("*") if p.is_file()], empty


# What Triton does for each kernel, with an extension of Python of its own making.
EXTENSION = """
import importlib.util, pathlib, tempfile
from triton.runtime.build import _build
from pipeline.training.compilation import missing_tool
import torch
assert not missing_tool(torch.device("cuda")), missing_tool(torch.device("cuda"))
code = r'''
#include <Python.h>
static PyObject *answer(PyObject *self, PyObject *args) { return PyLong_FromLong(42); }
static PyMethodDef methods[] = {{"answer", answer, METH_NOARGS, ""}, {NULL, NULL, 0, NULL}};
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "ext", NULL, -1, methods};
PyMODINIT_FUNC PyInit_ext(void) { return PyModule_Create(&module); }
'''
folder = tempfile.mkdtemp()
source = pathlib.Path(folder, "ext.c")
source.write_text(code)
spec = importlib.util.spec_from_file_location("ext", _build("ext", str(source), folder, [], [], [], []))
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.answer())
"""


def test_kernels_can_be_compiled_in_it(image: Image) -> None:
    (image.root / "app/extension.py").write_text(EXTENSION)
    try:
        assert image.run("python extension.py").strip().endswith("42")
    finally:
        (image.root / "app/extension.py").unlink()


def test_nccl_can_open_what_rdma_needs(image: Image) -> None:
    """By the names that NCCL gives to dlopen; libibverbs finds a card's driver by its file in libibverbs.d."""
    names = ["libibverbs.so.1", "libmlx5.so.1"]
    image.run(f"""python -c 'import ctypes; [ctypes.CDLL(name) for name in {json.dumps(names)}]'""")
    assert image.run("ls /etc/libibverbs.d/mlx5.driver /usr/lib/*/libibverbs/libmlx5-*.so")


def test_nothing_of_the_machine_that_built_it_is_left(image: Image) -> None:
    for index in image.indexes:
        assert index not in json.dumps(image.about)
        search = ["grep", "-rF", index, "app", "etc", "root"]
        assert subprocess.run(search, cwd=image.root, capture_output=True, text=True, check=False).stdout == ""


def test_what_kuberay_and_the_manifests_call(image: Image) -> None:
    for command in ("bash --version", "wget --version", "ray --version", "pipeline --help", "mlflow server --help"):
        image.run(command)
    assert image.run("id -u && id -g").split() == ["1000", "1000"]
    assert image.run("touch /app/x /opt/venv/x 2>&1; ls /app").split() == [
        *("touch:", "cannot", "touch", "'/app/x':", "Read-only", "file", "system"),
        *("touch:", "cannot", "touch", "'/opt/venv/x':", "Read-only", "file", "system"),
        *("configs", "scripts"),
    ]


# A head, as KubeRay starts it, and what ends one: preStop, then SIGTERM for the container's first process.
HEAD = r"""
export RAY_AUTH_TOKEN=0123456789abcdef RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=10 RAY_ADDRESS=http://127.0.0.1:8265
is_up() { kill -0 $head || { cat /tmp/head; exit 1; }; }
start="ray start --head --dashboard-host=0.0.0.0 --num-cpus=2 --object-store-memory=90000000 --block"
bash -c -- "ulimit -n 65536; $start" >/tmp/head 2>&1 & head=$!
until wget -q -O /dev/null $RAY_ADDRESS/api/gcs_healthz; do sleep 0.5; is_up; done
end_head() {
    timeout 270 bash scripts/pre_stop.sh
    kill -TERM $head
    wait $head || true
}
"""


def test_an_idle_head_ends_at_once(image: Image) -> None:
    """A deleted RayJob's head keeps its room for so long; with Ray's own drain of a node it took 150 s."""
    seconds = int(image.run(f"{HEAD} began=$(date +%s); end_head; echo $(($(date +%s) - began))"))
    print(f"an idle head ended within {seconds} s")
    assert seconds < 60


def test_a_deleted_job_keeps_its_steps(image: Image) -> None:
    """ResNet-152, two workers, on digits made in there. KubeRay stops the job, and 0.2 s later the pod is deleted."""
    data = "data.train=/tmp/digits/train data.val=/tmp/digits/val run.storage=/tmp/runs run.name=demo"
    size = "cluster.workers=2 train.steps=40 train.log_every=1 mlflow.log_model=false"
    train = f"pipeline train configs/digits.yaml --json {data} {size}"
    said = image.run(
        f"""{HEAD}
        python scripts/make_digits.py /tmp/digits >/dev/null
        ray job submit --no-wait --submission-id one -- {train} >/tmp/submitted 2>&1
        until ray job logs one 2>/dev/null | grep -q "^step 2/"; do sleep 1; is_up; done
        ray job stop --no-wait one >/tmp/stopped 2>&1
        sleep 0.2
        end_head
        tr -d '\\n' </tmp/runs/demo/run.json; echo
        ls /tmp/runs/demo/checkpoints
        unset RAY_ADDRESS
        {train}"""
    )
    manifest, checkpoint, resumed = said.splitlines()
    assert json.loads(manifest)["open"] is False
    assert int(checkpoint.removeprefix("step_")) >= 2
    assert json.loads(resumed)["status"] == "done", resumed
