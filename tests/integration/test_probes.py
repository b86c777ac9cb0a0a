"""`/healthz` and `/readyz`: what they answer about workers and relays, and to whom."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from jobq import Context
from jobq.cli import cli, probes
from jobq.cli.failures import ExitCode, Failure
from jobq.cli.probes import Address, AddressType, probed
from jobq.health import Part
from jobq.outbox.database import Database
from jobq.relay.leadership import Relay
from jobq.settings import RelaySettings
from jobq.worker.worker import Worker
from tests.builders import Bench, Gate, running
from tests.faults.proxy import postgres_proxy, redis_proxy
from tests.leaks import process_kept
from tests.probing import ask, ask_now, failing
from tests.waiting import until

LOCAL = Address("127.0.0.1", 0)


@pytest.fixture
async def bench(shared_database_url: str, redis_url: str) -> AsyncIterator[Bench]:
    async with Bench.open(shared_database_url, redis_url) as bench:
        yield bench


@contextmanager
def answering(*parts: Part) -> Iterator[Address]:
    with probed(LOCAL, parts) as address:
        assert address is not None
        yield address


async def until_ready(address: Address) -> None:
    async def is_ready() -> bool:
        return await failing(address) == []

    await until(is_ready, "everything is ready")


async def until_failing(address: Address, *names: str) -> None:
    async def are_failing() -> bool:
        return set(names) <= set(await failing(address))

    await until(are_failing, f"{names} fail")


def says(document: dict[str, Any], name: str) -> str:
    return {check["name"]: check["says"] for check in document["checks"]}[name]


# --- a worker --------------------------------------------------------------------------------------------------------


async def test_a_worker_is_ready_once_it_serves_and_alive_to_its_end(bench: Bench) -> None:
    gate = Gate()

    @bench.app.task
    async def waits(ctx: Context) -> None:
        await gate.wait()

    worker = await bench.worker()
    with answering(worker) as address:
        assert await failing(address) == ["worker.turns"], "it takes no turns yet"
        async with running(worker):
            await until_ready(address)
            _, ready = await ask(address, "/readyz")
            await bench.commit_and_relay(waits)
            await gate.arrived.wait()

            worker.orders.quiet.set()
            assert await failing(address) == ["worker.open"]
            worker.orders.stopping.set()
            worker.orders.wake()
            await until(lambda: not worker.pulse.still_s, "it drains")
            _, draining = await ask(address, "/readyz")
            status, alive = await ask(address, "/healthz")
            gate.open.set()

    assert [check["name"] for check in ready["checks"]] == [
        f"worker.{name}" for name in ("turns", "open", "lease", "registered", "redis", "postgresql")
    ]
    assert says(ready, "worker.open") == "it fetches from default"
    assert says(draining, "worker.open") == "it was told to stop, and fetches nothing more"
    assert (status, alive["ok"]) == (200, True)
    assert says(alive, "worker.turns") == "no turns any more: it stops"


def test_a_worker_that_starts_is_alive_and_not_ready(app_worker: Worker) -> None:
    with answering(app_worker) as address:
        alive, _ = ask_now(address, "/healthz")
        ready, document = ask_now(address, "/readyz")

    assert (alive, ready) == (200, 503)
    assert says(document, "worker.turns").startswith("still starting")


@pytest.fixture
def app_worker() -> Worker:
    """A worker that has opened nothing."""
    from jobq import JobQ

    return Worker(JobQ(database="postgresql://localhost/none", redis="redis://localhost"))


async def test_probes_are_answered_while_a_job_blocks_the_event_loop(bench: Bench) -> None:
    worker = await bench.worker(frozen_after=0.3)
    answers: list[tuple[int, dict[str, Any]]] = []

    def ask_until_dead() -> None:
        ends_at = time.monotonic() + 20
        while time.monotonic() < ends_at and not (answers and answers[-1][0] == 503):
            answers.append(ask_now(address, "/healthz"))

    with answering(worker) as address:
        async with running(worker):
            await until_ready(address)
            thread = threading.Thread(target=ask_until_dead)
            thread.start()
            thread.join()  # nothing else runs in this loop meanwhile

            status, document = answers[-1]
            assert (status, document["failing"]) == (503, ["worker.turns"])
            assert says(document, "worker.turns").endswith("the event loop is blocked, or a turn hangs")
            await until_ready(address)


async def test_a_worker_whose_stores_are_away_says_which(shared_database_url: str, redis_url: str) -> None:
    async with (
        postgres_proxy(shared_database_url) as (postgres, through_postgres),
        redis_proxy(redis_url) as (valkey, through_redis),
        Bench.open(shared_database_url, redis_url, database=through_postgres, redis=through_redis) as bench,
    ):

        @bench.app.task
        async def quick() -> None: ...

        worker = await bench.worker(beat=0.05, lease=2.0)
        with answering(worker) as address:
            async with running(worker):
                await until_ready(address)
                await bench.enqueue(quick)
                for proxy in (postgres, valkey):
                    proxy.is_refusing = True
                    proxy.cut()
                await until_failing(address, "worker.redis", "worker.lease")
                _, document = await ask(address, "/readyz")
                assert says(document, "worker.redis").startswith("away for ")
                assert "no run starts until the next one" in says(document, "worker.lease")
                assert (await ask(address, "/healthz"))[0] == 200, "a restart would not help"

                valkey.is_refusing = False
                await bench.relay()
                await until_failing(address, "worker.postgresql")
                postgres.is_refusing = False
                await until_ready(address)


@pytest.mark.parametrize("says", ["no", "nothing"])
async def test_a_worker_without_jobs_notices_that_postgresql_is_away(
    shared_database_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch, says: str
) -> None:
    monkeypatch.setattr("jobq.worker.worker._LOOK_EVERY_S", 0.05)
    monkeypatch.setattr("jobq.worker.turns._LOOK_S", 1.0)
    async with (
        postgres_proxy(shared_database_url) as (postgres, through),
        Bench.open(shared_database_url, redis_url, database=through) as bench,
    ):
        worker = await bench.worker()
        with answering(worker) as address:
            async with running(worker):
                await until_ready(address)
                if says == "no":
                    postgres.is_refusing = True
                    postgres.cut()
                else:
                    postgres.is_black_hole = True
                await until_failing(address, "worker.postgresql")

                postgres.is_refusing = postgres.is_black_hole = False
                await until_ready(address)


async def test_a_fenced_worker_is_not_ready_until_redis_knows_it_again(bench: Bench) -> None:
    worker = await bench.worker()
    with answering(worker) as address:
        async with running(worker):
            await until_ready(address)
            await bench.redis.delete(bench.broker.keys("default").beats)
            await until_failing(address, "worker.registered")

            await asyncio.to_thread(worker.heartbeat.step)
            await until_ready(address)


# --- a relay ---------------------------------------------------------------------------------------------------------


async def test_a_relay_that_leads_and_one_that_stands_by_are_ready(shared_database_url: str, redis_url: str) -> None:
    async with redis_proxy(redis_url) as (valkey, through):
        relays = [
            Relay(Database.of(shared_database_url), through, "jobq", RelaySettings(detect_loss_every=0.05))
            for _ in range(2)
        ]
        stopping = asyncio.Event()
        with answering(relays[0]) as first, answering(relays[1]) as second:
            assert await failing(first) == ["relay.turns", "relay.role"], "it does not run yet"
            leading = asyncio.create_task(relays[0].run(stopping))
            await until(lambda: relays[0].is_leading, "the first leads")
            await until_ready(first)
            standing_by = asyncio.create_task(relays[1].run(stopping))
            await until_ready(second)
            _, leader = await ask(first, "/readyz")
            _, standby = await ask(second, "/readyz")

            valkey.is_refusing = True
            valkey.cut()
            await until_failing(first, "relay.redis")
            await until_failing(second, "relay.redis")
            assert [(await ask(address, "/healthz"))[0] for address in (first, second)] == [200, 200]
            valkey.is_refusing = False
            await until_ready(first)
            await until_ready(second)
            stopping.set()
            await asyncio.gather(leading, standing_by)

    assert says(leader, "relay.role") == "it leads"
    assert says(standby, "relay.role") == "it stands by for the relay that leads"


async def test_a_relay_that_has_lost_postgresql_is_not_ready(shared_database_url: str, redis_url: str) -> None:
    async with postgres_proxy(shared_database_url) as (postgres, through):
        relay = Relay(Database.of(through), redis_url, "jobq")
        stopping = asyncio.Event()
        with answering(relay) as address:
            serving = asyncio.create_task(relay.run(stopping))
            await until_ready(address)
            postgres.is_refusing = True
            postgres.cut()
            await until_failing(address, "relay.role", "relay.postgresql")
            assert (await ask(address, "/healthz"))[0] == 200
            stopping.set()
            await serving


# --- HTTP ------------------------------------------------------------------------------------------------------------


async def raw(address: Address, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(address.host, address.port)
    writer.write(request)
    try:
        return await reader.read()
    except ConnectionResetError:
        return b""  # closed with something unread
    finally:
        writer.close()


@pytest.mark.parametrize(
    ("request_line", "status"),
    [
        ("GET /healthz?verbose HTTP/1.1", "200 OK"),
        ("GET /healthz HTTP/1.0", "200 OK"),
        ("GET / HTTP/1.1", "404 Not Found"),
        ("GET /metrics HTTP/1.1", "404 Not Found"),
        ("POST /healthz HTTP/1.1", "405 Method Not Allowed"),
        ("hello", "400 Bad Request"),
        ("GET /healthz HTTP/2", "400 Bad Request"),
    ],
)
async def test_only_what_it_has_is_answered(app_worker: Worker, request_line: str, status: str) -> None:
    with answering(app_worker) as address:
        answer = await raw(address, f"{request_line}\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc".encode())

    assert answer.startswith(f"HTTP/1.1 {status}\r\n".encode())
    assert b"Connection: close\r\n" in answer


async def test_head_is_answered_without_a_body(app_worker: Worker) -> None:
    with answering(app_worker) as address:
        answer = await raw(address, b"HEAD /readyz HTTP/1.1\r\n\r\n")

    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
    assert int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0]) > 10
    assert body == b""


async def test_clients_that_say_nothing_or_too_much_keep_nobody_out(
    app_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_DEADLINE_S", 0.3)
    monkeypatch.setattr(probes, "_CLIENTS_LIMIT", 3)
    with answering(app_worker) as address:
        silent = [await asyncio.open_connection(address.host, address.port) for _ in range(6)]
        silent[0][1].write(b"GET /heal")

        async def is_answered() -> bool:
            return (await raw(address, b"GET /healthz HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 200 OK")

        await until(is_answered, "a probe got through")
        for reader, writer in silent:
            assert await asyncio.wait_for(reader.read(), 20) == b"", "it was closed"
            writer.close()
        assert await raw(address, b"x" * 100_000) == b""
        assert await is_answered()


async def test_a_client_beyond_the_limit_is_sent_away_at_once(
    app_worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_DEADLINE_S", 60.0)
    monkeypatch.setattr(probes, "_CLIENTS_LIMIT", 2)
    with answering(app_worker) as address:
        silent = [await asyncio.open_connection(address.host, address.port) for _ in range(2)]

        assert await asyncio.wait_for(raw(address, b"GET /heal"), 30) == b""
        assert not any(reader.at_eof() for reader, _ in silent), "those that were there first wait still"
        for _, writer in silent:
            writer.close()


def test_it_stops_with_the_block(app_worker: Worker) -> None:
    with answering(app_worker) as address:
        ask_now(address, "/healthz")

    with pytest.raises(ConnectionRefusedError):
        ask_now(address, "/healthz")
    assert not any(thread.name == "jobq health" for thread in threading.enumerate())


# --- where -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("0.0.0.0:80", ("0.0.0.0", 80)),
        ("localhost:0", ("localhost", 0)),
        ("[::1]:65535", ("::1", 65535)),
    ],
)
def test_an_address_is_a_host_and_a_port(text: str, address: tuple[str, int]) -> None:
    found = AddressType().convert(text, None, None)

    assert found == address
    assert str(found) == text


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("8080", "'8080' is no HOST:PORT: write 127.0.0.1:8080, or [::1]:8080 for IPv6"),
        ("localhost", "'localhost' is no HOST:PORT"),
        ("localhost:http", "'localhost:http' is no HOST:PORT"),
        ("localhost:65536", "'localhost:65536' is no HOST:PORT"),
        ("::1:8080", "'::1:8080' is no HOST:PORT"),
        (":8080", "':8080' names no host: 127.0.0.1:8080 answers this machine alone, 0.0.0.0:8080 everybody"),
        ("*:8080", "'*:8080' names no host"),
        ("[]:8080", "'[]:8080' names no host"),
    ],
)
def test_what_is_no_address_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(click.BadParameter, match=r".") as refused:
        AddressType().convert(text, None, None)

    assert sentence in str(refused.value)


def test_a_name_is_answered_at_each_of_its_addresses(app_worker: Worker) -> None:
    with probed(Address("localhost", 0), [app_worker]) as address, ExitStack() as stack:
        assert address is not None
        assert address.port > 0
        assert ask_now(address, "/healthz")[0] == 200
        assert ask_now(Address("127.0.0.1", address.port), "/healthz")[0] == 200
        stack.pop_all()


def test_an_address_in_use_or_of_another_machine_is_one_sentence(app_worker: Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Failure, match=f"--health 127.0.0.1:{port}: cannot listen there .Address already in use"):
            probed(Address("127.0.0.1", port), [app_worker]).__enter__()
    with pytest.raises(Failure, match=r"--health 192.0.2.1:80: cannot listen there \(Cannot assign"):
        probed(Address("192.0.2.1", 80), [app_worker]).__enter__()
    with pytest.raises(Failure, match=r"--health no-such.invalid:80: no such host"):
        probed(Address("no-such.invalid", 80), [app_worker]).__enter__()


@pytest.mark.parametrize("command", ["relay", "worker", "run"])
def test_a_port_in_use_ends_a_process_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "probed_shop.py").write_text(
        "from jobq import JobQ\njobs = JobQ()\njobs.task(name='t')(lambda: None)\n"
    )
    urls = {"JOBQ_DATABASE_URL": "postgresql://127.0.0.1:1/none", "JOBQ_REDIS_URL": "redis://127.0.0.1:1"}
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"

        with process_kept():
            result = CliRunner().invoke(cli, [command, "probed_shop:jobs", "--health", address], env=urls)

    sys.modules.pop("probed_shop")
    assert result.exit_code == ExitCode.FAILED
    assert f"--health {address}: cannot listen there (Address already in use)" in result.stderr


# --- the manual ------------------------------------------------------------------------------------------------------


async def test_the_manual_has_a_heading_for_every_check(bench: Bench, shared_database_url: str, redis_url: str) -> None:
    manual = (Path(__file__).parents[2] / "docs" / "health.md").read_text(encoding="utf-8")
    headings = {line.removeprefix("### ").strip("`") for line in manual.splitlines() if line.startswith("### ")}
    worker, relay = await bench.worker(), Relay(Database.of(shared_database_url), redis_url, "jobq")

    names = {f"{part.pulse.part}.{check.name}" for part in (worker, relay) for check in part.checks()}

    assert headings == names
