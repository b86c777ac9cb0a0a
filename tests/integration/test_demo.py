"""The demo: its verdict on stores where something is wrong, and short runs of all of it as a process."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import redis
from sqlalchemy import create_engine, make_url
from sqlalchemy.schema import CreateTable

from jobq.demo.faults import Recovery
from jobq.demo.mailbox import Mail
from jobq.demo.stage import QUEUES, examples
from jobq.demo.stores import Stores
from jobq.demo.table import KEPT, last_words, table
from jobq.demo.traffic import Answer, Purchase, plan
from jobq.demo.verdict import Verdict, Witness, judge
from jobq.model import new_job_id
from tests.waiting import until

ADA, BOB, EVE = (
    Purchase(f"key-{name}", f"{name}@mail.example", item, 1, is_repeated, 0.0)
    for name, item, is_repeated in (("ada", "cup", True), ("bob", "cup", False), ("eve", "samovar", False))
)


class Aftermath:
    """Ada (twice, with one key) and Bob have ordered, Eve was refused, and all is as it should be; but for what a
    test changes."""

    def __init__(self, stores: Stores, redis_url: str):
        self.stores = stores
        self.witness = Witness(stores)
        self.redis_url = redis_url
        self.answers = [Answer(ADA, 201, 1), Answer(ADA, 200, 1), Answer(BOB, 201, 3), Answer(EVE, 409, None)]
        self.mails = [Mail(ADA.email, "<a>"), Mail(BOB.email, "<b>")]

    async def run(self, statement: str, *values: object) -> None:
        await self.stores.rows(statement, *values)

    async def enqueue(self, task: str, args: str) -> None:
        statement = "INSERT INTO jobq.outbox (id, queue, task, args) VALUES ($1, 'ledger', $2, CAST($3 AS json))"
        await self.run(statement, new_job_id(), task, args)

    async def judge(self) -> Verdict:
        return await judge(self.stores, self.witness, self.answers, self.mails)


@pytest.fixture
async def aftermath(shared_database_url: str, redis_url: str) -> AsyncIterator[Aftermath]:
    async with Stores.open(shared_database_url, redis_url, QUEUES) as stores:
        for statement in shop_tables():
            await stores.rows(statement)
        await stores.rows("INSERT INTO product VALUES ('cup', 650, 10)")
        await stores.rows(
            "INSERT INTO orders (id, key, email, item, quantity, cents) OVERRIDING SYSTEM VALUE VALUES"
            " (1, 'key-ada', 'ada@mail.example', 'cup', 1, 650), (3, 'key-bob', 'bob@mail.example', 'cup', 1, 650)"
        )
        await stores.rows("INSERT INTO ledger (order_id, cents) VALUES (1, 650), (3, 650)")
        yield Aftermath(stores, redis_url)


def shop_tables() -> list[str]:
    """The shop's own definitions, from its models."""
    sys.path.insert(0, str(examples()))
    try:
        from shop.models import Base
    finally:
        sys.path.remove(str(examples()))
    dialect = create_engine(make_url("postgresql+asyncpg://")).dialect
    return [str(CreateTable(found).compile(dialect=dialect)) for found in Base.metadata.sorted_tables]


async def test_a_kept_promise_has_no_problems(aftermath: Aftermath) -> None:
    verdict = await aftermath.judge()

    assert verdict.problems == []
    assert (verdict.committed, verdict.rolled_back, verdict.sent_twice) == (2, 1, 1)
    assert (verdict.booked, verdict.receipts, verdict.lost) == (2, 2, 0)
    assert last_words(verdict) == KEPT


async def test_a_mail_sent_twice_under_one_message_id_is_allowed_and_counted(aftermath: Aftermath) -> None:
    aftermath.mails.append(Mail(ADA.email, "<a>"))

    verdict = await aftermath.judge()

    assert verdict.duplicate_mails == 1
    assert verdict.problems == []


WRONGS: dict[str, str] = {
    "orders without their booking": "DELETE FROM ledger WHERE order_id = 1",
    "orders booked twice": "INSERT INTO ledger (order_id, cents) VALUES (1, 650)",
    "bookings of orders that were rolled back": "INSERT INTO ledger (order_id, cents) VALUES (2, 650)",
    "jobs still in the outbox": "INSERT INTO jobq.outbox (id, queue, task, args)"
    " VALUES (gen_random_uuid(), 'mail', 'send_receipt', '{}')",
    "jobs in the dead letters": "INSERT INTO jobq.dead (id, generation, queue, task, args, priority, attempts, crashes,"
    " created_at, reason) VALUES (gen_random_uuid(), 1, 'mail', 'send_receipt', '{}', 2, 1, 0, now(), 'exhausted')",
}


