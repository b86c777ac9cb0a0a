"""The customers: orders over HTTP, at the same time, some of them hopeless and some sent twice.

Invariant: the same seed makes the same orders. Called by demo and faults. Calls the shop, over HTTP.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from ssl import PROTOCOL_TLS_CLIENT, SSLContext
from typing import NamedTuple
from uuid import UUID

import anyio
import httpx

from .stage import DemoFailed

_CUSTOMERS = 24
"""Requests under way at the same time."""
_PER_SECOND = 125
_SHORTEST_S = 14.0
"""The three faults need room."""
_WAVES = 4
_ITEMS = ("teapot", "kettle", "cup", "tray")
_SOLD_OUT = "samovar"
_REFUSED_SHARE = 0.1
_REPEATED_SHARE = 0.05
_TIMEOUT_S = 30.0
_TRIES = 3
NO_ANSWER = 0


@dataclass(frozen=True, slots=True)
class Purchase:
    """One order, before it is sent."""

    key: str
    email: str
    item: str
    quantity: int
    is_repeated: bool
    """It is sent twice at the same moment, with one Idempotency-Key."""
    at_s: float
    """When it is sent, in seconds from the first."""

    @property
    def is_hopeless(self) -> bool:
        """It asks for what is sold out: the shop finds out after it has enqueued the jobs."""
        return self.item == _SOLD_OUT


class Answer(NamedTuple):
    """What the shop answered to one request."""

    purchase: Purchase
    status: int
    order_id: int | None


def plan(count: int, seed: int) -> list[Purchase]:
    """Draw `count` purchases, in waves that begin with a rush."""
    choose = random.Random(seed)  # noqa: S311  not a secret
    lasts_s = max(_SHORTEST_S, count / _PER_SECOND)
    return [
        Purchase(
            key=str(UUID(int=choose.getrandbits(128), version=4)),
            email=f"customer-{number}@mail.example",
            item=_SOLD_OUT if choose.random() < _REFUSED_SHARE else choose.choice(_ITEMS),
            quantity=choose.randint(1, 5),
            is_repeated=choose.random() < _REPEATED_SHARE,
            at_s=lasts_s * _in_waves(number / count),
        )
        for number in range(count)
    ]


def _in_waves(share: float) -> float:
    wave, within = divmod(share * _WAVES, 1)
    return (wave + within**3) / _WAVES


async def _knock(url: str) -> None:
    try:
        async with _client(url) as client:
            await client.get("/")
    except httpx.TransportError as error:
        raise DemoFailed(f"the shop at {url} cannot be reached ({error}): is the loopback interface up?") from error


def _client(url: str) -> httpx.AsyncClient:
    # No proxy of the environment, and no certificates to load for http.
    return httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S, trust_env=False, verify=SSLContext(PROTOCOL_TLS_CLIENT))


class Traffic:
    """Sends the purchases, and keeps the answers."""

    def __init__(self, purchases: list[Purchase]):
        self.purchases = purchases
        self.answers: list[Answer] = []
        self.sent = 0

    async def run(self, url: str) -> None:
        """Send each purchase at its time, or as soon after that as one of the customers is free.

        Raises DemoFailed when nothing is to be reached at `url`, or all is much too slow.
        """
        await _knock(url)
        waiting = iter(self.purchases)
        started_at = time.monotonic()
        longest_s = 60 + 10 * self.purchases[-1].at_s
        with anyio.move_on_after(longest_s):
            async with anyio.create_task_group() as group:
                for _ in range(_CUSTOMERS):
                    group.start_soon(self._serve_customer, url, waiting, started_at)
            return
        raise DemoFailed(f"after {longest_s:.0f} s the shop has answered {self.sent} of {len(self.purchases)} orders")

    async def _serve_customer(self, url: str, waiting: Iterator[Purchase], started_at: float) -> None:
        # A client for each: one pool for all would look at every connection for every request.
        async with _client(url) as client:
            for purchase in waiting:
                await anyio.sleep(max(0.0, started_at + purchase.at_s - time.monotonic()))
                async with anyio.create_task_group() as group:
                    for _ in range(2 if purchase.is_repeated else 1):
                        group.start_soon(self._order, client, purchase)
                self.sent += 1

    async def _order(self, client: httpx.AsyncClient, purchase: Purchase) -> None:
        """Ask until there is an answer: with the same key, asking again is safe."""
        form = {"email": purchase.email, "item": purchase.item, "quantity": purchase.quantity}
        for _ in range(_TRIES):
            try:
                response = await client.post("/orders", json=form, headers={"Idempotency-Key": purchase.key})
            except httpx.TransportError:  # an idle connection that the shop was just closing, say
                continue
            order_id = response.json()["id"] if response.is_success else None
            self.answers.append(Answer(purchase, response.status_code, order_id))
            return
        self.answers.append(Answer(purchase, NO_ANSWER, None))
