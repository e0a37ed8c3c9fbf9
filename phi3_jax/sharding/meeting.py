"""The processes of a run meet before JAX starts, and learn from each other when one dies.

`jax.distributed.initialize` waits in silence, and both a process that never comes and one that dies
end the others by an abort in C++. So every process first connects to process 0, at the address that
JAX uses afterwards. The connections stay open: the system closes those of a process that dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from phi3_jax.errors import UserError, at_most_ten

NOTICE_SECONDS = 60.0
# How long a process may take to end by itself after another one died: it may know the reason.
GRACE_SECONDS = 5.0
_HELLO = "phi3-jax"


class PeerError(RuntimeError):
    """Another process of the run is missing or died; starting all of them again may help."""


class _Line:
    """A connection that carries JSON objects, one a line."""

    def __init__(self, connection: socket.socket):
        self.socket, self._rest = connection, b""
        connection.settimeout(5)  # of sending; what is received is waited for by a selector
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # A host that lost its power closes nothing; it is noticed after about 40 s.
        for name, value in (("TCP_KEEPIDLE", 20), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: dict[str, Any]) -> None:
        """Send a message; one to a process that has ended is lost."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """Messages that have arrived; None if the connection closed or sent something else."""
        try:
            data = self.socket.recv(4096)
            *lines, self._rest = (self._rest + data).split(b"\n")
            found = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return None
        well_formed = all(isinstance(message, dict) for message in found)
        return found if data and well_formed and len(self._rest) < 4096 else None


class Peers:
    """The other processes of the run, as one process sees them.

    Args:
        address: `HOST:PORT` of process 0.
        count: number of processes.
        number: this one, from 0.
        report: prints a line.
    """

    def __init__(self, address: str, count: int, number: int, report: Callable[[str], None]):
        self.address, self.count, self.number, self._report = address, count, number, report
        self._lines: dict[int, _Line] = {}
        self._strangers: list[_Line] = []  # connections that have not said who they are
        self._here = [number]
        self._started = self._noticed = time.monotonic()
        self._lost = threading.Event()
        self._reason = ""
        self._leaving = False

    def meet(self, timeout: float) -> None:
        """Wait until all processes are there, and say once a minute which are missing.

        Raises:
            PeerError: not all came in time.
            UserError: the processes were started with other numbers.
        """
        try:
            if self.number:
                self._meet_host(timeout)
            elif self.count > 1:
                self._meet_guests(timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections; the others take that for the end of this process."""
        for line in [*self._strangers, *self._lines.values()]:
            self._forget(line)

    @contextlib.contextmanager
    def together(self, exit_code: int) -> Iterator[None]:
        """While inside, end this process with a line and that code when another one dies.

        The others are told how the block ended. An error that this process has because another one
        died, such as a broken connection, is not raised: the process ends here as well.
        """
        threading.Thread(target=self._watch, args=(exit_code,), daemon=True).start()
        try:
            yield
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, UserError):
                if self._lost.wait(GRACE_SECONDS):
                    self._end(exit_code)
            self._leaving = True
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            for line in self._lines.values():
                line.send({"lost": self.number, "why": first_line[:1000]})
            raise
        self._leaving = True
        for line in self._lines.values():
            line.send({"bye": self.number})

    def _meet_guests(self, timeout: float) -> None:
        with _listen(self.address) as listener, selectors.DefaultSelector() as selector:
            selector.register(listener, selectors.EVENT_READ)
            while len(self._lines) < self.count - 1:
                for key, _ in selector.select(self._wait(timeout)):
                    if key.fileobj is listener:
                        self._strangers.append(_Line(listener.accept()[0]))
                        selector.register(self._strangers[-1].socket, selectors.EVENT_READ)
                        continue
                    line = next(
                        line
                        for line in [*self._strangers, *self._lines.values()]
                        if line.socket is key.fileobj
                    )
                    messages = line.receive()
                    if messages is None:
                        selector.unregister(line.socket)
                        self._forget(line)
                    for message in messages or ():
                        self._welcome(line, message)
                self._here = [0, *sorted(self._lines)]
                self._tell({"here": self._here})
            self._tell({"go": True})
            while self._strangers:
                self._forget(self._strangers[0])

    def _welcome(self, line: _Line, message: dict[str, Any]) -> None:
        number, count = message.get(_HELLO), message.get("count")
        if count != self.count or not isinstance(number, int) or not 0 < number < self.count:
            problem = (
                f"process {number} of {count} came to a run of {self.count} processes: give all of "
                "them the same number of processes, and each its own number"
            )
        elif number in self._lines:
            problem = f"two processes have the number {number}: give each its own"
        else:
            self._strangers.remove(line)
            self._lines[number] = line
            return
        self._report(problem)
        line.send({"refused": problem})

    def _forget(self, line: _Line) -> None:
        line.socket.close()
        if line in self._strangers:
            self._strangers.remove(line)
        for number, known in list(self._lines.items()):
            if known is line:
                del self._lines[number]

    def _meet_host(self, timeout: float) -> None:
        while True:
            try:
                line = _Line(socket.create_connection(split_address(self.address), timeout=5))
                self._lines[0] = line
            except OSError as error:
                self._wait(timeout, f"no answer from process 0 at {self.address} ({error})")
                time.sleep(0.5)
                continue
            line.send({_HELLO: self.number, "count": self.count})
            # Process 0 decides when it is over, so that all say the same.
            if self._listen_to_host(line, timeout + GRACE_SECONDS):
                return
            self.close()  # process 0 ended, and may be started again
            time.sleep(0.5)

    def _listen_to_host(self, line: _Line, timeout: float) -> bool:
        """Whether all came; False if process 0 ended before."""
        with selectors.DefaultSelector() as selector:
            selector.register(line.socket, selectors.EVENT_READ)
            while True:
                if not selector.select(self._wait(timeout)):
                    continue
                messages = line.receive()
                if messages is None:
                    return False
                for message in messages:
                    if "refused" in message:
                        raise UserError(message["refused"])
                    if "end" in message:
                        raise PeerError(message["end"])
                    if "go" in message:
                        return True
                    self._here = message.get("here", self._here)

    def _wait(self, timeout: float, problem: str = "") -> float:
        """Seconds until the next notice, which is given here; raises PeerError after `timeout`."""
        now = time.monotonic()
        passed = now - self._started
        if not problem:
            missing = [n for n in range(self.count) if n not in self._here]
            problem = f"missing: {', '.join(at_most_ten(map(str, missing)))}"
        text = f"{len(self._here)} of {self.count} processes are there after {passed:.0f} s"
        text += f"; {problem}. Start the same command on every host"
        if passed >= timeout:
            self._tell({"end": text})
            raise PeerError(text)
        if now - self._noticed >= min(NOTICE_SECONDS, timeout):
            self._noticed = now
            self._report(text)
        return max(0.1, min(self._noticed + NOTICE_SECONDS, self._started + timeout) - now)

    def _tell(self, message: dict[str, Any]) -> None:
        if self.number == 0:
            for line in self._lines.values():
                line.send(message)

    def _watch(self, exit_code: int) -> None:
        dead = self._wait_for_death()
        if dead is None:
            return
        number, why = dead
        self._reason = (
            f"process {number} of {self.count} has ended before the others"
            f"{f' ({why})' if why else ''}. Start all processes again with --resume=auto"
        )
        self._tell({"lost": number, "why": why})
        self._lost.set()
        time.sleep(GRACE_SECONDS)
        if not self._leaving:
            self._end(exit_code)

    def _end(self, exit_code: int) -> NoReturn:
        """End at once: at a regular end JAX would wait for the process that died, and abort."""
        self._report(self._reason)
        sys.stdout.flush()
        os._exit(exit_code)

    def _wait_for_death(self) -> tuple[int, str] | None:
        """Which process ended early, and why; None once none is left to watch."""
        with selectors.DefaultSelector() as selector:
            for number, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, number)
            while selector.get_map():
                for key, _ in selector.select():
                    messages = self._lines[key.data].receive()
                    if messages is None:
                        return int(key.data), ""
                    for message in messages:
                        if "lost" in message:
                            return int(message["lost"]), str(message.get("why", ""))
                        if "bye" in message:
                            selector.unregister(key.fileobj)
        return None


def _listen(address: str) -> socket.socket:
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", f"[::]:{split_address(address)[1]}")
    host, port = split_address(bind)
    try:
        if host == "::" and socket.has_dualstack_ipv6():
            return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=True)
        family = socket.AF_INET6 if ":" in host and host != "::" else socket.AF_INET
        return socket.create_server(("" if host == "::" else host, port), family=family)
    except OSError as error:
        raise UserError(
            f"process 0 cannot listen on port {port} ({error.strerror}): is another run using it? "
            "Choose another port in JAX_COORDINATOR_ADDRESS"
        ) from None


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`; an IPv6 address stands in brackets."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"the address of process 0 must be HOST:PORT, not {address!r}")
    return host.removeprefix("[").removesuffix("]"), int(port)
