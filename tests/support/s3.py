"""A real S3 API on this machine: moto's server, in a process of its own."""

import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.storage import Storage

# pyarrow takes these from the environment, in this process and in those that it starts.
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def free_port() -> int:
    """Below those that the kernel gives to whoever asks for any, one of which may be taken the next moment."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as s, suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def wait_for_port(port: int, process: "subprocess.Popen[bytes]", timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert process.poll() is None, "the server has ended"
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.1)


@contextmanager
def s3_storage() -> Iterator[Storage]:
    """A bucket's prefix."""
    from pyarrow.fs import S3FileSystem

    os.environ.update(CREDENTIALS)
    port = free_port()
    quiet = subprocess.DEVNULL
    command = [str(Path(sys.executable).parent / "moto_server"), "-p", str(port)]
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    try:
        wait_for_port(port, server)
        place = f"127.0.0.1:{port}"
        S3FileSystem(endpoint_override=place, scheme="http", allow_bucket_creation=True).create_dir("bucket")
        yield Storage(f"s3://bucket/runs?endpoint_override={place}&scheme=http&region=us-east-1")
    finally:
        server.kill()
        server.wait(10)
        for name in CREDENTIALS:
            os.environ.pop(name, None)
