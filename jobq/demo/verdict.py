"""What became of the orders, and whether jobq kept its promise.

Invariant: every number is counted at the end, in the shop's tables, in the mails that were received, in the
outbox and in Redis; the answers to the customers are only compared with that. Called by demo. Calls stores.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .mailbox import Mail
from .stores import SCHEMA, Stores
from .traffic import Answer

_TAKEN, _TAKEN_BEFORE, _SOLD_OUT = 201, 200, 409


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The counts. Those after `duplicate_mails` are 0, or something is wrong."""

    committed: int
    rolled_back: int
    sent_twice: int
    """Orders whose request came twice, and which were taken."""
    booked: int
    receipts: int
    duplicate_mails: int
    """Allowed: a mail is an outside effect, so it happens at least once."""

    lost_bookings: int
    lost_receipts: int
    booked_twice: int
    half_done: int
    """Orders that were seen booked while their booking was still to be done."""
    booked_after_rollback: int
    mails_after_rollback: int
    taken_twice: int
    """Keys that two different orders were answered for, or jobs that were enqueued twice."""
    answered_otherwise: int
    """Requests whose answer is not what the shop's table says, and those without a proper answer."""
    dead: int
    left_in_outbox: int
    left_in_redis: int

    @property
    def lost(self) -> int:
        return self.lost_bookings + self.lost_receipts

    @property
    def left_over(self) -> int:
        return self.dead + self.left_in_outbox + self.left_in_redis

    @property
    def problems(self) -> list[str]:
        """Everything that should not be, one sentence each; empty when the promise was kept."""
        found = {
            "orders without their booking": self.lost_bookings,
            "orders without their receipt": self.lost_receipts,
            "orders booked twice": self.booked_twice,
            "orders were booked while their job was not done: a crash there books twice": self.half_done,
            "bookings of orders that were rolled back": self.booked_after_rollback,
            "mails for orders that were rolled back": self.mails_after_rollback,
            "orders taken twice for one Idempotency-Key": self.taken_twice,
            "requests answered with something else than what was committed": self.answered_otherwise,
            "jobs in the dead letters": self.dead,
            "jobs still in the outbox": self.left_in_outbox,
            "entries of finished jobs still in Redis": self.left_in_redis,
        }
        return [f"{count} {what}" for what, count in found.items() if count]


class Witness:
    """Looks on while it all runs: no snapshot may show an order as booked and its booking as still to be done.

    A worker that dies at such a moment books twice. `ctx.complete()` leaves none, so one look in thousands
    that finds any is enough.
    """

    _QUERY = f"""
        SELECT ledger.order_id FROM {SCHEMA}.outbox
        JOIN ledger ON ledger.order_id = CAST(outbox.args ->> 'order_id' AS int)
        WHERE outbox.task = 'book'
    """

    def __init__(self, stores: Stores):
        self._stores = stores
        self.half_done: set[int] = set()

    async def look(self) -> None:
        self.half_done |= {row["order_id"] for row in await self._stores.rows(self._QUERY)}


async def judge(stores: Stores, witness: Witness, answers: Sequence[Answer], mails: Sequence[Mail]) -> Verdict:
    """Count everything."""
    order_of = {row["email"]: row["id"] for row in await stores.rows("SELECT id, email FROM orders")}
    orders = set(order_of.values())
    bookings = Counter(row["order_id"] for row in await stores.rows("SELECT order_id FROM ledger"))
    sendings: dict[str, Counter[str]] = defaultdict(Counter)
    for mail in mails:
        sendings[mail.to][mail.message_id] += 1
    receipts = {email: sent for email, sent in sendings.items() if email in order_of}
    refused = {answer.purchase.key for answer in answers if answer.status == _SOLD_OUT}
    return Verdict(
        committed=await stores.value("SELECT count(*) FROM orders"),
        rolled_back=len(refused),
        sent_twice=len({a.purchase.key for a in answers if a.purchase.is_repeated and a.purchase.email in order_of}),
        booked=len(orders & bookings.keys()),
        receipts=len(receipts),
        duplicate_mails=sum(sent.total() - len(sent) for sent in receipts.values()),
        lost_bookings=len(orders - bookings.keys()),
        lost_receipts=len(order_of.keys() - receipts.keys()),
        booked_twice=sum(count > 1 for count in bookings.values()),
        half_done=len(witness.half_done),
        booked_after_rollback=len(bookings.keys() - orders),
        mails_after_rollback=sum(sent.total() for email, sent in sendings.items() if email not in order_of),
        # Two jobs for one order have two Message-IDs; two runs of one job have the same.
        taken_twice=_count_two_orders(answers) + sum(len(sent) > 1 for sent in receipts.values()),
        answered_otherwise=sum(not _is_true(answer, order_of.get(answer.purchase.email)) for answer in answers)
        + len(order_of.keys() - {answer.purchase.email for answer in answers}),
        dead=await stores.value(f"SELECT count(*) FROM {SCHEMA}.dead"),
        left_in_outbox=await stores.value(f"SELECT count(*) FROM {SCHEMA}.outbox"),
        left_in_redis=await stores.left_in_redis(),
    )


def _count_two_orders(answers: Sequence[Answer]) -> int:
    orders: dict[str, set[int]] = defaultdict(set)
    for answer in answers:
        if answer.order_id is not None:
            orders[answer.purchase.key].add(answer.order_id)
    return sum(len(ids) > 1 for ids in orders.values())


def _is_true(answer: Answer, order_id: int | None) -> bool:
    """Whether an answer agrees with the order of this purchase in the shop's table, or with there being none."""
    if answer.status in (_TAKEN, _TAKEN_BEFORE):
        return order_id is not None and answer.order_id == order_id
    return answer.status == _SOLD_OUT and order_id is None
