"""A real MLflow server that can be killed, and a way to it that can be cut, slowed down and broken."""

import http.client
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from commands import descendants, kill
from s3 import wait_for_port


class MlflowServer:
    """`mlflow server` on SQLite; killed and started again it has what it had."""

    def __init__(self, folder: Path, port: int):
        self._folder, self._port = folder, port
        self.uri = f"http://127.0.0.1:{port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(self._port), "--workers", "1"]
        store = ["--backend-store-uri", f"sqlite:///{self._folder}/server.db"]
        artifacts = ["--artifacts-destination", str(self._folder / "artifacts")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen([*command, *store, *artifacts], stdout=log, stderr=log)
        wait_for_port(self._port, self._process)

    def kill(self) -> None:
        if self._process is not None:
            for pid in [self._process.pid, *descendants(self._process.pid)]:
                kill(pid)
            self._process.wait(10)

    def __enter__(self) -> "MlflowServer":
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


Mode = Literal["up", "down", "500", "slow", "mute"]


class Proxy:
    """A way to a server whose `mode` the test sets: "down" hangs up, "500" fails, "slow" takes `delay_s` a call.

    "mute" has the server do what it is asked, and hangs up without an answer.
    """

    def __init__(self, target_port: int, port: int, delay_s: float = 10.0):
        self.mode: Mode = "up"
        self.num_calls = 0
        self.uri = f"http://127.0.0.1:{port}"
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle(self) -> None:
                with suppress(ConnectionError):  # the client was killed
                    super().handle()

            def _forward(self) -> None:
                proxy.num_calls += 1
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if proxy.mode == "down":
                    self.close_connection = True
                    return
                if proxy.mode == "slow":
                    time.sleep(delay_s)
                if proxy.mode == "500":
                    self._answer(500, b"broken", {})
                    return
                server = http.client.HTTPConnection("127.0.0.1", target_port, timeout=60)
                server.request(self.command, self.path, body, dict(self.headers))
                answer = server.getresponse()
                content = answer.read()
                server.close()
                if proxy.mode == "mute":
                    self.close_connection = True
                    return
                self._answer(answer.status, content, dict(answer.getheaders()))

            def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _forward  # noqa: N815

            def log_message(self, *args: Any) -> None:
                """Not on stderr."""

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()
