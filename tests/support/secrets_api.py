"""An API server of Kubernetes that can do one thing: keep Secrets, over TLS, for one bearer token."""

import json
import os
import re
import ssl
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

TOKEN = "of-the-account"


class FakeApi:
    def __init__(self) -> None:
        self.secrets: dict[str, dict[str, str]] = {}
        self.refuse = False

    def __enter__(self) -> "FakeApi":
        self._folder = tempfile.TemporaryDirectory()
        account = Path(self._folder.name)
        (account / "token").write_text(TOKEN)
        command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=api -addext subjectAltName=IP:127.0.0.1"
        files = ["-keyout", f"{account}/key", "-out", f"{account}/ca.crt"]
        subprocess.run([*command.split(), *files], check=True, capture_output=True)
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                name = body["metadata"]["name"]
                if self.headers["Authorization"] != f"Bearer {TOKEN}" or api.refuse:
                    code = 403
                elif (
                    not re.fullmatch("/api/v1/namespaces/pipeline(-demo)?/secrets", self.path)
                    or body["kind"] != "Secret"
                ):
                    code = 404
                elif name in api.secrets:
                    code = 409
                else:
                    code, api.secrets[name] = 201, body["stringData"]
                self.send_response(code)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self._server = HTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(account / "ca.crt", account / "key")
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()
        self._folder.cleanup()

    def run(self, command: list[str]) -> None:
        """Run a pod's command, with what a pod knows of the API server."""
        host, port = self._server.server_address[:2]
        env = {"KUBERNETES_SERVICE_HOST": str(host), "KUBERNETES_SERVICE_PORT": str(port)}
        subprocess.run(command, check=True, env=os.environ | env | {"ACCOUNT": self._folder.name}, capture_output=True)
