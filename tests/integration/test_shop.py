"""The shop of examples/, as its own process behind real HTTP: what an order leaves in the database."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import httpx
import pytest

from jobq.demo.mailbox import Mailbox
from jobq.demo.stage import Process, examples
from tests.waiting import until

TEAPOT = {"email": "ada@mail.example", "item": "teapot", "quantity": 2}
SAMOVAR = {**TEAPOT, "item": "samovar"}  # sold out


class Shop:
    """The shop's HTTP client and database."""

    def __init__(self, client: httpx.AsyncClient, database: asyncpg.Connection):
        self._client = client
        self._database = database

    async def order(self, form: object, key: str | None = None) -> httpx.Response:
        headers = {} if key is None else {"Idempotency-Key": key}
        return await self._client.post("/orders", json=form, headers=headers)

    async def rows(self, query: str) -> list[tuple[Any, ...]]:
        return [tuple(row) for row in await self._database.fetch(query)]

    async def counts(self) -> tuple[int, int]:
        """Orders, and jobs that wait."""
        ((orders, jobs),) = await self.rows("SELECT (SELECT count(*) FROM orders), (SELECT count(*) FROM jobq.outbox)")
        return orders, jobs


@pytest.fixture
async def shop(database_url: str, tmp_path: Path) -> AsyncIterator[Shop]:
    command = ["-m", "uvicorn", "shop.web:app", "--host", "127.0.0.1", "--port", "0"]
    async with running("shop", command, tmp_path, JOBQ_DATABASE_URL=database_url) as process:
        await until(lambda: "running on http" in process.said(), "the shop answers", 30)
        url = process.said().partition("running on ")[2].split()[0]
        database = await asyncpg.connect(database_url)
        async with httpx.AsyncClient(base_url=url, trust_env=False) as client:
            yield Shop(client, database)
        await database.close()


@asynccontextmanager
async def running(name: str, arguments: list[str], logs: Path, **variables: str) -> AsyncIterator[Process]:
    environment = {**os.environ, "PYTHONPATH": str(examples()), **variables}
    process = Process(name, [sys.executable, "-P", *arguments], environment, logs / f"{name}.log")
    try:
        yield process
    finally:
        process.kill()


async def test_an_order_and_its_jobs_are_one_transaction(shop: Shop) -> None:
    response = await shop.order(TEAPOT)

    assert response.status_code == 201
    assert response.json() == {"id": 1, "cents": 4_900}
    ((order,),) = await shop.rows("SELECT CAST(xmin AS text) FROM orders")
    jobs = await shop.rows("SELECT task, queue, CAST(xid AS text), CAST(args AS text) FROM jobq.outbox ORDER BY task")
    assert [(task, queue, xid) for task, queue, xid, _ in jobs] == [
        ("book", "ledger", order),
        ("send_receipt", "mail", order),
    ]


async def test_an_order_that_fails_after_enqueueing_leaves_no_job(shop: Shop) -> None:
    response = await shop.order(SAMOVAR)

    assert response.status_code == 409
    assert await shop.counts() == (0, 0)
    # It had got as far as having an id, which a sequence does not take back.
    assert await shop.rows("SELECT is_called FROM orders_id_seq") == [(True,)]


async def test_a_second_request_with_one_key_gets_the_first_order(shop: Shop) -> None:
    first = await shop.order(TEAPOT, key="k")

    second = await shop.order(TEAPOT, key="k")

    assert (first.status_code, second.status_code) == (201, 200)
    assert first.json() == second.json()
    assert await shop.counts() == (1, 2)


async def test_requests_with_one_key_at_the_same_moment_make_one_order(shop: Shop) -> None:
    responses: list[httpx.Response] = []

    async def order() -> None:
        responses.append(await shop.order(TEAPOT, key="k"))

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(order)

    assert sorted(response.status_code for response in responses) == [200] * 7 + [201]
    assert len({response.text for response in responses}) == 1
    assert await shop.counts() == (1, 2)


async def test_the_key_of_an_order_that_was_rolled_back_is_free(shop: Shop) -> None:
    assert (await shop.order(SAMOVAR, key="k")).status_code == 409

    response = await shop.order(TEAPOT, key="k")

    assert response.status_code == 201
    assert await shop.counts() == (1, 2)


async def test_a_key_that_came_with_another_order_is_refused(shop: Shop) -> None:
    await shop.order(TEAPOT, key="k")

    response = await shop.order({**TEAPOT, "quantity": 3}, key="k")

    assert response.status_code == 422
    assert await shop.counts() == (1, 2)


async def test_nonsense_is_refused(shop: Shop) -> None:
    forms = [{}, [], {**TEAPOT, "quantity": 0}, {**TEAPOT, "email": "ada"}, {**TEAPOT, "item": "moon"}]
    forms += [{**TEAPOT, "item": "tea\0pot"}, {**TEAPOT, "email": "a\0@b"}]

    statuses = {(await shop.order(form)).status_code for form in forms}

    assert statuses == {422}
    assert await shop.counts() == (0, 0)


async def test_an_order_is_booked_and_its_receipt_mailed(
    shop: Shop, database_url: str, redis_url: str, tmp_path: Path
) -> None:
    mailbox = Mailbox(seed=1)
    await shop.order(TEAPOT)
    run = ["-c", "from jobq.cli import main; main()", "run", "shop.jobs:jobs"]

    async with mailbox.serve() as address:
        variables = {"JOBQ_DATABASE_URL": database_url, "JOBQ_REDIS_URL": redis_url, "SHOP_SMTP": address}
        async with running("worker", run, tmp_path, **variables):

            async def is_done() -> bool:
                return await shop.counts() == (1, 0)

            await until(is_done, "both jobs are done", 30)

    assert await shop.rows("SELECT order_id, cents FROM ledger") == [(1, 4_900)]
    assert [mail.to for mail in mailbox.mails] == ["ada@mail.example"]
    assert mailbox.mails[0].message_id.endswith("@shop.example>")
