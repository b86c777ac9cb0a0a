"""The page about PostgreSQL: its URL and its engine lead to the primary, wherever that stands."""

from __future__ import annotations

import shlex
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jobq.outbox.database import Database
from tests.faults.proxy import proxy_before
from tests.markdown import blocks, files
from tests.postgres_pair import Pair, postgres_pair, socket_of

PAGE = Path(__file__).parents[2] / "docs" / "postgresql.md"
ENGINE = files(PAGE)["shop/database.py"]
((_, COMMAND),) = blocks(PAGE, "sh")


@pytest.fixture(scope="module")
async def pair() -> AsyncIterator[Pair]:
    async with postgres_pair() as pair:
        yield pair


@pytest.mark.parametrize("form", ["URL", "engine"])
async def test_the_hosts_of_the_page_lead_to_the_primary(pair: Pair, form: str) -> None:
    async with proxy_before(socket_of(pair.replica)) as first, proxy_before(socket_of(pair.primary)) as second:

        def here(text: str) -> str:
            for number, proxy in enumerate((first, second), 1):
                text = text.replace(f"pg{number}.internal:5432", f"127.0.0.1:{proxy.port}")
            return text.replace("//shop@", "//postgres@").replace("/shop", "/postgres")

        if form == "URL":
            database = Database.of(here(shlex.split(COMMAND)[1].partition("=")[2]))
        else:
            module: dict[str, Any] = {}
            exec(here(ENGINE.replace("# shop/database.py", "")), module)
            database = Database.of(module["Session"])
        connection = await database.connect(schema="jobq", name="jobq:test")
        folder = await connection.fetchval("SHOW data_directory")
        connection.terminate()
        await database.engine.dispose()

    assert folder == str(pair.primary.postgres.data)
