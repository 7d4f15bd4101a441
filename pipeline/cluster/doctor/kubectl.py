"""The user's own kubectl, with its context and login: manifests as objects, and what the API server says."""

import json
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

from pipeline.errors import UserError

Object = dict[str, Any]
# What a cluster has, by the names of the questions put to it; an answer that was refused raises NotKnownError.
Cluster = Callable[[str], list[Any]]
REQUEST_TIMEOUT_S = 20
CALL_TIMEOUT_S = 90.0  # of all requests of a call, and of a program that logs in
MAX_ERROR_CHARS = 300
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where it is there: five times as fast


class NotKnownError(Exception):
    """The API server has not answered a question; the text says why, such as who may not list what."""


def render(folder: Path) -> list[Object]:
    """The objects that `kubectl apply -k FOLDER` takes where there is a kustomization, else `kubectl apply -f FOLDER`.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    if (folder / "kustomization.yaml").is_file():
        status, text, errors = _call("kustomize", str(folder))
        if status:
            raise UserError(f"{folder}: kubectl kustomize cannot read it: {_line(errors)}")
        texts = [text]
    else:
        files = sorted(file for file in folder.glob("*") if file.suffix in (".yaml", ".yml", ".json"))
        texts = [file.read_text(encoding="utf-8") for file in files]
    try:
        objects = [one for text in texts for one in yaml.load_all(text, LOADER) if one]
    except yaml.YAMLError as e:
        raise UserError(f"{folder}: has a file that is no YAML: {' '.join(str(e).split())}") from None
    if not objects or not all(
        isinstance(one, dict) and {"apiVersion", "kind", "metadata"} <= {*one} for one in objects
    ):
        raise UserError(f"{folder}: is no folder of manifests; name one, such as k8s/base or k8s/overlays/cpu-demo")
    return objects


def context() -> str:
    """The cluster and login that kubectl is set to; empty in a pod, which has no name for them."""
    return _call("config", "current-context")[1].strip()


def api_versions() -> set[str]:
    """The groups and versions that the API server has, such as apps/v1.

    Raises:
        UserError: it is not reached, or does not let the user in.
    """
    status, text, errors = _call("api-versions")
    if status:
        is_out = re.search("Unauthorized|must be logged in|credentials|Username", errors)
        choose = "start the cluster, or choose another: `kubectl config get-contexts` lists them"
        fix = "log in to the cluster again" if is_out else choose
        raise UserError(f"kubectl does not reach the cluster: {_line(errors)}; {fix}")
    return set(text.split())


def ask(questions: Mapping[str, Sequence[str]]) -> Cluster:
    """Put all questions at once, each the words after `kubectl get`. What was not asked is empty."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        answers = dict(zip(questions, pool.map(_get, questions.values()), strict=True))

    def answer(name: str) -> list[Any]:
        found = answers.get(name, [])
        if isinstance(found, NotKnownError):
            raise found
        return found

    return answer


def _get(words: Sequence[str]) -> list[Any] | NotKnownError:
    """Objects; where the words ask for another output than JSON, its words."""
    as_json = "-o=name" not in words
    status, text, errors = _call("get", *words, *(["-o=json"] if as_json else []))
    if status:
        return NotKnownError(_line(errors))
    if not as_json:
        return text.split()
    found = json.loads(text or '{"items": []}')  # --ignore-not-found says nothing
    return list(found.get("items", [found]))


def dry_run(objects: Sequence[Object]) -> list[str]:
    """What the API server has against an apply, a line for each object; nothing is changed there."""
    text = "\n".join(json.dumps(one, default=str) for one in objects)
    status, _, errors = _call("apply", "--dry-run=server", "-f", "-", stdin=text)
    starts = r'^(?=Error from server|error|Unable to connect|The \S+ "|Warning: |[EIW]\d{4} )'
    blocks = [block.strip() for block in re.split(starts, errors, flags=re.MULTILINE)]
    refused = [one for one in blocks if status and not re.match(r"$|Warning: |[EIW]\d{4} ", one)]
    refused += [one for one in blocks if one.startswith("Warning: would violate")]  # when its pods are to be made
    return list(dict.fromkeys(map(_refusal, refused)))


def _refusal(block: str) -> str:
    """What counts in an error of kubectl's apply, which repeats the patch and the whole object."""
    text = re.split('for: "STDIN": ', block)[-1]
    first = text.partition("\n")[0]
    text = " ".join(text.split()) if first.endswith(":") else first  # a list of reasons; else a comparison follows
    text = re.sub(r'error when \w+ "STDIN": ', "", text)
    return _line(re.sub("Invalid value: .*: field is immutable", "field is immutable", text))


def _call(*words: str, stdin: str = "") -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    command = ["kubectl", f"--request-timeout={REQUEST_TIMEOUT_S}s", *words]
    try:
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=CALL_TIMEOUT_S)
    except FileNotFoundError:
        raise UserError("kubectl is not here; install it: https://kubernetes.io/docs/tasks/tools") from None
    except subprocess.TimeoutExpired:
        return 1, "", f"kubectl {words[0]} has not ended within {CALL_TIMEOUT_S:.0f} s"
    return done.returncode, done.stdout, done.stderr


def _line(errors: str) -> str:
    """The last line, those before it being of each try; without the words that all have."""
    lines = errors.strip().splitlines() or ["kubectl fails without a word"]
    return re.sub(r"^(error: |Error from server \(\w+\): )+", "", lines[-1])[:MAX_ERROR_CHARS]
