"""What the README says is run here: its code is type-checked, and what it names is there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")

_NAMES_OF_THE_APPLICATION = """
from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import asyncpg
import httpx
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


class Order(Base):
    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)


class Invoice(Base):
    __tablename__ = "invoices"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int]
    paid: Mapped[bool]


@dataclass(frozen=True)
class State:
    http: httpx.AsyncClient


@asynccontextmanager
async def lifespan() -> AsyncIterator[State]:
    async with httpx.AsyncClient() as http:
        yield State(http)


MAIL_URL = "http://mail.example/"
Session = async_sessionmaker(create_async_engine("postgresql+asyncpg://localhost/shop"))
order_ids = [1, 2, 3]
"""


def _blocks(language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    return [block for found, block in fenced if found == language]


def _program() -> str:
    """The README's Python blocks as one module: top-level `async with` goes into a function."""
    first, enqueue, run = _blocks("python")
    inside = "".join(f"    {line}\n" if line else "\n" for line in enqueue.splitlines())
    usage = f"async def use(order: Order, pool: asyncpg.Pool) -> None:\n{inside}"
    return "\n\n".join([_NAMES_OF_THE_APPLICATION, first, usage, run])


@pytest.mark.parametrize(
    "checker", [["mypy", "--strict"], ["pyright", "--pythonpath", sys.executable]], ids=["mypy", "pyright"]
)
def test_the_code_of_the_readme_passes_strict_type_checkers(checker: list[str], tmp_path: Path) -> None:
    program = tmp_path / "shop.py"
    program.write_text(_program())

    checked = subprocess.run([sys.executable, "-m", *checker, str(program)], capture_output=True, text=True, cwd=ROOT)

    assert checked.returncode == 0, checked.stdout + checked.stderr


def test_every_row_of_the_crash_table_has_a_test_and_the_file_is_where_the_readme_says() -> None:
    named = re.search(r"`(tests/faults/test_crash_table\.py)`", README)
    assert named is not None
    tests = (ROOT / named[1]).read_text(encoding="utf-8")
    rows = README[README.index("| something breaks |") :].split("\n\n")[0].splitlines()[2:]

    assert len(re.findall(r"^async def test_", tests, re.MULTILINE)) >= len(rows)