@pytest.mark.parametrize(("problem", "statement"), WRONGS.items(), ids=WRONGS)
async def test_what_is_wrong_in_the_database_is_found(aftermath: Aftermath, problem: str, statement: str) -> None:
    await aftermath.run(statement)

    verdict = await aftermath.judge()

    assert verdict.problems == [f"1 {problem}"]
    assert last_words(verdict).startswith("NOT as promised")


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda mails: mails.pop(), "orders without their receipt"),
        (lambda mails: mails.append(Mail(EVE.email, "<e>")), "mails for orders that were rolled back"),
        (lambda mails: mails.append(Mail(ADA.email, "<other>")), "orders taken twice for one Idempotency-Key"),
    ],
)
async def test_what_is_wrong_with_the_mails_is_found(
    aftermath: Aftermath, change: Callable[[list[Mail]], object], problem: str
) -> None:
    change(aftermath.mails)

    verdict = await aftermath.judge()

    assert verdict.problems == [f"1 {problem}"]


@pytest.mark.parametrize(
    "answer", [Answer(EVE, 201, 2), Answer(BOB, 409, None), Answer(EVE, 500, None), Answer(EVE, 0, None)]
)
async def test_an_answer_that_is_not_what_was_committed_is_found(aftermath: Aftermath, answer: Answer) -> None:
    aftermath.answers.append(answer)

    verdict = await aftermath.judge()

    assert verdict.answered_otherwise == 1
    assert verdict.problems


async def test_an_order_that_vanished_after_the_answer_is_found(aftermath: Aftermath) -> None:
    await aftermath.run("DELETE FROM orders WHERE id = 3")

    verdict = await aftermath.judge()

    assert (verdict.answered_otherwise, verdict.booked_after_rollback, verdict.mails_after_rollback) == (1, 1, 1)


async def test_two_orders_for_one_key_are_found(aftermath: Aftermath) -> None:
    aftermath.answers[1] = Answer(ADA, 201, 4)

    assert (await aftermath.judge()).taken_twice == 1


@pytest.mark.parametrize("name", ["ready:2", "working:w-0", "parked:book"])
async def test_what_redis_still_holds_of_finished_jobs_is_found(aftermath: Aftermath, name: str) -> None:
    ((database_id,),) = await aftermath.stores.rows("SELECT database_id FROM jobq.meta")
    with redis.Redis.from_url(aftermath.redis_url) as client:
        client.rpush(f"jobq:1:{database_id.hex[:8]}:{{mail}}:{name}", f"{new_job_id().hex}:1:2")
        client.hset(f"jobq:1:{database_id.hex[:8]}:{{ledger}}:known", new_job_id().hex, 1)

    verdict = await aftermath.judge()

    assert verdict.problems == ["2 entries of finished jobs still in Redis"]


async def test_a_booking_apart_from_the_end_of_its_job_is_seen(aftermath: Aftermath) -> None:
    await aftermath.enqueue("book", '{"order_id": 4, "cents": 1}')
    await aftermath.enqueue("send_receipt", '{"order_id": 1}')
    await aftermath.witness.look()
    assert aftermath.witness.half_done == set()
    await aftermath.enqueue("book", '{"order_id": 3, "cents": 1}')

    await aftermath.witness.look()
    await aftermath.run("DELETE FROM jobq.outbox")

    assert aftermath.witness.half_done == {3}
    assert len((await aftermath.judge()).problems) == 1


async def test_flush_reports_what_it_takes_away(aftermath: Aftermath) -> None:
    ((database_id,),) = await aftermath.stores.rows("SELECT database_id FROM jobq.meta")
    base = f"jobq:1:{database_id.hex[:8]}:{{mail}}:"
    with redis.Redis.from_url(aftermath.redis_url) as client:
        client.rpush(f"{base}ready:2", "a", "b")
        client.rpush(f"{base}working:w-1", "c")

        assert await aftermath.stores.flush() == (2, 1)

        assert client.dbsize() == 0


def test_the_same_seed_makes_the_same_purchases() -> None:
    assert plan(500, seed=7) == plan(500, seed=7)
    assert plan(500, seed=7) != plan(500, seed=8)


