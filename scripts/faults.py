"""The seam of `enumerate_faults`: it counts what a training asks of its storage and of MLflow, and disturbs one call.

It lies outside of the package: around Python's calls to the operating system, as far as they are about the case's own
folders, around pyarrow's file systems and around MLflow's client. Install it in a process that is made for one case, as
nothing takes it away.
"""

import builtins
import errno
import io
import os
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import mlflow.exceptions
import pyarrow as pa
import pyarrow.fs
import requests
import torch
from fast_clock import Clock

from pipeline.storage import Storage
from pipeline.tracking import mlflow_run, mlflow_store

BEFORE, ONCE, AFTER, MINUTE, HANGS, LOST = KINDS = (
    "dies-before",
    "fails-once",
    "dies-after",
    "fails-for-a-minute",
    "hangs",
    "answer-lost",  # it was done, and the caller is told that it was not
)
CALLS = "mkdir rename replace remove unlink rmdir listdir scandir link truncate utime stat"
CALLS += " open fsync fdatasync pread preadv"
VARYING = (
    (r"[0-9a-f]{32,64}", "ID"),
    (r"\d{16,}", "TIME"),
    (r"(?<=tmp)\w{8}\b", "RANDOM"),
    (r"(?<=-)[0-9a-f]{16}\b", "ID"),
    (r"\d/[^/]+\.jpg", "IMAGE"),
    (r"(?<=/val/)\d$", "CLASS"),
)


@dataclass(frozen=True)
class Fault:
    """kind: one of KINDS. target, key: of the operation that it is about, the key with its number of that name."""

    kind: str
    target: str
    key: str


