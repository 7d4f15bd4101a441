"""A real Postgres of this machine, with a database and a user for MLflow."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from s3 import free_port

PASSWORD = "not-a-secret-0"


def binaries() -> Path:
    """Where Debian's postgres lies; skips the test where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no Postgres on this machine (Debian: apt-get install postgresql)")
    return found[-1].parent


@contextmanager
def postgres(folder: Path) -> Iterator[dict[str, str]]:
    """Start one in `folder`, and stop it at the end.

    Yields:
        The environment that a client needs, as scripts/mlflow_server.sh does.
    """
    bin_folder, port = binaries(), free_port()
    user = "postgres" if os.geteuid() == 0 else None  # it refuses to run as root
    folder.mkdir()
    password = folder / "password"
    password.write_text(PASSWORD)
    if user:
        for path in (folder, password):
            shutil.chown(path, user)

    def call(*words: str | Path) -> None:
        subprocess.run([str(w) for w in words], user=user, cwd=folder, check=True, capture_output=True)

    data = folder / "data"
    call(bin_folder / "initdb", "-D", data, "-U", "mlflow", "--auth=scram-sha-256", "--pwfile", password)
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder} -c fsync=off"
    call(bin_folder / "pg_ctl", "-D", data, "-o", options, "-l", folder / "log", "-w", "start")
    env = {"POSTGRES_HOST": "127.0.0.1", "POSTGRES_PORT": str(port), "POSTGRES_USER": "mlflow", "PGPASSWORD": PASSWORD}
    address = ["-h", "127.0.0.1", "-p", str(port), "-U", "mlflow"]
    try:
        subprocess.run([bin_folder / "createdb", *address, "mlflow"], env=env, check=True, capture_output=True)
        yield env
    finally:
        call(bin_folder / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
