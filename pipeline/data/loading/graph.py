"""How a DALI graph is driven: one stream of items after another, several items at once."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Source = Callable[[], tuple[Any, ...]]  # a graph's inputs, batch by batch


class Graph(Generic[T]):
    """A DALI graph that works on several items at once, of one stream after another.

    Args:
        build: the graph, of its source of inputs.
        inputs: of an item.
    """

    def __init__(self, build: Callable[[Source], Any], inputs: Callable[[T], tuple[Any, ...]]):
        self._inputs, self.in_flight = inputs, deque[T]()
        self._items: Iterator[T] = iter(())
        self._graph: Any = build(self._take)

    def begin(self, items: Iterator[T]) -> None:
        """The items of the next stream. Of each it keeps hold until `run` has returned it."""
        self._items = items

    def run(self, *stream: Any) -> tuple[T, Any]:
        """The next item and what the graph makes of it; StopIteration after the last one."""
        images, *_ = self._graph.run(*stream)
        return self.in_flight.popleft(), images

    def finish(self) -> None:
        """Leave out what is left of the stream; ready for another one."""
        self._items = iter(())
        with suppress(StopIteration):
            while True:
                self.run()
        self._graph.reset()

    @property
    def closed(self) -> bool:
        return self._graph is None

    def close(self) -> None:
        self._graph = None  # which refers to this
        self._items = iter(())

    def _take(self) -> tuple[Any, ...]:
        item = next(self._items)
        self.in_flight.append(item)
        return self._inputs(item)
