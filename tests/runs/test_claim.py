"""Two drivers on one store, in every order of their calls: one goes on, the one that came last by its claim."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from interleaving import Turns, in_memory
from s3 import s3_storage

from pipeline.errors import UserError
from pipeline.failures import TrainingFailedError, retry
from pipeline.runs.claim import FOLDER, Claim, SupersededError
from pipeline.runs.manifest import RunManifest
from pipeline.storage import Storage
from pipeline.training import open_run

CALLS = ("names", "write_bytes", "read_bytes", "delete")


def every_order(monkeypatch: pytest.MonkeyPatch, make: Callable[[], list[Callable[[], None]]]) -> Iterator[None]:
    """Run what `make` returns in each order of its storage calls, and give the caller the end of each."""
    following: list[int] | None = []
    while (choices := following) is not None:
        taken = list[tuple[int, int]]()  # chosen, of how many

        def choose(ready: list[int]) -> int:
            chosen = choices[len(taken)] if len(taken) < len(choices) else 0  # noqa: B023
            taken.append((chosen, len(ready)))  # noqa: B023
            return ready[chosen]

        with monkeypatch.context() as patch:
            in_memory(patch, turns := Turns(choose), CALLS)
            turns.run(make())
            yield
        following = _next([chosen for chosen, _ in taken], [number for _, number in taken])


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
    monkeypatch.setattr("pipeline.runs.claim.uuid", names)
    for _ in every_order(monkeypatch, make):
        orders += 1
        assert max((run / FOLDER).names()) in ended
        assert may_write == sorted(may_write), "the earlier one wrote when the later one had come"
    assert orders > 400


def test_what_an_earlier_driver_writes_at_last_ends_nothing_of_the_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its attempt's end, written between any two calls of the later one's start."""
    run, seen = Storage("s3://run"), dict[str, object]()

    def earlier() -> None:
        try:
            open_now.replaced(open_now.end(), run, claims[0])
        except SupersededError:
            seen["earlier"] = "superseded"

    def later() -> None:
        claim = Claim.take(run)
        read = RunManifest.read(run, pytest.fail)
        assert read is not None
        begun = read.replaced(read.begin(0), run, claim)
        seen["run.json"] = RunManifest.read(run, pytest.fail)
        seen["later"] = begun.replaced(begun.end(), run, claim)

    claims, open_now = list[Claim](), RunManifest(training_id="t").begin(0)

    def make() -> list[Callable[[], None]]:
        seen.clear()
        claims[:] = [Claim.take(run)]
        open_now.write(run)
        return [earlier, later]

    orders = 0
    for _ in every_order(monkeypatch, make):
        orders += 1
        ended = seen["later"]
        assert isinstance(ended, RunManifest)
        assert (ended.training_id, ended.attempts, ended.open) == ("t", 2, False)
        if "earlier" in seen:
            assert seen["run.json"] == dataclasses.replace(ended, open=True)
            assert RunManifest.read(run, pytest.fail) == ended
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
    with pytest.raises(OSError, match="is not visible; mount the same"):
        second.check()


def test_a_command_that_comes_second_is_told_so(tmp_path: Path) -> None:
    line = r"run.name=x: another command begins to train it just now; wait for its end"
    with pytest.raises(UserError, match=line), open_run._as_second(Storage(tmp_path / "x"), reclaims=False):
        raise SupersededError("")


def test_a_driver_that_is_started_again_takes_nothing_from_a_later_command(tmp_path: Path) -> None:
    """A machine that was cut off comes back, and its supervisor starts another driver; the user is elsewhere by now."""
    run = Storage(tmp_path / "x")
    Claim.take(run, "first")
    Claim.take(run, "first", reclaims=True).check()
    later = Claim.take(run, "second")
    line = r"another command has begun to train .*/x; this one ends"
    with pytest.raises(TrainingFailedError, match=line), open_run._as_second(run, reclaims=True):
        Claim.take(run, "first", reclaims=True)
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


def test_a_write_whose_answer_was_lost_is_not_taken_for_another_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The object store has it, and the connection broke: it is tried again."""
    run, before, write = Storage(tmp_path), RunManifest(), Storage.write_bytes
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
    with pytest.raises(RuntimeError, match=r"attempt 1 of .* has begun; attempt 0 ends"):
        before.check(run, None)
