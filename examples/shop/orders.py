"""Taking an order."""

from __future__ import annotations

from pydantic import BaseModel, Field
from sqlalchemy import select, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from .jobs import book, send_receipt
from .models import IN_STOCK, Order, Product


class OrderForm(BaseModel):
    """What a customer asks for."""

    email: str = Field(pattern=r"^[\w.+-]+@[\w.-]+$", max_length=254)
    item: str = Field(pattern=r"^[\w -]+$", max_length=100)
    quantity: int = Field(ge=1, le=100)


class Refused(Exception):
    """The order cannot be taken: the sentence says why, the status is HTTP's."""

    def __init__(self, sentence: str, status: int):
        super().__init__(sentence)
        self.status = status


async def place_order(session: AsyncSession, form: OrderForm, key: str | None) -> tuple[Order, bool]:
    """Write the order and its jobs into the caller's transaction. Returns the order, and whether it is new.

    Twice with one key is one order, also when both come at the same moment. Raises Refused.
    """
    product = await session.get(Product, form.item)
    if product is None:
        raise Refused(f"no item {form.item!r}", 422)
    wanted = {**form.model_dump(), "cents": form.quantity * product.cents}
    # A second transaction with the same key waits here until the first has committed or rolled back.
    unless_there = insert(Order).values(key=key, **wanted).on_conflict_do_nothing(index_elements=[Order.key])
    order = await session.scalar(unless_there.returning(Order))
    if order is None:
        return await _first_order(session, form, key), False
    # From here the receipt and the booking are part of the order: they happen if it commits, and only then.
    await send_receipt.enqueue(session, order.id, order.email, order.cents)
    await book.enqueue(session, order.id, order.cents)
    # The shelf last: orders for the same item wait for each other from here to the commit.
    await _take_from_shelf(session, form)
    return order, True


async def _first_order(session: AsyncSession, form: OrderForm, key: str | None) -> Order:
    order = await session.scalar(select(Order).where(Order.key == key))
    assert order is not None
    if (order.email, order.item, order.quantity) != (form.email, form.item, form.quantity):
        raise Refused("this Idempotency-Key came with another order before", 422)
    return order


async def _take_from_shelf(session: AsyncSession, form: OrderForm) -> None:
    taken = update(Product).where(Product.name == form.item).values(stock=Product.stock - form.quantity)
    try:
        await session.execute(taken)
    except IntegrityError as error:
        if IN_STOCK not in str(error.orig):
            raise
        raise Refused(f"not so many of {form.item!r} left", 409) from error
