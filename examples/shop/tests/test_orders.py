"""An order over HTTP: what it leaves to be done, and what comes of that, whatever breaks on the way."""

from __future__ import annotations

from collections.abc import Callable

import aiosmtplib
import httpx
import pytest
from sqlalchemy import select

from jobq.testing import CRASH_POINTS, Crashes, CrashPoint, enqueued, run_pending
from shop.database import Session
from shop.jobs import book, jobs, send_receipt
from shop.models import LedgerEntry
from shop.tests.conftest import Mailbox

pytestmark = pytest.mark.anyio

TEAPOT = {"email": "ada@mail.example", "item": "teapot", "quantity": 2}
SAMOVAR = {**TEAPOT, "item": "samovar"}  # sold out


async def ledger() -> list[tuple[int, int]]:
    async with Session() as session:
        rows = await session.execute(select(LedgerEntry.order_id, LedgerEntry.cents).order_by(LedgerEntry.id))
        return [(order_id, cents) for order_id, cents in rows]


async def test_an_order_enqueues_its_receipt_and_its_booking(client: httpx.AsyncClient) -> None:
    answer = await client.post("/orders", json=TEAPOT)

    assert answer.status_code == 201
    order_id = answer.json()["id"]
    async with Session() as session:
        assert await enqueued(session, send_receipt) == [send_receipt.job(order_id, "ada@mail.example", 4_900)]
        assert await enqueued(session, book) == [book.job(order_id, 4_900)]


async def test_an_order_that_is_rolled_back_enqueues_nothing(client: httpx.AsyncClient) -> None:
    answer = await client.post("/orders", json=SAMOVAR)

    assert answer.status_code == 409
    async with Session() as session:
        assert await enqueued(session) == []


async def test_the_customer_is_mailed_a_receipt(client: httpx.AsyncClient, mailbox: Mailbox) -> None:
    order_id = (await client.post("/orders", json=TEAPOT)).json()["id"]

    await run_pending(jobs, state=mailbox)

    (mail,) = mailbox.mails
    assert (mail.to, mail.subject) == ("ada@mail.example", f"Your order {order_id}")
    assert f"We received 49.00 for order {order_id}." in mail.text


async def test_a_mail_server_that_is_away_is_tried_again(client: httpx.AsyncClient) -> None:
    sent: list[str] = []

    class Away(Mailbox):
        async def send(self, to: str, subject: str, text: str, *, message_id: str) -> None:
            sent.append(message_id)
            raise ConnectionRefusedError("no mail server")

    await client.post("/orders", json=TEAPOT)

    attempts = await run_pending(jobs, state=Away(), raises=False, advance=5)

    receipts = [(attempt.outcome, attempt.delay_s) for attempt in attempts if attempt.task == "send_receipt"]
    assert receipts == [("retried", 2), ("retried", 4)]
    assert len(set(sent)) == 1, "every attempt carries one Message-ID"


async def test_an_address_that_does_not_exist_is_not_tried_again(client: httpx.AsyncClient) -> None:
    await client.post("/orders", json=TEAPOT)

    with pytest.raises(aiosmtplib.SMTPRecipientsRefused):
        await run_pending(jobs, state=Mailbox(refused=frozenset({"ada@mail.example"})))

    async with Session() as session:
        assert await enqueued(session, send_receipt) == []


@pytest.mark.parametrize("point", CRASH_POINTS)
async def test_an_order_is_booked_once_whatever_breaks(
    client: httpx.AsyncClient, mailbox: Mailbox, jobq_crashes: Callable[..., Crashes], point: CrashPoint
) -> None:
    async with jobq_crashes(jobs, state=mailbox) as crashes:
        order_id = (await client.post("/orders", json=TEAPOT)).json()["id"]

        await crashes.at(point)

        assert await ledger() == [(order_id, 4_900)]
        assert len({mail.message_id for mail in mailbox.mails}) == 1, "a mail may come twice, but it is the same one"
