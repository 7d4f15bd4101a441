"""Threads that take turns at their calls to a storage, in a chosen order."""

import threading
from collections.abc import Callable, Sequence

import pytest
from pyarrow.fs import _MockFileSystem

from pipeline.storage import Storage


class Turns:
    """Threads that make one storage call at a time, in a chosen order.

    Args:
        choose: called with the numbers of those that can go on; which of them does so.
        between: called between two calls.
    """

    def __init__(self, choose: Callable[[list[int]], int], between: Callable[[], None] = lambda: None):
        self._choose, self._between = choose, between
        self._condition, self._waiting, self._turn = threading.Condition(), set[int](), -1
        self._alive: set[int] = set()
        self._me = threading.local()

    def run(self, works: list[Callable[[], None]]) -> None:
        threads = [threading.Thread(target=self._work, args=item, name=str(item[0])) for item in enumerate(works)]
        self._alive = set(range(len(works)))
        for thread in threads:
            thread.start()
        with self._condition:
            while self._alive:
                assert self._condition.wait_for(lambda: self._turn < 0 and self._waiting == self._alive, 30)
                self._between()
                if self._alive:
                    self._turn = self._choose(sorted(self._alive))
                    self._condition.notify_all()
        for thread in threads:
            thread.join()

    def before_call(self) -> None:
        number = getattr(self._me, "number", None)
        if number is None:  # of the test itself
            return
        with self._condition:
            self._waiting.add(number)
            self._turn = -1 if self._turn == number else self._turn
            self._condition.notify_all()
            assert self._condition.wait_for(lambda: self._turn == number, 30)
            self._waiting.discard(number)

    def _work(self, number: int, work: Callable[[], None]) -> None:
        self._me.number = number
        try:
            work()
        finally:
            with self._condition:
                self._alive.discard(number)
                self._turn = -1 if self._turn == number else self._turn
                self._condition.notify_all()


def in_memory(monkeypatch: pytest.MonkeyPatch, turns: Turns, calls: Sequence[str]) -> None:
    """Have each of these methods of `Storage` be a turn, on an object store in memory."""
    store = _MockFileSystem()
    monkeypatch.setattr(Storage, "_opened", property(lambda self: (store, self.uri.removeprefix("s3://"))))
    monkeypatch.setattr(Storage, "make", lambda self: store.create_dir(self._opened[1]))
    Storage("s3://run").make()
    for name in calls:
        real = getattr(Storage, name)

        def call(self: Storage, *args: object, _real: Callable[..., object] = real) -> object:
            turns.before_call()
            self.make()  # an object store has no folders that must be made before a file
            return _real(self, *args)

        monkeypatch.setattr(Storage, name, call)
