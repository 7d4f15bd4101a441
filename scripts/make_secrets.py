"""Make the Secrets that the pods of k8s/ wait for, with random values; what is there already stays as it is.

    python scripts/make_secrets.py NAMESPACE NAME...        in a pod; k8s/base/35-secrets.yaml

Its account may create Secrets, and neither read nor change any. So it cannot look first: the API server says which
exist.
"""

import json
import secrets
import ssl
import sys
import urllib.error
import urllib.request
from os import environ
from pathlib import Path

VALUES = {
    "mlflow-login": {
        "username": "admin",
        "password": secrets.token_urlsafe(24),
        "flask-secret-key": secrets.token_hex(32),
    },
    "postgres": {"password": secrets.token_urlsafe(24)},
    "ray-token": {"auth_token": secrets.token_hex(32)},
}
EXISTS = 409


def make(namespace: str, name: str) -> bool:
    """Whether the Secret was made; else there was one of this name.

    Raises:
        HTTPError: the API server refused it. URLError: it was not reached.
    """
    account = Path(environ["ACCOUNT"])
    host, port = environ["KUBERNETES_SERVICE_HOST"], environ["KUBERNETES_SERVICE_PORT"]
    host = f"[{host}]" if ":" in host else host
    secret = {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name, "labels": {"app.kubernetes.io/part-of": "pipeline"}},
        "type": "Opaque",
        "stringData": VALUES[name],
    }
    request = urllib.request.Request(
        f"https://{host}:{port}/api/v1/namespaces/{namespace}/secrets",
        json.dumps(secret).encode(),
        {
            "Content-Type": "application/json",
            "Authorization": "Bearer " + (account / "token").read_text(encoding="utf-8"),
        },
        method="POST",
    )
    context = ssl.create_default_context(cafile=str(account / "ca.crt"))
    try:
        urllib.request.urlopen(request, context=context, timeout=30).close()
    except urllib.error.HTTPError as e:
        if e.code != EXISTS:
            raise
        return False
    return True


if __name__ == "__main__":
    namespace, *names = sys.argv[1:] or [""]
    if not names or not VALUES.keys() >= set(names):
        print(f"usage: make_secrets.py NAMESPACE NAME...; names: {', '.join(VALUES)}", file=sys.stderr)
        sys.exit(2)
    if "ACCOUNT" not in environ:
        print("make_secrets.py: run it in a pod, as k8s/base/35-secrets.yaml does", file=sys.stderr)
        sys.exit(2)
    try:
        for name in names:
            print("made" if make(namespace, name) else "there already:", name)
    except urllib.error.URLError as e:  # and HTTPError
        fix = "may its account create Secrets, and is the API server's port in the NetworkPolicy make-secrets?"
        sys.exit(f"make_secrets.py: the API server does not take {name}: {e}; {fix}")
