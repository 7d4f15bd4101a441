"""The link between driver and workers: who waits is told at once, and who is of an earlier session is not heard."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from pipeline import link
from pipeline.link import Link


def after(seconds: float, call: Coroutine[Any, Any, None], asked: Coroutine[Any, Any, Any]) -> Any:
    """What `asked` returns where `call` comes so many seconds later; it may not wait for much longer."""

    async def both() -> Any:
        waiting = asyncio.ensure_future(asked)
        await asyncio.sleep(seconds)
        await call
        return await asyncio.wait_for(waiting, 30)

    return asyncio.run(both())


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_WAIT_S", 60.0)


def told(*calls: Coroutine[Any, Any, Any]) -> list[Any]:
    """What each of these calls, one after the other, returns."""

    async def all_of_them() -> list[Any]:
        return [await call for call in calls]

    return asyncio.run(all_of_them())


def begun(attempt: int) -> Link:
    one = Link()
    told(one.begin(attempt))
    return one


def test_who_waits_is_told_at_once() -> None:
    event = {"kind": "note", "text": "x"}
    one = begun(1)
    assert after(0.1, one.emit(1, event), one.take_events()) == [event]
    one = begun(1)
    assert after(0.1, one.request_stop("regroup"), one.poll(1, 7)) == "regroup"
    assert told(one.step()) == [7]


def test_another_answer_does_not_end_a_wait() -> None:
    """Else each event would have all ask again."""
    one = begun(1)

    async def events_and_then_a_stop() -> None:
        for _ in range(3):
            await one.emit(1, {"kind": "note"})
            await asyncio.sleep(0)
        await one.request_stop("interrupted")

    assert after(0.0, events_and_then_a_stop(), one.poll(1, 0)) == "interrupted"


def test_nothing_new_is_told_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_WAIT_S", 0.05)
    one = begun(1)
    assert told(one.poll(1, 0), one.take_events()) == [None, []]


def test_an_earlier_session_is_not_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "MAX_WAIT_S", 0.05)
    one = begun(2)
    told(one.emit(1, {"kind": "step"}), one.join(1, "node"), one.fail(1, "E", "x"))
    with pytest.raises(RuntimeError, match="session 2 has begun"):  # which ends the worker that asks
        told(one.poll(1, 99))
    assert told(one.take_events(wait=False), one.nodes(), one.fatal(), one.step()) == [[], set(), None, 0]


def test_a_stop_of_the_user_is_not_replaced_by_a_regrouping() -> None:
    one = begun(1)
    assert told(one.request_stop("interrupted"), one.request_stop("regroup"), one.poll(1, 0))[-1] == "interrupted"
