"""Work that goes on while the training step computes."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
ASK_AGAIN = 0.1  # seconds after which a thread that waits for room looks whether it is still needed
PATIENCE = 5.0  # seconds for a thread that is still reading when nobody needs it any more


class _End(Exception):
    pass


def ahead(items: Iterator[T], length: int) -> Generator[T, None, None]:
    """The same items, made by a thread, up to `length` of them before they are asked for.

    The thread starts with the first item and ends with the last, or when the generator is closed. What `items` raises
    is raised here.
    """
    queue: Queue[tuple[T | None, BaseException | None]] = Queue(length)
    closed = Event()

    def put(item: T | None, error: BaseException | None = None) -> None:
        while not closed.is_set():
            try:
                return queue.put((item, error), timeout=ASK_AGAIN)
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put(item)
                if closed.is_set():
                    return
            put(None, _End())
        except BaseException as error:
            put(None, error)

    thread = Thread(target=work, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            item, error = queue.get()
            if isinstance(error, _End):
                return
            if error is not None:
                raise error
            yield item  # type: ignore[misc]
    finally:
        closed.set()
        thread.join(PATIENCE)
