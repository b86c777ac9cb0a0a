"""The demo: a shop on private servers, customers, three faults, and a count of everything afterwards.

    stage       the processes: a shop, two relays, two workers
    mailbox     a mail server that keeps what it receives
    traffic     the customers
    faults      what is broken, and how long it is felt
    stores      what an outsider sees in PostgreSQL and Redis
    verdict     what became of the orders
    screen, table    how that is shown

Invariant: the numbers are counted, and everything that was started ends with the demo, whatever ends it.
Called by cli. Calls embedded, outbox and broker; relay, worker and shop are processes of their own.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, suppress

import anyio
import click

from .. import embedded
from .faults import Faults
from .mailbox import Mailbox
from .screen import Screen, Standing, open_screen
from .stage import BEAT_S, LEASE_S, QUEUES, SLOTS, Stage
from .stores import Stores
from .table import last_words, table
from .traffic import Traffic, plan
from .verdict import Witness, judge

_DONE_S = 90.0
_QUIET_S = 15.0
_SHOW_EVERY_S = 0.25
_POLL_S = 0.02


def run(orders: int, seed: int, *, keep: bool) -> bool:
    """Run the whole demo. Returns whether jobq kept its promise. Raises DemoFailed, KeyboardInterrupt."""
    with open_screen(orders) as screen:
        screen.say(f"Seed {seed}: `--seed {seed}` repeats the random choices. Starting PostgreSQL and Valkey, durable.")
        with embedded.start(durable=True) as servers:
            return asyncio.run(_play(servers, orders, seed, screen, keep=keep))


async def _play(servers: embedded.Servers, orders: int, seed: int, screen: Screen, *, keep: bool) -> bool:
    mailbox = Mailbox(seed)
    traffic = Traffic(plan(orders, seed))
    async with AsyncExitStack() as stack:
        stores = await stack.enter_async_context(Stores.open(servers.database_url, servers.redis_url, QUEUES))
        stage = Stage(servers, await stack.enter_async_context(mailbox.serve()))
        stack.callback(stage.stop)
        await stage.start()
        screen.say(
            f"2 relays, 2 workers with {SLOTS} slots, a shop and a mail server are up. "
            f"Lease {LEASE_S} s, a beat every {BEAT_S} s (by default 15 and 2)."
        )
        witness = Witness(stores)
        faults = Faults(stage, stores, traffic, mailbox, screen)
        async with anyio.create_task_group() as group:
            group.start_soon(_watch, screen, stores, witness, traffic, mailbox)
            async with anyio.create_task_group() as play:
                play.start_soon(faults.run)
                play.start_soon(traffic.run, stage.shop_url)
            await _wait_until_done(stage, stores)
            group.cancel_scope.cancel()
        screen.say(f"All {orders:,} orders sent, all jobs done. Counting.")
        verdict = await judge(stores, witness, traffic.answers, mailbox.mails)
        screen.end()
        click.echo(f"\n{orders:,} orders over HTTP in {screen.elapsed_s:.0f} s, seed {seed}\n")
        click.echo(table(verdict, faults.recoveries))
        click.echo(f"\n{_colored(last_words(verdict), 'red' if verdict.problems else 'green')}")
        if keep:
            await _keep(servers, stage)
    return not verdict.problems


async def _watch(screen: Screen, stores: Stores, witness: Witness, traffic: Traffic, mailbox: Mailbox) -> None:
    query = "SELECT (SELECT count(*) FROM ledger), (SELECT count(*) FROM jobq.outbox)"
    while True:
        ((booked, waiting),) = await stores.rows(query)
        await witness.look()
        screen.show(Standing(traffic.sent, booked, len(mailbox.mails), waiting))
        await anyio.sleep(_SHOW_EVERY_S)


async def _wait_until_done(stage: Stage, stores: Stores) -> None:
    """Return when nothing is left to do, or when that takes too long: the verdict counts what is left."""
    with anyio.move_on_after(_DONE_S):
        while await stores.waiting():
            stage.check()
            await anyio.sleep(_POLL_S)
    # Acks follow commits, so Redis is a moment behind.
    with anyio.move_on_after(_QUIET_S):
        while await stores.left_in_redis():
            stage.check()
            await anyio.sleep(_POLL_S)


async def _keep(servers: embedded.Servers, stage: Stage) -> None:
    """Leave everything up until Ctrl-C."""
    click.echo(
        f"\nAll of it stays up until Ctrl-C. In another terminal:\n\n"
        f"  export JOBQ_DATABASE_URL='{servers.database_url}'\n"
        f"  export JOBQ_REDIS_URL='{servers.redis_url}'\n"
        f"  jobq status\n"
        f"  psql \"$JOBQ_DATABASE_URL\" -c 'SELECT * FROM ledger ORDER BY id DESC LIMIT 5'\n"
        f'  curl {stage.shop_url}/orders -d \'{{"email": "me@mail.example", "item": "teapot", "quantity": 1}}\'\n'
        f"  tail -f {stage.logs}/worker-*.log\n",
        err=True,
    )
    with suppress(asyncio.CancelledError):
        await asyncio.get_running_loop().create_future()


def _colored(text: str, color: str) -> str:
    return text if os.environ.get("NO_COLOR") else click.style(text, fg=color)
