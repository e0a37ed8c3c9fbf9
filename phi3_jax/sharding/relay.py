"""Carries a process's connection to JAX's coordination service, which process 0 runs.

JAX aborts a process with a C++ stack as soon as this connection breaks, often before it learns from
the other processes (`meeting`) that process 0 died, and it takes no callback from Python. So
processes connect through a small program that keeps their side open for a while. It is a process of
its own, since a thread here could wait for a lock that is held until the service answers.

Run as a script with HOST and PORT of the service; ends when its standard input closes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time

# How long a connection that the service closed stays open: longer than a process needs to end.
LINGER_SECONDS = 15.0


def start_relay(host: str, port: int) -> str:
    """Start the program; it ends with this process.

    Args:
        host: name or address of process 0.
        port: that of JAX's coordination service there.

    Returns:
        The address to connect to instead, `HOST:PORT`; empty if the program does not run here.
    """
    # The pipe's write end is never closed here, so the program's input ends when this process does,
    # however that happens.
    (stdin, _), (address, stdout) = os.pipe(), os.pipe()
    os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", __file__, host, str(port)],
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, stdin, 0), (os.POSIX_SPAWN_DUP2, stdout, 1)],
    )
    os.close(stdin)
    os.close(stdout)
    with open(address) as said:
        return said.read().strip()


def main(host: str, port: int) -> None:
    """Relay connections until the standard input closes."""
    os.setsid()  # a terminal's Ctrl-C is meant for the run, which still needs the connection
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    listener = socket.create_server(("127.0.0.1", 0))
    os.write(1, f"127.0.0.1:{listener.getsockname()[1]}".encode())
    os.close(1)
    threading.Thread(target=_accept, args=(listener, host, port), daemon=True).start()
    while os.read(0, 1):
        pass
    os._exit(0)


def _accept(listener: socket.socket, host: str, port: int) -> None:
    while True:
        client, _ = listener.accept()
        threading.Thread(target=_connect, args=(client, host, port), daemon=True).start()


def _connect(client: socket.socket, host: str, port: int) -> None:
    try:
        service = socket.create_connection((host, port))
    except OSError:
        client.close()  # JAX tries again until its own timeout
        return
    threading.Thread(target=_pump, args=(client, service, 0.0), daemon=True).start()
    _pump(service, client, LINGER_SECONDS)


def _pump(source: socket.socket, sink: socket.socket, linger: float) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            sink.sendall(data)
    time.sleep(linger)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
