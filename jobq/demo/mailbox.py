"""A mail server that keeps what it receives.

Invariant: a mail counts from the moment the server has it, whether or not its sender lives to hear so.
Called by demo. Calls aiosmtpd.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email import message_from_bytes
from typing import NamedTuple

import anyio
from aiosmtpd.smtp import SMTP, Envelope, Session

_ANSWER_S = (0.05, 0.25)


class Mail(NamedTuple):
    """What is kept of a mail."""

    to: str
    message_id: str


class Mailbox:
    """Receives mail on a port of 127.0.0.1. It takes its time to answer, as mail servers do."""

    def __init__(self, seed: int):
        self.mails: list[Mail] = []
        self.slowness = 1.0
        """How many times longer than usual it takes to answer."""
        self._seed = seed

    @asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        """Yield the server's address, host:port."""
        loop = asyncio.get_running_loop()
        # With a host name given, nobody asks the DNS for one.
        server = await loop.create_server(lambda: SMTP(self, hostname="mail.example", loop=loop), "127.0.0.1", 0)
        try:
            yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802  its name
        assert isinstance(envelope.content, bytes)
        message = message_from_bytes(envelope.content)
        to = envelope.rcpt_tos[0]
        self.mails.append(Mail(to, message["Message-ID"]))
        # Crash here, of the sender: it has sent the mail, does not know it, and sends it again.
        usual_s = random.Random(f"{self._seed} {to}").uniform(*_ANSWER_S)  # noqa: S311  not a secret
        await anyio.sleep(usual_s * self.slowness)
        return "250 OK"