class Seam:
    """Around every operation of this process.

    Args:
        roots: folder or prefix -> what names call it, and the target that it belongs to.
        fault: what is to go wrong, if anything. It does so once in a case, in whichever of its processes comes there.
    """

    def __init__(self, roots: Mapping[str, tuple[str, str]], fault: Fault | None, clock: Clock):
        self._roots = sorted(roots.items(), key=lambda item: -len(item[0]))
        self._fault, self._clock = fault, clock
        self._counts: Counter[str] = Counter()
        self._lock, self._inside = threading.Lock(), threading.local()
        self.operations: list[tuple[str, str]] = []  # target, key

    def call(self, target: str, name: str, function: Callable[[], Any]) -> Any:
        """Do an operation, or what the fault makes of it."""
        if getattr(self._inside, "on", False):  # what an operation is made of
            return function()
        self._inside.on = True
        try:
            kind = self._arrive(target, name)
            if kind == BEFORE:
                os.kill(os.getpid(), signal.SIGKILL)
            while kind == HANGS:
                signal.pause() if threading.current_thread() is threading.main_thread() else self._clock.sleep(60)
            if kind in (ONCE, MINUTE):
                raise _error(target, name, kind)
            result = function()
            if kind == AFTER:
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == LOST:
                raise _error(target, name, kind)
            return result
        finally:
            self._inside.on = False

    def _arrive(self, target: str, name: str) -> str | None:
        with self._lock:
            self._counts[name] += 1
            key = f"{name} #{self._counts[name]}"
            self.operations.append((target, key))
            fault = self._fault
            if fault is None:
                return None
            if key == fault.key and self._clock.since is None:
                self._clock.start(hangs=fault.kind == HANGS)
                return fault.kind
            lasts = fault.kind == MINUTE and target == fault.target and self._clock.is_fast
            return MINUTE if lasts else None

    def _place(self, path: Any, dir_fd: int | None = None) -> tuple[str, str] | None:
        """The target and the name of a path or an open file; None for what is none of the case's."""
        if isinstance(path, int):
            path = Path(f"/proc/self/fd/{path}").readlink()
        text = os.fsdecode(path)
        if dir_fd is not None:
            text = str(Path(f"/proc/self/fd/{dir_fd}").readlink() / text)
        for root, (name, target) in self._roots:
            if text == root or text.startswith(root.rstrip("/") + "/"):
                return target, name + self.readable(text[len(root) :])
        return None

    @staticmethod
    def readable(text: str) -> str:
        """A name that is the same in the next process."""
        text = re.sub(rf"\b{os.getpid()}\b", "PID", text)
        for pattern, name in VARYING:
            text = re.sub(pattern, name, text)
        return text

    def install(self) -> None:
        """Put it around the calls of this process."""
        for name in CALLS.split():
            setattr(os, name, self._around(f"os.{name}", getattr(os, name), second=name in ("rename", "replace")))
        builtins.open = io.open = self._opening(io.open)
        pa.OSFile = self._around("pa.OSFile", pa.OSFile)
        pa.memory_map = self._around("pa.memory_map", pa.memory_map)
        torch.load = self._around("torch.load", torch.load)
        self._around_pyarrow()
        client = mlflow_store.open_client
        mlflow_run.open_client = lambda uri: _Proxy(client(uri), self._of_mlflow)  # type: ignore[attr-defined]
        sys.addaudithook(self._audit)

    def _around(self, name: str, function: Callable[..., Any], *, second: bool = False) -> Callable[..., Any]:
        def around(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            there = None if getattr(self._inside, "on", False) else self._place(path, kwargs.get("dir_fd"))
            if there is None:
                return function(path, *args, **kwargs)
            called = f"{name} {there[1]}"
            if second and (to := self._place(args[0])):
                called += f" -> {to[1]}"
            return self.call(there[0], called, lambda: function(path, *args, **kwargs))

        return around

    def _opening(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def around(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            there = None if getattr(self._inside, "on", False) else self._place(file)
            if there is None:
                return function(file, mode, *args, **kwargs)
            opened = self.call(there[0], f"open {there[1]} ({mode})", lambda: function(file, mode, *args, **kwargs))
            return opened if mode in ("r", "rb") else _Written(opened, partial(self.call, *there))

        return around

    def _audit(self, event: str, args: tuple[Any, ...]) -> None:
        """What came by another way than the calls above can fail, or die before it is done."""
        known = event == "open" or (event.startswith("os.") and event[3:] in CALLS.split())
        if known and not getattr(self._inside, "on", False) and args and args[0] is not None:
            there = self._place(args[0])
            if there is not None:
                self.call(there[0], f"audit {event} {there[1]}", lambda: None)

    def _around_pyarrow(self) -> None:
        opened, copy = Storage.__dict__["_opened"].func, pyarrow.fs.copy_files

        def proxied(storage: Storage) -> tuple[Any, str]:
            system, path = opened(storage)
            return _Proxy(system, self._of_pyarrow), path

        def copy_files(source: str, to: str, source_system: Any, system: Any, **kwargs: Any) -> None:
            systems = [s.inner if isinstance(s, _Proxy) else s for s in (source_system, system)]
            places = [self._place(path) or ("scratch", path) for path in (source, to)]
            target = next((t for t, _ in places if t == "storage"), places[0][0])
            name = f"fs.copy_files {places[0][1]} -> {places[1][1]}"
            self.call(target, name, lambda: copy(source, to, *systems, **kwargs))

        prop = cached_property(proxied)
        prop.__set_name__(Storage, "_opened")
        Storage._opened = prop  # type: ignore[assignment, method-assign]
        pyarrow.fs.copy_files = copy_files

    def _of_pyarrow(self, method: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        about = args[0][0] if isinstance(args[0], list) else getattr(args[0], "base_dir", args[0])
        target, name = self._place(about) or ("other", str(about))
        return self.call(target, f"fs.{method} {name}", lambda: function(*args, **kwargs))

    def _of_mlflow(self, method: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        about = [*kwargs, *(self.readable(Path(a).name) for a in args[1:] if isinstance(a, str))][:2]
        return self.call("mlflow", " ".join([f"mlflow.{method}", *about]), lambda: function(*args, **kwargs))


def _error(target: str, name: str, kind: str) -> Exception:
    if target != "mlflow":
        text = f"{os.strerror(errno.EIO)} ({kind}: {name})"
        by_path = name.startswith(("open ", "os.")) and not name.startswith(("os.f", "os.pread"))
        return OSError(errno.EIO, text, name) if by_path else OSError(errno.EIO, text)
    if kind == LOST:
        return requests.ConnectionError(f"connection closed ({kind}: {name})")
    refused: Exception = mlflow.exceptions.MlflowException(f"API request failed ({kind}: {name})")
    return refused


class _Proxy:
    """An object each of whose calls goes through `call(method's name, method, arguments)`."""

    def __init__(self, inner: Any, call: Callable[..., Any]):
        self.inner, self._call = inner, call

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.inner, name)
        return partial(self._call, name, value) if callable(value) else value


class _Written:
    """A file that is written: its first write, or each one of a file without a buffer, and its cutting are operations.

    Args:
        call: takes the rest of the arguments of `Seam.call`, with the path as the beginning of the name.
    """

    def __init__(self, file: Any, call: Callable[[str, Callable[[], Any]], Any]):
        self._file, self._seam_call, self._first = file, call, True

    def write(self, content: Any) -> Any:
        raw = isinstance(self._file, io.RawIOBase)
        first, self._first = self._first or raw, False
        return self._operation("write", lambda: self._file.write(content)) if first else self._file.write(content)

    def truncate(self, *size: int) -> Any:
        return self._operation("truncate", lambda: self._file.truncate(*size))

    def _operation(self, name: str, function: Callable[[], Any]) -> Any:
        seam_call: Any = self._seam_call
        target, place = seam_call.args
        return seam_call.func(target, f"{name} {place}", function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.__exit__(*exc)
