"""What happens after an order is committed. `jobq worker shop.jobs:jobs` runs it.

A job runs at least once. What that means depends on where its effect is:

- in our database (`book`), `ctx.complete()` commits it together with the job's own end: exactly once;
- elsewhere (`send_receipt`), nobody can promise that: a worker may die between the mail and its note that
  the mail is sent. So every attempt carries one key, by which the other side can tell a repetition.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from email.message import EmailMessage

import aiosmtplib

from jobq import Context, JobQ, RetryPolicy

from .database import Session
from .models import LedgerEntry


@dataclass(frozen=True)
class Post:
    """The way to the mail server."""

    host: str
    port: int

    async def send(self, to: str, subject: str, text: str, *, message_id: str) -> None:
        mail = EmailMessage()
        mail["From"] = "shop@shop.example"
        mail["To"] = to
        mail["Subject"] = subject
        mail["Message-ID"] = f"<{message_id}@shop.example>"
        mail.set_content(text)
        await aiosmtplib.send(mail, hostname=self.host, port=self.port, local_hostname="shop.example")


@asynccontextmanager
async def post() -> AsyncIterator[Post]:
    """Entered once in each worker; what it yields is `ctx.state`."""
    host, _, port = os.environ.get("SHOP_SMTP", "127.0.0.1:1025").rpartition(":")
    yield Post(host, int(port))


# Without `redis=`: only relay and worker talk to Redis, and they find it in JOBQ_REDIS_URL.
jobs = JobQ(database=Session, lifespan=post)

patient = RetryPolicy(
    max_attempts=10,
    delay=lambda attempt, _: 2.0**attempt,
    never=(aiosmtplib.SMTPRecipientsRefused,),  # trying again does not make an address better
)


@jobs.task(queue="mail", retry=patient, timeout=30)
async def send_receipt(ctx: Context[Post], order_id: int, email: str, cents: int) -> None:
    """Mail the customer a receipt. At least once; mail programs show one Message-ID once."""
    await ctx.state.send(
        email,
        subject=f"Your order {order_id}",
        text=f"Thank you. We received {cents / 100:.2f} for order {order_id}.\n",
        message_id=ctx.idempotency_key("receipt"),
    )


@jobs.task(queue="ledger")
async def book(ctx: Context[Post], order_id: int, cents: int) -> None:
    """Enter an order in the ledger, exactly once."""
    async with ctx.complete() as session:
        session.add(LedgerEntry(order_id=order_id, cents=cents))
