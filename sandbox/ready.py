"""Things that take a while to make and are used once: some are made ahead, off the path of a run."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from typing import Generic, Protocol, TypeVar

from background import spawn


class Perishable(Protocol):
    """What can be kept ready."""

    def is_good(self) -> bool:
        """Whether it can still be used."""

    async def discard(self) -> None:
        """Gives it back unused."""


LEFT_FOR_FIRST = 1
"""So many are left for the first run of a client by those who have runs under way: a flood takes none that waits."""

Thing = TypeVar("Thing", bound=Perishable)


class Ready(Generic[Thing]):
    """So many of a thing, ready to be taken. Each one that is taken is replaced in the background.

    Whoever finds none waits for the next one that is made, whatever it was made for.
    """

    def __init__(self, make: Callable[[], Awaitable[Thing]], count: int) -> None:
        """As many are made at once as are kept ready, or one."""
        self._make = make
        self._count = count
        self._at_once = max(1, count)
        self._ready: deque[Thing] = deque()
        self._waiting: deque[asyncio.Future[Thing]] = deque()
        self._making = 0
        self._in_making: set[asyncio.Task[None]] = set()

    async def fill(self) -> None:
        """Makes the first ones. Raises what `make` does."""
        self._ready.extend(await asyncio.gather(*(self._make() for _ in range(self._count))))

    async def take(self, leave: int = 0) -> Thing:
        """One that is ready, if more than `leave` are, or else the next one that is made. Raises what `make` does."""
        while len(self._ready) > leave:
            thing = self._ready.popleft()
            if thing.is_good():
                self._refill(self._missing())
                return thing
            await thing.discard()
        wanted: asyncio.Future[Thing] = asyncio.get_running_loop().create_future()
        self._waiting.append(wanted)
        self._refill(self._missing())
        try:
            return await wanted
        except asyncio.CancelledError:
            if wanted.done() and not wanted.cancelled() and wanted.exception() is None:
                self._give(wanted.result())  # whoever wanted it is gone, but it was made
            raise

    async def close(self) -> None:
        """Discards what was not taken."""
        self._count = 0
        while self._in_making:
            await asyncio.wait(self._in_making)
        for thing in self._ready:
            await thing.discard()
        self._ready.clear()

    def _refill(self, more: int = 0) -> None:
        """Makes what is waited for, and `more`."""
        wanted = len(self._waiting) + more - self._making
        for _ in range(min(wanted, self._at_once - self._making)):
            self._making += 1
            refill = spawn(self._add(), name="refill")
            self._in_making.add(refill)
            refill.add_done_callback(self._in_making.discard)

    def _missing(self) -> int:
        return self._count - len(self._ready)

    async def _add(self) -> None:
        try:
            thing = await self._make()
        except Exception as failure:
            self._making -= 1
            for wanted in self._next_waiting():
                wanted.set_exception(failure)
                self._refill()
                return
            raise
        self._making -= 1
        self._give(thing)
        self._refill(self._missing())

    def _give(self, thing: Thing) -> None:
        for wanted in self._next_waiting():
            wanted.set_result(thing)
            return
        self._ready.append(thing)

    def _next_waiting(self) -> Iterator[asyncio.Future[Thing]]:
        while self._waiting:
            wanted = self._waiting.popleft()
            if not wanted.done():
                yield wanted
