"""Asking the probes of a process, as Kubernetes would."""

from __future__ import annotations

import http.client
import json
from typing import Any

import anyio.to_thread

from jobq.cli.probes import Address


def ask_now(address: Address, path: str) -> tuple[int, dict[str, Any]]:
    """One GET, from the calling thread: its status, and the document."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=20)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


async def ask(address: Address, path: str) -> tuple[int, dict[str, Any]]:
    """One GET, while the event loop goes on."""
    return await anyio.to_thread.run_sync(ask_now, address, path)


async def failing(address: Address) -> list[str]:
    """The names of the checks that keep a process from being ready."""
    status, document = await ask(address, "/readyz")
    assert status == (503 if document["failing"] else 200)
    return list(document["failing"])
