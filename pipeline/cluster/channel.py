"""Events from the workers to the driver, and the wish to stop the other way, over sockets.

The driver listens and each rank connects. Both wait for what comes: polling would take part of a core. A process that
dies ends its connection, so the other side knows at once; that of a host that is cut off ends after `timeout_s`.

A message is a line of JSON; faulthandler's text is what a rank that crashes says. A rank first shows that it has the
key, which came with its work, by an answer to a challenge: nobody else is heard. The rest is plain text, as in Ray.
"""

import contextlib
import hmac
import json
import os
import queue
import secrets
import socket
import threading
import time
from typing import IO, Any

from pipeline.events import Event, from_json, to_json
from pipeline.runs.spec import StopReason

HANDSHAKE_S = 30.0
MAX_HELLO = 1024  # characters
NO_ATTEMPT = 0
CRASH = "Fatal Python error: "  # faulthandler's, before what the signal means
STEP_EVERY_S = 2.0  # the driver knows the last step that was done, about so exactly


class EventChannel:
    """The driver's end.

    Each attempt has its own connections. A worker of an earlier one, cut off and not yet dead, is not heard.

    Args:
        host: this machine's address, as the workers know it.
        timeout_s: silence of a host after which its connections end.

    Attributes:
        key, address: what a rank connects with.
        ended: set once a connection of this attempt has ended.
        nodes: Ray's ids of the nodes that this attempt's workers run on.
        step: the last one known to be done.
        crashes: rank -> the signal of a crash in one of its processes, as the system calls it.
        fatal: class and text of an error of this attempt that ends the run, or may do so.
    """

    def __init__(self, host: str, timeout_s: float):
        self.key, self._timeout_s = secrets.token_hex(32), timeout_s
        self.ended = threading.Event()
        self.nodes: set[str] = set()
        self.step = 0
        self.crashes: dict[int, str] = {}
        self.fatal: tuple[str, str] | None = None
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards all below, and the attributes above
        self._attempt = NO_ATTEMPT
        self._connections: dict[int, socket.socket] = {}  # by rank
        self._stop: StopReason | None = None
        self._listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        threading.Thread(target=self._accept, name="channel", daemon=True).start()

    def begin(self, attempt: int) -> None:
        """From now on hear this attempt's ranks alone."""
        with self._changed:
            self._end_connections()
            self._attempt, self._stop, self.fatal = attempt, None, None
            self.nodes, self.crashes = set(), {}
            self.ended.clear()

    def take_events(self, timeout_s: float) -> list[Event]:
        """Those since the last call; where there are none, wait for one, or for `wake`."""
        events = list[Event | None]()
        with contextlib.suppress(queue.Empty):
            events.append(self._events.get(timeout=timeout_s))
            while True:
                events.append(self._events.get_nowait())
        return [event for event in events if event is not None]

    def wake(self) -> None:
        """End a wait for events."""
        self._events.put(None)

    def request_stop(self, reason: StopReason) -> None:
        """Ask the ranks to stop. A user's wish is not replaced by another reason."""
        with self._changed:
            if self._stop in (reason, "interrupted"):
                return
            self._stop = reason
            for connection in self._connections.values():
                _send(connection, _line({"stop": reason}))

    def finish(self, timeout_s: float) -> None:
        """Wait until this attempt's ranks have said all they had to say, and ended; then hear them no more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._connections, timeout_s)
            self._attempt = NO_ATTEMPT

    def close(self) -> None:
        """End all connections, and with them the ranks that are still there."""
        _end(self._listener)
        self._listener.close()
        with self._changed:
            self._end_connections()

    def _end_connections(self) -> None:
        for connection in self._connections.values():
            _end(connection)
        self._connections.clear()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._listener.fileno() < 0:
                    return
                time.sleep(1)  # too many open files: who wants to connect waits
                continue
            try:
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()
            except RuntimeError as e:  # too many threads; others may end
                print(f"a worker's connection is refused: {e}", flush=True)
                connection.close()

    def _serve(self, connection: socket.socket) -> None:
        """Hear one rank until its connection ends."""
        with connection, connection.makefile("r", encoding="utf-8") as lines:
            challenge, deadline = secrets.token_hex(16), threading.Timer(HANDSHAKE_S, _end, (connection,))
            deadline.daemon = True
            deadline.start()
            try:
                _send(connection, _line({"challenge": challenge}))
                hello = json.loads(lines.readline(MAX_HELLO))
                known = hmac.compare_digest(hello["proof"], _proof(self.key, challenge))
            except (OSError, ValueError, LookupError, TypeError):  # a scan of ports, or a rank that has died
                return
            finally:
                deadline.cancel()
            if known:
                self._hear(connection, lines, **hello["rank"])

    def _hear(self, connection: socket.socket, lines: IO[str], *, attempt: int, rank: int, node: str) -> None:
        _keep_alive(connection, self._timeout_s)
        with self._changed:
            if attempt != self._attempt:
                return
            self._connections[rank] = connection
            self.nodes.add(node)
            if self._stop is not None:
                _send(connection, _line({"stop": self._stop}))
        try:
            for line in lines:
                self._take(_parse(line), attempt, rank)
        except OSError as e:
            print(f"the connection to worker {rank} has ended: {e}", flush=True)
        finally:
            with self._changed:
                if self._connections.get(rank) is connection:
                    del self._connections[rank]
                    self.ended.set()
                    self._changed.notify_all()

    def _take(self, message: dict[str, Any], attempt: int, rank: int) -> None:
        with self._changed:
            if attempt != self._attempt:
                return
            if rank == 0:
                self.step = message.get("step", self.step)
            if "text" in message:  # half a message, or where it crashed
                print(f"worker {rank}: {message['text']}", flush=True)
                self.crashes |= {rank: message["crash"]} if message["crash"] else {}
            if "fatal" in message:
                self.fatal = self.fatal or tuple(message["fatal"])
            if "event" in message:
                self._events.put(from_json(message["event"]))


class DriverConnection:
    """A rank's end. Threads of its own send and receive, so that no step waits for the driver.

    A rank that loses its driver ends its process: a new driver has others train by then.

    Raises:
        ConnectionError: the driver cannot be reached.
    """

    def __init__(self, address: tuple[str, int], key: str, timeout_s: float, *, attempt: int, rank: int, node: str):
        self.stop_reason: StopReason | None = None
        self._rank, self._step, self._closing = rank, 0, False
        self._to_send: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        try:
            self._socket = socket.create_connection(address, min(timeout_s, HANDSHAKE_S))
            _keep_alive(self._socket, timeout_s)
            self._lines = self._socket.makefile("r", encoding="utf-8")
            proof = _proof(key, json.loads(self._lines.readline())["challenge"])
            _send(self._socket, _line({"proof": proof, "rank": {"attempt": attempt, "rank": rank, "node": node}}))
            self._socket.settimeout(None)
        except (OSError, ValueError) as e:  # ValueError: it ended the connection, or is no driver
            where = f"{address[0]}:{address[1]}"
            raise ConnectionError(f"the driver at {where} cannot be reached (workers need all its ports): {e}") from e
        self._sender = threading.Thread(target=self._send_all, name="to driver", daemon=True)
        self._sender.start()
        threading.Thread(target=self._receive, name="from driver", daemon=True).start()

    def fileno(self) -> int:
        """The socket's, for faulthandler: the signal of a crash is the last thing that the driver hears."""
        return self._socket.fileno()

    def emit(self, event: Event) -> None:
        """Send an event; returns at once."""
        self._to_send.put(_line({"step": self._step, "event": to_json(event)}))

    def fail(self, kind: str, text: str) -> None:
        """Tell of an error that ends the run, or may do so: see `failures`."""
        self._to_send.put(_line({"step": self._step, "fatal": (kind, text)}))

    def progress(self, step: int) -> None:
        """Have the driver know that `step` steps are done, with the next event or soon. It hears rank 0 alone."""
        if self._rank == 0:
            self._step = step

    def close(self, timeout_s: float) -> None:
        """Send what is left, and then have the driver end the connection."""
        self._closing = True
        self._to_send.put(None)
        self._sender.join(timeout_s)
        # Not both ways: what the driver says now would have the kernel drop the rest.
        _end(self._socket, socket.SHUT_WR)

    def _send_all(self) -> None:
        last_sent = 0
        while True:
            try:
                line = self._to_send.get(timeout=STEP_EVERY_S)
            except queue.Empty:
                if self._step == last_sent:
                    continue
                last_sent = self._step
                line = _line({"step": last_sent})
            if line is None:
                return
            _send(self._socket, line)

    def _receive(self) -> None:
        reason = "it has ended the connection"
        try:
            with self._socket, self._lines:
                for line in self._lines:
                    self.stop_reason = json.loads(line)["stop"]
        except OSError as e:
            reason = str(e)
        finally:
            if not self._closing:
                try:
                    print(f"worker {self._rank} ends, it has lost its driver: {reason}", flush=True)
                finally:
                    os._exit(1)


