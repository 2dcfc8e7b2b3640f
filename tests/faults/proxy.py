"""A bad network in front of a real HTTP server: lost, late and refused requests."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import threading
import time
from collections import Counter
from typing import Self

METHODS = (b"GET ", b"PUT ", b"POST ", b"HEAD ", b"DELETE ")
BUSY = b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


class BadNetwork:
    """Forwards to a loopback port, and does one of `FAULTS` to a share of the requests.

    `reset`: the connection breaks before the server hears of it. `503`: refused. `lost`: the
    server does it, but its answer never arrives. `slow`: it takes `delay` seconds longer.
    """

    FAULTS = ("reset", "503", "lost", "slow")

    def __init__(self, port: int, share: float, seed: int, delay: float = 1.0) -> None:
        self._target, self._share, self._delay = port, share, delay
        self._random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]

    def __enter__(self) -> Self:
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()
        return self

    def __exit__(self, *_: object) -> None:
        _close(self._listener)  # wakes up who accepts
        self._accepting.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # closed
                return
            try:
                server = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                _reset(client)
                continue
            threading.Thread(target=self._serve, args=(client, server), daemon=True).start()

    def _serve(self, client: socket.socket, server: socket.socket) -> None:
        lost = threading.Event()
        with client, server:
            answers = threading.Thread(target=self._answers, args=(client, server, lost))
            answers.start()
            self._requests(client, server, lost)
            answers.join()

    def _requests(
        self, client: socket.socket, server: socket.socket, lost: threading.Event
    ) -> None:
        try:
            while data := client.recv(1 << 16):
                fault = ""
                if data.startswith(METHODS):
                    fault = self._random.choice(self.FAULTS)
                    fault = fault if self._random.random() < self._share else "none"
                    self.done[fault] += 1
                if fault == "503":
                    client.sendall(BUSY)
                    break
                if fault == "reset":
                    _reset(client)
                    break
                if fault == "lost":
                    lost.set()
                if fault == "slow":
                    time.sleep(self._delay)
                server.sendall(data)
        except OSError:
            pass
        _close(server)
        if not lost.is_set():
            _close(client)

    def _answers(self, client: socket.socket, server: socket.socket, lost: threading.Event) -> None:
        try:
            while data := server.recv(1 << 16):
                if lost.is_set():
                    break
                client.sendall(data)
        except OSError:
            pass
        _close(client)


def _reset(connection: socket.socket) -> None:
    """Break a connection so that the other end sees a reset."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def _close(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
