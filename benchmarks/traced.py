"""A `jobq` command with a watch in its hand: `python -m benchmarks.traced worker benchmarks.app:jobs ...`.

The calls of the broker and of the outbox are wrapped here, from outside. Stamps are nanoseconds of CLOCK_MONOTONIC,
which all processes of a Linux machine share, and go as datagrams to the socket in BENCH_STAMPS: a letter, then for
each job its id and the stamp.

    p  the relay sends the entry to Redis       f  the worker has it from Redis
    r  the worker has its row from PostgreSQL   s  the first line of the task

What a worker saw of a job it sends when the job has started, and only for jobs of the task `probe`. What a relay saw
it sends a moment later: whoever is told wakes up for it, on one of few cores, while the job is on its way. Run by
latency.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys
import time
from collections.abc import Iterable
from typing import Any
from uuid import UUID

from jobq.broker.scripts import Broker
from jobq.cli import main
from jobq.outbox import settle

from . import app

STAMP = struct.Struct("<16sq")
PUSHED, FETCHED, READ, STARTED = b"p", b"f", b"r", b"s"
_TOLD_AFTER_S = 0.010


def trace(send: Any) -> None:
    """Have this process send stamps."""
    push, read = Broker.push, settle.read
    fetched: dict[bytes, int] = {}
    has_read: dict[bytes, int] = {}

    async def stamped_push(self: Broker, queue: str, entries: Any, **options: Any) -> Any:
        if entries:
            stamps = message(PUSHED, map(_id_of, entries), time.monotonic_ns())
            asyncio.get_running_loop().call_later(_TOLD_AFTER_S, send, stamps)
        return await push(self, queue, entries, **options)

    def stamped(fetch: Any) -> Any:
        async def stamped_fetch(*args: Any, **options: Any) -> Any:
            answer = await fetch(*args, **options)
            if answer is not None:
                fetched.update(dict.fromkeys(map(_id_of, answer.entries), time.monotonic_ns()))
            return answer

        return stamped_fetch

    async def stamped_read(tx: Any, schema: str, ids: Iterable[UUID]) -> Any:
        ids = list(ids)
        jobs = await read(tx, schema, ids)
        has_read.update(dict.fromkeys((id_.bytes for id_ in ids), time.monotonic_ns()))
        return jobs

    def note_start(job_id: UUID) -> None:
        started_at = time.monotonic_ns()
        id_ = job_id.bytes
        send(message(STARTED, [id_], started_at))
        send(message(FETCHED, [id_], fetched[id_]))
        send(message(READ, [id_], has_read[id_]))
        fetched.clear()
        has_read.clear()

    Broker.push, settle.read = stamped_push, stamped_read  # type: ignore[method-assign]
    Broker.fetch, Broker.fetch_at_bell = stamped(Broker.fetch), stamped(Broker.fetch_at_bell)  # type: ignore[method-assign]
    app.note_start = note_start


def message(letter: bytes, ids: Iterable[bytes], at: int) -> bytes:
    return letter + b"".join(STAMP.pack(id_, at) for id_ in ids)


def _id_of(entry: str | bytes) -> bytes:
    text = entry if isinstance(entry, str) else entry.decode()
    return bytes.fromhex(text[:32])


if __name__ == "__main__":
    stamps = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    stamps.connect(os.environ["BENCH_STAMPS"])
    trace(stamps.send)
    sys.argv[0] = "jobq"
    main()
