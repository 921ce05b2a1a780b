"""The network namespaces of a fork server's children: one in which nobody has ever made a socket is used again.

A new one costs a short run a tenth of its processor time. Only through a socket can a program that has no rights leave
anything in one. So the kernel asks, each time that a child is about to make a socket, whether it may go on: a filter
for system calls that the fork server has put on itself, and so on all its children. Such a namespace is not used again.
Source: the kernel's Documentation/userspace-api/seccomp_filter.rst and linux/seccomp.h.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import struct

RECEIVE, SEND = 0xC0502100, 0xC0182101
"""SECCOMP_IOCTL_NOTIF_RECV and SECCOMP_IOCTL_NOTIF_SEND."""
NOTICE, ANSWER = struct.Struct("<QI68x"), struct.Struct("<QqiI")
"""The kernel's struct seccomp_notif, of which we need what it is called and which process it is about; and struct
seccomp_notif_resp."""
GO_ON = 1
"""SECCOMP_USER_NOTIF_FLAG_CONTINUE."""
AT_ONCE, PAUSE_S = 256, 0.002
"""So many sockets in one namespace are let through at once, and then one after each pause: a program that does nothing
but make sockets is to leave the server its time."""


class Network:
    """A network namespace, as an open file. `is_used`: somebody has made a socket there, or may have.

    `sockets` is how many, and `next_at` when the next may be made (seconds, the loop's clock).
    """

    def __init__(self, file: int) -> None:
        self.file = file
        self.number = os.fstat(file).st_ino
        self.is_used = False
        self.sockets = 0
        self.next_at = 0.0


class Networks:
    """Those of one fork server."""

    def __init__(self, listener: int) -> None:
        """`listener` is the descriptor at which the kernel asks, taken over; or -1: then none is used again."""
        self._listener = listener
        self._loop: asyncio.AbstractEventLoop | None = None
        self._free: list[Network] = []
        self._known: dict[int, Network] = {}

    def listen(self) -> None:
        """Answers from now on."""
        if self._listener < 0:
            return
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._listener, self._asked)

    def take(self) -> Network | None:
        """One that is like new, if there is one."""
        return self._free.pop() if self._free else None

    def of(self, pid: int) -> Network | None:
        """The one that a child which is not yet a program has made for itself. None if it is not to be used again."""
        if self._listener < 0:
            return None
        try:
            network = Network(os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        except OSError:  # it is gone, or this user may not look
            return None
        self._known[network.number] = network
        return network

    def give_back(self, network: Network) -> None:
        """Nobody is in it any more."""
        if self._listener >= 0 and not network.is_used:
            self._free.append(network)
        else:
            self._known.pop(network.number, None)
            os.close(network.file)

    def close(self) -> None:
        """Closes the descriptors, those that are given back later at that moment."""
        if self._listener >= 0:
            if self._loop is not None:
                self._loop.remove_reader(self._listener)
            os.close(self._listener)
            self._listener = -1
        while self._free:
            self.give_back(self._free.pop())

    def _asked(self) -> None:
        """Lets a child make its socket, once its network is known to be used.

        A question is read at once: from then on, a signal does not interrupt the child.
        """
        assert self._loop is not None
        question = bytearray(NOTICE.size)
        try:
            fcntl.ioctl(self._listener, RECEIVE, question)
        except OSError:  # it has ended meanwhile, and makes none
            return
        name, pid = NOTICE.unpack(question)
        network = self._used(pid)
        if network is None or network.sockets < AT_ONCE:
            self._let(name)
        else:
            network.next_at = max(network.next_at, self._loop.time()) + PAUSE_S
            self._loop.call_at(network.next_at, self._let, name)
        if network is not None:
            network.sockets += 1

    def _let(self, name: int) -> None:
        if self._listener >= 0:
            with contextlib.suppress(OSError):  # it has ended meanwhile
                fcntl.ioctl(self._listener, SEND, ANSWER.pack(name, 0, 0, GO_ON))

    def _used(self, pid: int) -> Network | None:
        """The network of a process, which is used from now on. If nobody knows which it is, all are."""
        try:
            network = self._known[os.stat(f"/proc/{pid}/ns/net").st_ino]
        except (OSError, KeyError):
            for network in self._known.values():
                network.is_used = True
            return None
        network.is_used = True
        return network
