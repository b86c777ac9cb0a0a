"""The tables of the shop. Those of jobq are in a schema of their own; `jobq migrate upgrade` makes them."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, ForeignKey, Identity
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

IN_STOCK = "product_is_in_stock"


class Base(DeclarativeBase):
    pass


class Product(Base):
    __tablename__ = "product"
    __table_args__ = (CheckConstraint("stock >= 0", name=IN_STOCK),)

    name: Mapped[str] = mapped_column(primary_key=True)
    cents: Mapped[int]
    stock: Mapped[int]


class Order(Base):
    __tablename__ = "orders"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    key: Mapped[str | None] = mapped_column(unique=True)
    """The Idempotency-Key that the order came with."""
    email: Mapped[str]
    item: Mapped[str] = mapped_column(ForeignKey(Product.name))
    quantity: Mapped[int]
    cents: Mapped[int]


class LedgerEntry(Base):
    """One booking. Nothing in this table keeps an order from being booked twice: `ctx.complete()` does."""

    __tablename__ = "ledger"

    id: Mapped[int] = mapped_column(Identity(), primary_key=True)
    order_id: Mapped[int] = mapped_column(index=True)
    cents: Mapped[int]
