"""A real web server on this machine, in a thread: sends parts of files, counts what is asked for, and can go away."""

import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipeline.storage import Storage


class WebServer(ThreadingHTTPServer):
    """May be changed while it runs.

    gets: how often each (path, range) was asked for; slow_s: the pause in the middle of each answer; cuts: how many
    answers break off there; sends_parts: whether it knows Range requests.
    """

    request_queue_size = 128  # many processes connect at once

    def __init__(self, folder: Path, port: int = 0, slow_s: float = 0.0):
        self.gets = Counter[tuple[str, str]]()
        self.slow_s, self.cuts, self.sends_parts = slow_s, 0, True
        self.stop_waiting = threading.Event()
        super().__init__(("127.0.0.1", port), partial(_Handler, directory=str(folder)))

    @property
    def storage(self) -> Storage:
        return Storage(f"http://127.0.0.1:{self.server_port}")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that is gone is what these tests are about."""


class _Handler(SimpleHTTPRequestHandler):
    server: WebServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        part = self.headers.get("Range", "")
        self.server.gets[self.path, part] += 1
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", part)
        path = Path(self.translate_path(self.path))
        if not match or not path.is_file() or not self.server.sends_parts:
            return super().do_GET()
        start, last = int(match[1]), int(match[2])
        with path.open("rb") as f:
            f.seek(start)
            data = f.read(last + 1 - start)
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{path.stat().st_size}")
        self.end_headers()
        half = len(data) // 2
        self.wfile.write(data[:half])
        if self.server.cuts:
            self.server.cuts -= 1
            return None
        if self.server.slow_s:
            self.server.stop_waiting.wait(self.server.slow_s)
        self.wfile.write(data[half:])
        return None


@contextmanager
def web_server(folder: Path, port: int = 0, slow_s: float = 0.0) -> Iterator[WebServer]:
    """Serves until the end of the block; from then on connections are refused."""
    with WebServer(folder, port, slow_s) as server:
        thread = threading.Thread(target=partial(server.serve_forever, poll_interval=0.02))
        thread.start()
        try:
            yield server
        finally:
            server.stop_waiting.set()
            server.shutdown()
            thread.join()
