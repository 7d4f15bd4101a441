"""Driver and workers: who waits is told at once, who dies is missed at once, and a stranger is not heard."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster.channel import DriverConnection, EventChannel
from pipeline.cluster.connection import how_it_ended
from pipeline.events import CheckpointWritten, Note, StepLogged

TIMEOUT_S = 60.0
Connect = Callable[..., DriverConnection]
# A rank whose process says two things, and then hangs.
RANK = """
import sys, time
from pipeline.cluster.channel import DriverConnection
from pipeline.events import Note
host, port, key, attempt = sys.argv[1:]
rank = DriverConnection((host, int(port)), key, 60, attempt=int(attempt), rank=0, node="far")
rank.progress(7)
rank.emit(Note("here"))
time.sleep(100)
"""

# A rank that crashes in mid-training, as in a library of C++.
CRASH = """
import faulthandler, os, signal, sys
from pipeline.cluster.channel import DriverConnection
host, port, key, number = sys.argv[1:]
rank = DriverConnection((host, int(port)), key, 60, attempt=1, rank=3, node="near")
faulthandler.enable(rank, all_threads=False)
os.kill(os.getpid(), int(number))
"""


@pytest.fixture
def channel() -> Iterator[EventChannel]:
    with closing(EventChannel("127.0.0.1", TIMEOUT_S)) as made:
        made.begin(1)
        yield made


@pytest.fixture
def connect(channel: EventChannel) -> Iterator[Connect]:
    """Connect a rank in this process, and wait until the driver knows it."""
    made = list[DriverConnection]()

    def rank(number: int = 0, attempt: int = 1) -> DriverConnection:
        node = f"node-{number}"
        one = DriverConnection(channel.address, channel.key, TIMEOUT_S, attempt=attempt, rank=number, node=node)
        made.append(one)
        wait_for(lambda: node in channel.nodes)
        return one

    yield rank
    for one in made:
        one.close(TIMEOUT_S)


def wait_for(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@contextmanager
def process(address: tuple[str, int], key: str, attempt: int = 1) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", RANK, *map(str, address), key, str(attempt)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as rank:
        yield rank
        rank.kill()


def test_events_arrive_in_order_and_end_a_wait(channel: EventChannel, connect: Connect) -> None:
    rank = connect()
    for i in range(1000):
        rank.emit(StepLogged(i, {"train/loss": float("nan")}))
    told = list[int]()
    while len(told) < 1000:
        events = channel.take_events(TIMEOUT_S)
        assert events, "the wait for an event ends with it"
        told += [event.step for event in events if isinstance(event, StepLogged)]
    assert told == list(range(1000))
    assert channel.take_events(0) == []


def test_a_wait_for_events_can_be_ended(channel: EventChannel) -> None:
    channel.wake()
    assert channel.take_events(10 * TIMEOUT_S) == []


def test_a_stop_reaches_all_also_who_comes_later(channel: EventChannel, connect: Connect) -> None:
    ranks = [connect(0), connect(1)]
    channel.request_stop("resize")
    wait_for(lambda: all(rank.stop_reason == "resize" for rank in ranks))
    ranks.append(connect(2))
    channel.request_stop("interrupted")
    channel.request_stop("resize")  # a user's wish is not replaced
    wait_for(lambda: all(rank.stop_reason == "interrupted" for rank in ranks))


def test_all_is_heard_that_was_said_before_the_end(channel: EventChannel, connect: Connect) -> None:
    rank = connect()
    rank.emit(Note("é" * 100_000))
    rank.progress(5)
    rank.fail("UserError", "no such file")
    rank.close(TIMEOUT_S)
    channel.finish(TIMEOUT_S)
    assert channel.ended.is_set()
    assert [len(event.text) for event in channel.take_events(0) if isinstance(event, Note)] == [100_000]
    assert (channel.step, channel.fatal) == (5, ("UserError", "no such file"))


def test_a_stop_that_crosses_the_last_words_loses_none(channel: EventChannel, connect: Connect) -> None:
    rank = connect()
    for _ in range(100):
        rank.emit(Note("x" * 10_000))
    rank.close(TIMEOUT_S)
    channel.request_stop("interrupted")
    channel.finish(TIMEOUT_S)
    assert len(channel.take_events(0)) == 100


def test_after_its_end_an_attempt_is_not_heard(channel: EventChannel, connect: Connect) -> None:
    """What a host that was cut off says when it is there again."""
    rank = connect()
    channel.finish(0.0)
    rank.emit(Note(""))
    rank.fail("UserError", "late")
    rank.close(TIMEOUT_S)
    wait_for(channel.ended.is_set)
    assert (channel.take_events(0), channel.fatal) == ([], None)


def test_an_event_that_cannot_be_sent_is_told_where_it_is_made(channel: EventChannel, connect: Connect) -> None:
    rank = connect()
    with pytest.raises(TypeError):
        rank.emit(CheckpointWritten(1, Path("x")))  # type: ignore[arg-type]
    rank.emit(StepLogged(np.int64(3), {"train/loss": np.float32(0.5)}))  # type: ignore[arg-type, dict-item]
    assert channel.take_events(TIMEOUT_S) == [StepLogged(3, {"train/loss": 0.5})]


def test_a_rank_that_finds_no_thread_is_refused_and_the_next_one_is_heard(
    channel: EventChannel, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as few:
        few.setattr(
            threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start new thread"))
        )
        with socket.create_connection(channel.address, TIMEOUT_S) as refused:
            assert refused.recv(1) == b""
    connect().emit(Note(""))
    assert channel.take_events(TIMEOUT_S) == [Note("")]


def test_a_killed_rank_is_missed_at_once_and_what_it_said_is_kept(channel: EventChannel) -> None:
    with process(channel.address, channel.key) as rank:
        events = channel.take_events(TIMEOUT_S)
        assert not channel.ended.is_set()
        rank.kill()
        assert channel.ended.wait(TIMEOUT_S)
    assert [event.text for event in events if isinstance(event, Note)] == ["here"]
    assert (channel.step, channel.nodes) == (7, {"far"})


@pytest.mark.parametrize("late", [False, True])
def test_a_rank_of_an_earlier_attempt_is_not_heard_and_ends(channel: EventChannel, late: bool) -> None:
    if late:  # it connects when the next attempt has begun
        channel.begin(2)
    with process(channel.address, channel.key) as rank:
        if not late:
            assert channel.take_events(TIMEOUT_S)
            channel.begin(2)
        said, _ = rank.communicate(timeout=TIMEOUT_S)
        assert rank.returncode == 1
    assert "worker 0 ends, it has lost its driver" in said
    assert (channel.nodes, channel.ended.is_set(), channel.take_events(0)) == (set(), False, [])


@pytest.mark.parametrize(
    "words", [b"", b"GET / HTTP/1.1\r\n\r\n", b'{"proof": "x"}\n', b"[]\n", b"\xff\xfe\n", b"x" * 5000]
)
def test_a_stranger_is_not_heard(channel: EventChannel, connect: Connect, words: bytes) -> None:
    with socket.create_connection(channel.address, TIMEOUT_S) as stranger:
        stranger.sendall(words)
        stranger.shutdown(socket.SHUT_WR)
        with closing(stranger.makefile("rb")) as answer:
            assert set(json.loads(answer.readline())) == {"challenge"}
            with pytest.raises((ConnectionResetError, StopIteration)):  # nothing else comes
                next(answer)
    rank = connect()
    rank.emit(Note("mine"))
    assert [event.text for event in channel.take_events(TIMEOUT_S) if isinstance(event, Note)] == ["mine"]


def test_another_key_is_refused(channel: EventChannel) -> None:
    with process(channel.address, "another") as rank:
        assert rank.wait(TIMEOUT_S) == 1
    assert (channel.nodes, channel.take_events(0)) == (set(), [])


def test_a_driver_that_is_not_there_is_named(channel: EventChannel) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        with pytest.raises(ConnectionError, match=r"the driver at 127.0.0.1:\d+ cannot be reached"):
            DriverConnection(free.getsockname(), "key", TIMEOUT_S, attempt=1, rank=0, node="x")


def test_waiting_takes_no_time_of_the_processor(channel: EventChannel, connect: Connect) -> None:
    connect()
    before = sum(os.times()[:2])
    assert channel.take_events(2.0) == []
    assert sum(os.times()[:2]) - before < 0.1


def test_a_channel_has_ipv6_addresses_too() -> None:
    try:
        made = EventChannel("::1", TIMEOUT_S)
    except OSError:
        pytest.skip("this machine has no IPv6 address")
    with closing(made) as channel:
        channel.begin(1)
        rank = DriverConnection(channel.address, channel.key, TIMEOUT_S, attempt=1, rank=0, node="x")
        rank.emit(Note(""))
        assert channel.take_events(TIMEOUT_S) == [Note("")]
        rank.close(TIMEOUT_S)


@pytest.mark.parametrize(
    ("number", "words"), [(signal.SIGSEGV, "signal 11 (SIGSEGV: segmentation fault)"), (signal.SIGKILL, "")]
)
def test_the_signal_of_a_crash_is_the_last_thing_that_is_heard(
    channel: EventChannel, number: int, words: str, capfd: pytest.CaptureFixture[str]
) -> None:
    host, port = channel.address
    program = [sys.executable, "-c", CRASH, host, str(port), channel.key, str(int(number))]
    assert subprocess.run(program, check=False, timeout=TIMEOUT_S).returncode == -number
    channel.finish(TIMEOUT_S)
    error = RuntimeError("The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR")
    how = f"by {words}" if words else "killed, or exited without an error message"
    assert how_it_ended(3, error, channel.crashes.get(3)).endswith(how)
    assert ("<string>" in capfd.readouterr().out) == bool(words), "the driver's log says where"
