"""Things that take a while to make and are used once: some are made ahead, in threads, off the path of a run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from background import spawn


class Perishable(Protocol):
    """What can be kept ready."""

    def is_good(self) -> bool:
        """Whether it can still be used."""

    async def discard(self) -> None:
        """Gives it back unused."""


Thing = TypeVar("Thing", bound=Perishable)


class Ready(Generic[Thing]):
    """So many of a thing, ready to be taken. Each one that is taken is replaced in the background."""

    def __init__(self, make: Callable[[], Thing], count: int) -> None:
        """`make` may block; it is called in threads."""
        self._make = make
        self._count = count
        self._ready: list[Thing] = []
        self._making = 0
        self._in_making: set[asyncio.Task[None]] = set()
        # Threads of its own, which live as long as this: the kernel may end a child with the thread that started it.
        self._threads = ThreadPoolExecutor(max(1, count), thread_name_prefix="ready")

    async def fill(self) -> None:
        """Makes the first ones. Raises what `make` does."""
        self._ready += await asyncio.gather(*(self._made() for _ in range(self._count)))

    async def take(self) -> Thing:
        """One that is ready, or else one made now. Raises what `make` does."""
        try:
            while self._ready:
                thing = self._ready.pop(0)
                if thing.is_good():
                    return thing
                await thing.discard()
        finally:
            self._refill()
        return await self._made()

    async def close(self) -> None:
        """Discards what was not taken."""
        self._count = 0
        while self._in_making:
            await asyncio.wait(self._in_making)
        for thing in self._ready:
            await thing.discard()
        self._ready.clear()
        self._threads.shutdown()

    async def _made(self) -> Thing:
        making = asyncio.get_running_loop().run_in_executor(self._threads, self._make)
        try:
            return await asyncio.shield(making)
        except asyncio.CancelledError:
            await (await making).discard()  # whoever wanted it is gone, but it was made
            raise

    def _refill(self) -> None:
        for _ in range(self._count - len(self._ready) - self._making):
            self._making += 1
            refill = spawn(self._add(), name="refill")
            self._in_making.add(refill)
            refill.add_done_callback(self._in_making.discard)

    async def _add(self) -> None:
        try:
            thing = await self._made()
        finally:
            self._making -= 1
        self._ready.append(thing)
