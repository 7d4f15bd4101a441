"""Two drivers on one store, in every order of their calls: one goes on, the one that came last by its claim."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from pyarrow.fs import _MockFileSystem
from s3 import s3_storage

from pipeline import runs
from pipeline.claim import FOLDER, Claim, SupersededError
from pipeline.config import ConfigError
from pipeline.failures import TrainingFailedError, retry
from pipeline.identity import Identity
from pipeline.storage import Storage

CALLS = ("names", "write_bytes", "read_bytes", "delete")


class Turns:
    """Threads that make one storage call at a time, in a chosen order.

    Args:
        choices: which of those that can go on does so, call by call; the first one where none is left.
    """

    def __init__(self, choices: list[int]):
        self._choices, self.taken = choices, list[tuple[int, int]]()  # taken: (chosen, of how many)
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
                if ready := sorted(self._alive):
                    chosen = self._choices[len(self.taken)] if len(self.taken) < len(self._choices) else 0
                    self.taken.append((chosen, len(ready)))
                    self._turn = ready[chosen]
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


def every_order(monkeypatch: pytest.MonkeyPatch, make: Callable[[], list[Callable[[], None]]]) -> Iterator[None]:
    """Run what `make` returns in each order of its storage calls, and give the caller the end of each."""
    real = {name: getattr(Storage, name) for name in CALLS}
    choices: list[int] | None = []
    while choices is not None:
        store, turns = _MockFileSystem(), Turns(choices)
        store.create_dir("run")
        monkeypatch.setattr(Storage, "_opened", property(lambda self: (store, self.uri.removeprefix("s3://"))))  # noqa: B023
        for name in CALLS:

            def call(self: Storage, *args: object, _call: Callable[..., object] = real[name]) -> object:
                turns.before_call()  # noqa: B023
                return _call(self, *args)

            monkeypatch.setattr(Storage, name, call)
        monkeypatch.setattr(Storage, "make", lambda self: store.create_dir(self._opened[1]))  # noqa: B023
        turns.run(make())
        yield
        choices = _next([chosen for chosen, _ in turns.taken], [number for _, number in turns.taken])


def _next(chosen: list[int], numbers: list[int]) -> list[int] | None:
    """The next order, depth first; None after the last."""
    for place in reversed(range(len(chosen))):
        if chosen[place] + 1 < numbers[place]:
            return [*chosen[:place], chosen[place] + 1]
    return None


@pytest.mark.parametrize("ids", ["ab", "ba"])
def test_of_two_that_come_at_once_one_goes_on(ids: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each claims the run, then writes to it three times."""
    run, may_write, ended, orders = Storage("s3://run"), list[str](), list[str](), 0

    def driver() -> None:
        try:
            claim = Claim.take(run)
            for _ in range(3):
                claim.check()
                may_write.append(claim.name)
        except SupersededError:
            return
        ended.append(claim.name)

    def make() -> list[Callable[[], None]]:
        may_write.clear()
        ended.clear()
        return [driver, driver]

    names = SimpleNamespace(uuid4=lambda: SimpleNamespace(hex=ids[int(threading.current_thread().name)]))
    monkeypatch.setattr("pipeline.claim.uuid", names)
    for _ in every_order(monkeypatch, make):
        orders += 1
        assert max((run / FOLDER).names()) in ended
        assert may_write == sorted(may_write), "the earlier one wrote when the later one had come"
    assert orders > 400


def test_what_an_earlier_driver_writes_at_last_ends_nothing_of_the_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its session's end, written between any two calls of the later one's start."""
    run, seen = Storage("s3://run"), dict[str, object]()

    def earlier() -> None:
        try:
            open_now.replaced(open_now.end(), run, claims[0])
        except SupersededError:
            seen["earlier"] = "superseded"

    def later() -> None:
        claim = Claim.take(run)
        read = Identity.read(run, pytest.fail)
        assert read is not None
        begun = read.replaced(read.begin(0), run, claim)
        seen["run.json"] = Identity.read(run, pytest.fail)
        seen["later"] = begun.replaced(begun.end(), run, claim)

    claims, open_now = list[Claim](), Identity(training_id="t").begin(0)

    def make() -> list[Callable[[], None]]:
        seen.clear()
        claims[:] = [Claim.take(run)]
        open_now.write(run)
        return [earlier, later]

    orders = 0
    for _ in every_order(monkeypatch, make):
        orders += 1
        ended = seen["later"]
        assert isinstance(ended, Identity)
        assert (ended.training_id, ended.sessions, ended.open) == ("t", 2, False)
        if "earlier" in seen:
            assert seen["run.json"] == dataclasses.replace(ended, open=True)
            assert Identity.read(run, pytest.fail) == ended
    assert orders > 20


@pytest.fixture(scope="module")
def s3() -> Iterator[Storage]:
    with s3_storage() as storage:
        yield storage


@pytest.mark.parametrize("kind", ["directory", "s3"])
def test_the_last_claim_is_the_runs(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    run = Storage(tmp_path) if kind == "directory" else request.getfixturevalue("s3") / "run"
    first = Claim.take(run)
    first.check()
    second = Claim.take(run)
    second.check()
    with pytest.raises(SupersededError, match="another driver has begun to train"):
        first.check()
    assert [name for name in (run / FOLDER).names() if name[0] != "."] == [second.name]
    (run / FOLDER).delete(second.name)
    with pytest.raises(OSError, match="its driver's claim is not seen here"):
        second.check()


def test_a_command_that_comes_second_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loses(*_: object, **__: object) -> Claim:
        raise SupersededError("")

    monkeypatch.setattr(Claim, "take", loses)
    with pytest.raises(ConfigError, match=r"run.name=x: another command begins to train it just now; wait for its end"):
        runs._claim(Storage(tmp_path / "x"), "mine", again=False)


def test_a_driver_that_is_started_again_takes_nothing_from_a_later_command(tmp_path: Path) -> None:
    """A machine that was cut off comes back, and its supervisor starts another driver; the user is elsewhere by now."""
    run = Storage(tmp_path / "x")
    Claim.take(run, "first")
    Claim.take(run, "first", again=True).check()
    later = Claim.take(run, "second")
    with pytest.raises(TrainingFailedError, match=r"another command has begun to train .*/x; this one ends"):
        runs._claim(run, "first", again=True)
    later.check()
    Claim.take(run, "third").check()


def test_a_login_that_may_not_delete_claims_runs_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError("AccessDenied")

    monkeypatch.setattr(Storage, "delete", refused)
    first = Claim.take(Storage(tmp_path))
    Claim.take(Storage(tmp_path)).check()
    with pytest.raises(SupersededError):
        first.check()


def test_a_write_whose_answer_was_lost_is_not_taken_for_another_session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object store has it, and the connection broke: it is tried again."""
    run, before, write = Storage(tmp_path), Identity(), Storage.write_bytes
    before.write(run)
    answers = iter([False, True])

    def loses_answer(self: Storage, name: str, content: bytes) -> None:
        write(self, name, content)
        if not next(answers):
            raise OSError("the connection broke")

    monkeypatch.setattr(Storage, "write_bytes", loses_answer)
    monkeypatch.setattr("pipeline.failures.time.sleep", lambda _: None)
    new = before.begin(0)
    assert retry(lambda: before.replaced(new, run, None), lambda _: None, 30) == new
    with pytest.raises(RuntimeError, match=r"session 1 of .* has begun; session 0 ends"):
        before.check(run, None)