def test_the_plan_has_hopeless_and_repeated_purchases_and_keys_of_their_own() -> None:
    purchases = plan(2_000, seed=1)

    assert 150 < sum(purchase.is_hopeless for purchase in purchases) < 250
    assert 50 < sum(purchase.is_repeated for purchase in purchases) < 150
    assert len({purchase.key for purchase in purchases}) == 2_000
    assert all(early.at_s <= late.at_s for early, late in pairwise(purchases))


async def test_the_table_shows_a_fault_that_was_not_over(aftermath: Aftermath) -> None:
    recoveries = [Recovery(2.0, "second", "it was over", None), Recovery(1.0, "first", "it was over", 0.25)]

    lines = table(await aftermath.judge(), recoveries).splitlines()

    assert [line.split() for line in lines[-2:]] == [
        ["0.2", "s", "first,", "until", "it", "was", "over"],
        ["over", "60", "s", "second,", "until", "it", "was", "over"],
    ]


# --- as a process


@contextmanager
def demo(directory: Path, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `jobq demo`, its two outputs in files."""
    command = [sys.executable, "-c", "from jobq.cli import main; main()", "demo", *arguments]
    with (directory / "out").open("wb") as out, (directory / "err").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, cwd=directory)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def descendants(pid: int) -> dict[int, str]:
    """Everything that a process has started, directly or not: pid -> command line."""
    listed = subprocess.run(["ps", "-ww", "-eo", "pid=,ppid=,args="], capture_output=True, text=True, check=True).stdout
    rows = [line.split(None, 2) for line in listed.splitlines()]
    found = {pid: ""}
    for _ in range(5):  # the deepest: demo, keeper, postmaster, backend
        found |= {int(row[0]): row[2] for row in rows if int(row[1]) in found and len(row) == 3}
    del found[pid]
    return {child: command for child, command in found.items() if not command.startswith("ps ")}


def is_there(directory: str) -> bool:
    return Path(directory).is_dir()


def are_gone(pids: dict[int, str]) -> bool:
    listed = subprocess.run(["ps", "-eo", "pid=,stat="], capture_output=True, text=True, check=True).stdout
    alive = {int(pid) for pid, state in map(str.split, listed.splitlines()) if not state.startswith("Z")}
    return not alive & pids.keys()


async def test_a_short_demo_keeps_the_promise(tmp_path: Path) -> None:
    with demo(tmp_path, "--jobs", "100", "--seed", "7") as process:
        await until(lambda: process.poll() is not None, "the demo ends", 100)

    out, err = (tmp_path / "out").read_text(), (tmp_path / "err").read_text()
    assert process.returncode == 0, out + err
    hopeless = sum(purchase.is_hopeless for purchase in plan(100, seed=7))
    counts = dict(re.findall(r"^  (\S.*?) {2,}([\d,]+)(?:   .*)?$", out, re.MULTILINE))
    assert (counts["orders committed"], counts["orders rolled back"]) == (str(100 - hopeless), str(hopeless))
    assert (counts["booked"], counts["receipts"], counts["LOST"]) == (str(100 - hopeless), str(100 - hopeless), "0")
    assert out.rstrip().endswith(KEPT)
    assert len(re.findall(r"^ +\d+\.\d s   .*, until ", out, re.MULTILINE)) == 3
    assert all(fault in err for fault in ("kill -9 worker", "kill -9 relay", "FLUSHALL"))
    assert "\x1b" not in out + err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 130), (signal.SIGKILL, -9)])
async def test_nothing_outlives_the_demo(tmp_path: Path, number: signal.Signals, code: int) -> None:
    with demo(tmp_path) as process:
        await until(lambda: "orders sent" in (tmp_path / "err").read_text(), "orders are sent", 60)
        started = descendants(process.pid)
        assert len(started) > 12  # two servers, their keepers and backends; five processes and their keepers
        socket = re.search(r"(\S+)/valkey\.sock", " ".join(started.values()))
        assert socket is not None
        directory = socket[1].removeprefix("unixsocket:")
        assert is_there(directory)

        os.kill(process.pid, number)
        await until(lambda: process.poll() is not None, "the demo ends", 30)

    await until(lambda: are_gone(started), f"all are gone: {shlex.join(started.values())}", 20)
    assert process.returncode == code
    if number is not signal.SIGKILL:  # then the next demo sweeps it
        assert not is_there(directory)
