"""`jobq jobs`: what it prints and what it does to real jobs."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from jobq.cli.failures import ExitCode
from jobq.relay.relay import Leader
from tests.builders import Bench, any_id, turn
from tests.commands import Commands
from tests.waiting import until


@pytest.fixture
async def bench(database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(database_url, redis_url) as bench:
        yield bench


@pytest.fixture
def commands(database_url: str, redis_url: str) -> Commands:
    return Commands(database_url, redis_url)


def add_task(bench: Bench) -> object:
    @bench.app.task(queue="mail")
    async def send(address: str = "nobody") -> None: ...

    return send


async def test_list_shows_jobs_without_their_arguments(bench, commands):
    send = add_task(bench)
    job_id = await bench.enqueue(send, "secret@example.org", headers={"token": "hidden"})

    text = await commands.run("jobs", "list")
    (listed,) = await commands.json("jobs", "list")

    assert text.stdout.splitlines()[0].split() == [
        *("id", "state", "task", "queue", "priority", "attempts", "crashes", "due", "error")
    ]
    assert text.stdout.splitlines()[1].split() == [str(job_id), "waiting", "send", "mail", "2", "0", "0", "now", "-"]
    assert {"id": str(job_id), "state": "waiting", "generation": 1, "run_at": None}.items() <= listed.items()
    assert not {"args", "headers"} & listed.keys()
    assert "secret" not in text.output
    assert "hidden" not in text.output


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        (["--scheduled"], ["later"]),
        (["--retrying"], ["again"]),
        (["--waiting"], ["due", "other"]),
        (["--waiting", "--limit", "1"], ["due"]),
        (["--queue", "bulk"], ["other"]),
        (["--task", "nothing"], []),
    ],
)
async def test_list_takes_filters(bench, commands, filters, found):
    send = add_task(bench)
    names = {
        await bench.enqueue(send): "due",
        await bench.enqueue(send, delay=300): "later",
        (again := await bench.enqueue(send, delay=200)): "again",
        await bench.enqueue(send, queue="bulk"): "other",
    }
    await bench.db.execute("UPDATE jobq.outbox SET attempts = 1 WHERE id = $1", again)

    listed = await commands.json("jobs", "list", *filters)

    assert [{str(job_id): name for job_id, name in names.items()}[row["id"]] for row in listed] == found


async def test_show_tells_all_but_the_arguments_unless_asked(bench, commands):
    job_id = await bench.enqueue(add_task(bench), "a@example.org", headers={"trace": "t1"})
    await bench.db.execute("UPDATE jobq.outbox SET last_error = $1", "no route to redis://:pw@h/0\n\x1b[2Jat all")

    without = await commands.run("jobs", "show", job_id.hex)
    shown = await commands.json("jobs", "show", job_id, "--args")

    lines = dict(line.split(maxsplit=1) for line in without.stdout.splitlines())
    assert lines["id"] == str(job_id)
    assert lines["last_error"] == r"no route to redis://:***@h/0\n\x1b[2Jat all"
    assert "example.org" not in without.output
    assert (shown["args"], shown["headers"]) == ({"address": "a@example.org"}, {"trace": "t1"})


async def test_show_of_a_job_that_is_not_there_exits_1_and_says_where_to_look(bench, commands):
    gone = await commands.run("jobs", "show", any_id())
    no_id = await commands.run("jobs", "show", "12ab")

    assert (gone.exit_code, gone.stdout) == (ExitCode.FAILED, "")
    assert "is not there: it is done, was cancelled, or its transaction never committed" in gone.stderr
    assert no_id.exit_code == ExitCode.USAGE


async def test_cancel_says_what_happened_to_each_job_and_a_cancelled_one_never_runs(bench, commands):
    runs = []

    @bench.app.task
    async def note() -> None:
        runs.append(1)

    worker = await bench.worker()
    waiting, unknown = await bench.commit_and_relay(note), any_id()

    result = await commands.run("jobs", "cancel", waiting, unknown)
    await turn(worker)

    assert result.exit_code == ExitCode.FAILED
    first, second = result.stdout.splitlines()
    assert first == f"{waiting} cancelled"
    assert second.startswith(f"{unknown} is not there")
    assert runs == []
    assert (await bench.stats())["ghost"] == 1


async def test_run_now_hastens_what_is_not_due_and_it_runs_once(bench, commands):
    runs = []

    @bench.app.task
    async def note() -> None:
        runs.append(1)

    leader = await bench.leader(look_ahead=600.0)
    worker = await bench.worker()
    later, due = await bench.enqueue(note, delay=300), await bench.enqueue(note, queue="elsewhere")
    await leader.step()  # its timers hold the delayed job now

    result = await commands.run("jobs", "run-now", later, due)
    await pushed(leader, bench)
    await turn(worker)

    assert result.exit_code == ExitCode.FAILED
    assert result.stdout.splitlines() == [f"{later} due now", f"{due} is due already"]
    assert runs == [1]
    assert await bench.row(later) is None


async def pushed(leader: Leader, bench: Bench) -> None:
    async def is_pushed() -> bool:
        await leader.step()
        return bool(await bench.ready())

    await until(is_pushed, "the relay pushed the job")


async def test_ids_are_needed_and_json_tells_the_outcomes(bench, commands):
    job_id = await bench.enqueue(add_task(bench), delay=300)

    none = await commands.run("jobs", "run-now")
    outcomes = await commands.json("jobs", "run-now", job_id)

    assert none.exit_code == ExitCode.USAGE
    assert outcomes == [{"id": str(job_id), "outcome": "due now"}]


async def test_tables_of_another_release_exit_5(bench, commands):
    await bench.db.execute("UPDATE jobq.alembic_version SET version_num = 'jobq_9999'")

    for command in (["jobs", "list"], ["dead", "list"], ["status"]):
        assert (await commands.run(*command)).exit_code == ExitCode.SCHEMA
