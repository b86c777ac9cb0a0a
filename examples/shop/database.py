"""Where the shop keeps its data: one PostgreSQL for its own tables and for jobq's outbox."""

from __future__ import annotations

import os

from sqlalchemy import make_url
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker, create_async_engine

from .models import Base, Product

url = make_url(os.environ.get("JOBQ_DATABASE_URL", "postgresql://localhost/shop")).set(drivername="postgresql+asyncpg")
engine = create_async_engine(url)
Session = async_sessionmaker(engine, expire_on_commit=False)

PRODUCTS = (
    {"name": "teapot", "cents": 2_450, "stock": 1_000_000},
    {"name": "kettle", "cents": 3_900, "stock": 1_000_000},
    {"name": "cup", "cents": 650, "stock": 1_000_000},
    {"name": "tray", "cents": 1_200, "stock": 1_000_000},
    {"name": "samovar", "cents": 19_900, "stock": 0},
)


async def create_tables(engine: AsyncEngine = engine) -> None:
    """Make the shop's tables and fill the shelves. May be repeated."""
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        await connection.execute(insert(Product).values(PRODUCTS).on_conflict_do_nothing())
