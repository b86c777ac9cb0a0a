"""`jobq dead`: what it prints, asks and does to jobs that really died."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator
from uuid import UUID

import anyio.to_thread
import pytest

from jobq import Reject
from jobq.cli.failures import ExitCode
from tests.builders import Bench, any_id, turn
from tests.commands import Commands


@pytest.fixture
async def bench(database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(database_url, redis_url) as bench:
        yield bench


@pytest.fixture
def commands(database_url: str, redis_url: str) -> Commands:
    return Commands(database_url, redis_url)


class Shop:
    """A task that is refused until its address is right, and the jobs of it that died."""

    def __init__(self, bench: Bench):
        self.bench = bench
        self.is_open = False
        self.sent: list[str] = []

        @bench.app.task
        async def send(address: str) -> None:
            if not self.is_open:
                raise Reject(f"no such address: {address}")
            self.sent.append(address)

        self.send = send

    async def die(self, *addresses: str) -> list[UUID]:
        self.worker = await self.bench.worker()
        ids = [await self.bench.commit_and_relay(self.send, address) for address in addresses]
        await turn(self.worker)
        return ids


async def dead_ids(bench: Bench) -> set[UUID]:
    return {row["id"] for row in await bench.db.fetch("SELECT id FROM jobq.dead")}


async def test_list_and_show_tell_why_a_job_died_and_keep_its_arguments_unless_asked(bench, commands):
    (job_id,) = await Shop(bench).die("a@example")
    await bench.db.execute("UPDATE jobq.dead SET last_error = 'Reject'")

    listed = await commands.run("dead", "list", "--reason", "rejected", "--error", "REJ")
    none = await commands.json("dead", "list", "--task", "charge")
    without = await commands.run("dead", "show", job_id)
    shown = await commands.json("dead", "show", job_id.hex, "--args")

    row = listed.stdout.splitlines()[1].split()
    assert [*row[:6], row[-1]] == [str(job_id), "rejected", "send", "default", "1", "0", "Reject"]
    assert none == []
    assert "a@example" not in listed.output + without.output
    assert shown["args"] == {"address": "a@example"}
    assert (shown["reason"], shown["generation"]) == ("rejected", 1)


async def test_retry_runs_a_dead_job_again(bench, commands):
    shop = Shop(bench)
    (job_id,) = await shop.die("a@example")
    shop.is_open = True

    result = await commands.run("dead", "retry", job_id)
    await bench.relay()
    await turn(shop.worker)

    assert (result.exit_code, result.stdout) == (ExitCode.OK, "retried 1 dead job\n")
    assert shop.sent == ["a@example"]
    assert await dead_ids(bench) == set()
    await bench.assert_drained()


async def test_a_job_that_was_retried_and_dies_again_is_dead_again(bench, commands):
    shop = Shop(bench)
    (job_id,) = await shop.die("a@example")

    await commands.run("dead", "retry", job_id)
    await bench.relay()
    await turn(shop.worker)

    row = await bench.dead(job_id)
    assert row is not None
    assert (row["generation"], row["attempts"]) == (2, 1)


@pytest.mark.parametrize("verb", ["retry", "discard"])
async def test_a_filter_touches_what_it_names_after_a_yes(bench, commands, verb):
    first, second = await Shop(bench).die("a@example", "b@example")
    await bench.db.execute("UPDATE jobq.dead SET last_error = 'odd' WHERE id = $1", second)

    refused = await commands.run("dead", verb, "--error", "ODD")
    untouched = await dead_ids(bench)
    done = await commands.json("dead", verb, "--error", "ODD", "--yes")

    assert (refused.exit_code, refused.stdout) == (ExitCode.USAGE, "")
    assert f"This would {verb} 1 dead job.\n" in refused.stderr
    assert f"repeat with --yes to {verb} them" in refused.stderr
    assert untouched == {first, second}
    assert list(done.values()) == [[str(second)]]
    assert await dead_ids(bench) == {first}


async def test_discard_asks_for_ids_too_and_all_takes_everything(bench, commands):
    first, _ = await Shop(bench).die("a@example", "b@example")

    refused = await commands.run("dead", "discard", first)
    done = await commands.run("dead", "discard", "--all", "--yes")

    assert refused.exit_code == ExitCode.USAGE
    assert (done.exit_code, done.stdout) == (ExitCode.OK, "discarded 2 dead jobs\n")
    assert await dead_ids(bench) == set()
    await bench.assert_drained()


@pytest.mark.parametrize("verb", ["retry", "discard"])
async def test_without_ids_filter_or_all_nothing_is_touched(bench, commands, verb):
    (job_id,) = await Shop(bench).die("a@example")

    result = await commands.run("dead", verb, "--yes")

    assert result.exit_code == ExitCode.USAGE
    assert "which dead jobs? Name ids, or a filter such as --task, or --all" in result.stderr
    assert await dead_ids(bench) == {job_id}


async def test_an_id_that_is_not_dead_is_named_and_exits_1(bench, commands):
    (job_id,) = await Shop(bench).die("a@example")
    other = any_id()

    retried = await commands.run("dead", "retry", other, job_id)
    shown = await commands.run("dead", "show", other)

    assert (retried.exit_code, retried.stdout) == (ExitCode.FAILED, "retried 1 dead job\n")
    assert f"{other} is not among the dead" in retried.stderr
    assert shown.exit_code == ExitCode.FAILED
    assert f"job {other} is not dead" in shown.stderr


@pytest.mark.parametrize(("answer", "left"), [(b"n\n", 1), (b"y\n", 0)])
async def test_on_a_terminal_discard_asks(bench, database_url, answer, left):
    await Shop(bench).die("a@example")
    terminal, stdin = pty.openpty()
    os.write(terminal, answer)

    command = [sys.executable, "-m", "jobq", "dead", "discard", "--all", "--database-url", database_url]
    ended = await anyio.to_thread.run_sync(lambda: subprocess.run(command, stdin=stdin, capture_output=True))

    assert ended.returncode == (ExitCode.FAILED if left else ExitCode.OK)
    assert b"This would discard 1 dead job.\nDiscard them? [y/N]: " in ended.stderr
    assert len(await dead_ids(bench)) == left
    os.close(terminal)
    os.close(stdin)
