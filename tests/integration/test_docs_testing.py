"""The page about testing: its application and its tests are run as they stand there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import redis

from jobq.testing import CRASH_POINTS, EnqueuedJob
from jobq.testing.servers import DATABASE_VARIABLE, REDIS_VARIABLE, ServerUrls
from tests.markdown import blocks, files, write_files

PAGE = Path(__file__).parents[2] / "docs" / "testing.md"


def run_page(folder: Path, servers: ServerUrls, *options: str) -> str:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "JOBQ_"))}
    named = {DATABASE_VARIABLE: servers.database_url, REDIS_VARIABLE: servers.redis_url, "PYTEST_XDIST_WORKER": "gw1"}
    command = [sys.executable, "-m", "pytest", "-q", "-W", "error", "-p", "no:valkey", *options, str(folder)]
    done = subprocess.run(command, cwd=folder, env=kept | named, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_tests_of_the_page_pass(servers: ServerUrls, tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    assert len(blocks(PAGE)) == 6
    assert set(files(PAGE)) == {"bank.py", "conftest.py", "test_bank.py"}, "no block is left out"

    with redis.Redis.from_url(servers.redis_url) as client:
        client.set("a", "key that the other process would have emptied")

        output = run_page(tmp_path, servers)

        assert "8 passed" in output, output
        assert client.delete("a") == 1


def test_without_the_key_they_fail_before_the_commit_as_the_page_says(servers: ServerUrls, tmp_path: Path) -> None:
    write_files(PAGE, tmp_path)
    bank = tmp_path / "bank.py"
    bank.write_text(bank.read_text().replace('ctx.idempotency_key("card")', 'f"charge {len(card_company)}"'))

    output = run_page(tmp_path, servers, "-k", "before_commit")

    assert "1 failed, 7 deselected" in output, output
    assert "test_an_invoice_is_charged_once_whatever_dies[before_commit]" in output


@pytest.mark.parametrize("point", CRASH_POINTS)
def test_the_page_names_every_point(point: str) -> None:
    assert f"| `{point}` |" in PAGE.read_text(encoding="utf-8")


def test_the_page_names_what_an_enqueued_job_has() -> None:
    text = PAGE.read_text(encoding="utf-8")
    named = {name for name in EnqueuedJob.__dataclass_fields__ if f"`{name}`" in text}

    assert set(EnqueuedJob.__dataclass_fields__) - named <= {"id", "task", "args_json"}
