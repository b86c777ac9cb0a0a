"""`/healthz` and `/readyz` over HTTP, for Kubernetes, load balancers and people.

It answers from an event loop in a thread of its own, so also while the process's own loop is blocked. Invariant:
nothing is asked of a store, and no client holds more than one of _CLIENTS_LIMIT places for _DEADLINE_S.
Called by run. Calls health.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http import HTTPStatus
from typing import Any, NamedTuple

import click

from ..health import Check, Part
from .failures import Failure

log = logging.getLogger(__name__)

_DEADLINE_S = 5.0
_CLIENTS_LIMIT = 64
_REQUEST_LIMIT = 8192


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class AddressType(click.ParamType):  # type: ignore[type-arg]  # before click 8.4 it takes none
    """HOST:PORT, or [HOST]:PORT for IPv6. Listening on every interface has to be said: 0.0.0.0 or [::]."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        if isinstance(value, Address):
            return value
        host, separator, port = str(value).rpartition(":")
        is_bracketed = host.startswith("[") and host.endswith("]")
        if not separator or not port.isdecimal() or int(port) > 65_535 or (":" in host and not is_bracketed):
            self.fail(f"{value!r} is no HOST:PORT: write 127.0.0.1:8080, or [::1]:8080 for IPv6", param, ctx)
        host = host[1:-1] if is_bracketed else host
        if not host or host == "*":
            self.fail(
                f"{value!r} names no host: 127.0.0.1:{port} answers this machine alone, 0.0.0.0:{port} everybody",
                param,
                ctx,
            )
        return Address(host, int(port))


@contextmanager
def probed(address: Address | None, parts: Sequence[Part]) -> Iterator[Address | None]:
    """Answer probes about `parts` while the block lasts. Fails at once when the address cannot be had."""
    if address is None:
        yield None
        return
    with ExitStack() as stack:
        sockets = _listen(address, stack)
        bound = Address(address.host, sockets[0].getsockname()[1])
        loop, stopping = asyncio.new_event_loop(), asyncio.Event()
        thread = threading.Thread(target=_serve, args=(loop, stopping, sockets, parts), name="jobq health", daemon=True)
        thread.start()
        stack.callback(thread.join, _DEADLINE_S)
        stack.callback(loop.call_soon_threadsafe, stopping.set)
        log.info("health answers", extra={"fields": {"at": f"http://{bound}", "paths": "/healthz,/readyz"}})
        yield bound


def _listen(address: Address, stack: ExitStack) -> list[socket.socket]:
    """Listen on every address that the host's name stands for; at least one."""
    sockets: list[socket.socket] = []
    trouble: OSError | None = None
    port = address.port
    try:
        found = socket.getaddrinfo(address.host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Failure(f"--health {address}: no such host ({error.strerror}); use an address of this machine") from error
    for family, _, _, _, place in dict.fromkeys(found):
        try:
            one = socket.create_server((place[0], port, *place[2:]), family=family, backlog=_CLIENTS_LIMIT)
        except OSError as error:
            trouble = error
        else:
            sockets.append(stack.enter_context(one))
            port = one.getsockname()[1]
    if not sockets:
        assert trouble is not None
        reason = os.strerror(trouble.errno or 0)
        raise Failure(f"--health {address}: cannot listen there ({reason}); choose another port or host")
    return sockets


def _serve(
    loop: asyncio.AbstractEventLoop, stopping: asyncio.Event, sockets: Sequence[socket.socket], parts: Sequence[Part]
) -> None:
    clients: dict[asyncio.Task[Any], asyncio.StreamWriter] = {}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            if len(clients) < _CLIENTS_LIMIT:
                clients[task] = writer
                async with asyncio.timeout(_DEADLINE_S):
                    writer.write(_answer(await reader.readuntil(b"\r\n\r\n"), parts))
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        except (TimeoutError, OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # slow, gone, or no HTTP
        except Exception:
            log.exception("a probe could not be answered")
        finally:
            writer.transport.abort()
            clients.pop(task, None)

    async def serve() -> None:
        servers = [await asyncio.start_server(answer, sock=one, limit=_REQUEST_LIMIT) for one in sockets]
        await stopping.wait()
        for server in servers:
            server.close()
        for writer in clients.values():
            writer.transport.abort()
        while clients:
            await asyncio.wait(list(clients))

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(serve())


def _answer(request: bytes, parts: Sequence[Part]) -> bytes:
    method, _, rest = request.partition(b"\r\n")[0].decode("latin-1").partition(" ")
    path, _, version = rest.partition(" ")
    if not version.startswith("HTTP/1."):
        return _response(HTTPStatus.BAD_REQUEST, {"error": "this is no HTTP/1.1 request"})
    if method not in ("GET", "HEAD"):
        return _response(HTTPStatus.METHOD_NOT_ALLOWED, {"error": "only GET and HEAD"})
    path = path.partition("?")[0]
    if path == "/healthz":
        checks = [_named(part, part.pulse.check()) for part in parts]
    elif path == "/readyz":
        checks = [_named(part, check) for part in parts for check in part.checks()]
    else:
        return _response(HTTPStatus.NOT_FOUND, {"error": "only /healthz and /readyz"})
    failing = [check.name for check in checks if not check.ok]
    status = HTTPStatus.SERVICE_UNAVAILABLE if failing else HTTPStatus.OK
    document = {"ok": not failing, "failing": failing, "checks": [check._asdict() for check in checks]}
    return _response(status, document, has_body=method == "GET")


def _named(part: Part, check: Check) -> Check:
    return check._replace(name=f"{part.pulse.part}.{check.name}")


def _response(status: HTTPStatus, document: dict[str, Any], *, has_body: bool = True) -> bytes:
    body = json.dumps(document, indent=1).encode() + b"\n"
    lines = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
        "Cache-Control: no-store",
        "Connection: close",
        *(["Allow: GET, HEAD"] if status is HTTPStatus.METHOD_NOT_ALLOWED else []),
    ]
    return "\r\n".join([*lines, "", ""]).encode() + (body if has_body else b"")