def _proof(key: str, challenge: str) -> str:
    return hmac.new(key.encode(), challenge.encode(), "sha256").hexdigest()


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message, default=float).encode() + b"\n"  # default: numpy's numbers


def _parse(line: str) -> dict[str, Any]:
    """A message; other text, and a crash that it tells of, where the rank was killed while it wrote or has crashed."""
    with contextlib.suppress(ValueError):
        if isinstance(message := json.loads(line), dict):
            return message
    return {"text": line.rstrip(), "crash": line.rstrip().partition(CRASH)[2]}


def _send(connection: socket.socket, line: bytes) -> None:
    """Send a message, unless the connection has ended: the one who receives tells of that."""
    with contextlib.suppress(OSError):
        connection.sendall(line)


def _end(connection: socket.socket, how: int = socket.SHUT_RDWR) -> None:
    """End a connection for all threads that use it; its owner closes it."""
    with contextlib.suppress(OSError):
        connection.shutdown(how)


def _keep_alive(connection: socket.socket, timeout_s: float) -> None:
    """Have it end where the other host gives no sign for `timeout_s`."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    pause = max(1, int(timeout_s / 10))
    # On Linux. Elsewhere a training stays on one machine, which cannot be cut off from itself.
    keepalive = {"TCP_KEEPIDLE": 5 * pause, "TCP_KEEPINTVL": pause, "TCP_KEEPCNT": 5}
    for name, value in {**keepalive, "TCP_USER_TIMEOUT": 10_000 * pause}.items():
        if (option := getattr(socket, name, None)) is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
