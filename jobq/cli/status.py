"""`jobq status`: what waits, runs and failed, and who works on it. Called by the command group. Calls report."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from ..broker.inspect import REPAIRS
from .report import ParkedReport, QueueReport, Report, find_offers, gather
from .stores import Stores, stores_options
from .tables import cell, duration, show_json, show_table

_COLUMNS = ("waiting", "running", "scheduled", "retrying", "parked", "dead")


@click.command()
@click.option("--queue", "-q", metavar="NAME", help="Only this queue.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document.")
@stores_options
def status(stores: Stores, queue: str | None, as_json: bool) -> None:
    """Count what waits, runs and failed.

    A job that is due waits until a worker has taken it; one that is parked waits for a worker that knows its task,
    which calls it back. Where a registered worker knows it, it takes up to 5 seconds to see whether that one lives.
    Numbers with a ~ are estimates: the table is big. A worker that was killed stays in the list until another has
    swept it; `jobq doctor` tells which ones live.

    \b
    Examples:
      jobq status
      jobq status --json | jq .total.counters
    """
    report = stores.run(lambda stores: _gather(stores, queue))
    if as_json:
        show_json(_document(stores, report))
    else:
        _show(report)
    if report.redis_error is not None:
        raise report.redis_error


async def _gather(stores: Stores, queue: str | None) -> Report:
    async with stores.postgresql("status") as connection, stores.redis() as client:
        report = await gather(stores, connection, client, only=queue)
        await find_offers(stores, connection, client, report)
        return report


def _document(stores: Stores, report: Report) -> dict[str, Any]:
    leader = report.leader
    total = asdict(report.total)
    del total["queue"]
    return {
        "schema": stores.schema,
        "is_estimate": report.counts.is_estimate,
        "redis": {"is_reachable": report.redis_error is None},
        "relay": {"leads": leader is not None, "backend_pid": leader.pid if leader else None},
        "total": total,
        "queues": [asdict(queue) for queue in report.queues],
        "parked": [_without(parked, "offered_by") for parked in report.parked],
        "workers": [_without(worker, "tasks") for worker in report.workers],
    }


def _without(row: Any, hidden: str) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name != hidden}


def _show(report: Report) -> None:
    rows = [_row(queue.queue, queue, report) for queue in report.queues]
    if len(rows) != 1:
        rows.append(_row("total", report.total, report))
    show_table(("queue", *(f">{name}" for name in _COLUMNS), ">oldest"), rows)
    click.echo()
    for parked in report.parked:
        click.echo(f"parked in {cell(parked.queue)}: {parked.jobs} wait for {cell(parked.task)}; {_offer(parked)}")
    if report.leader is None:
        click.echo("relay: none leads")
    else:
        click.echo(f"relay: leads, connected for {duration(report.leader.connected_s)}")
    if report.redis_error is not None:
        click.echo("redis: away, so what runs is counted as waiting, and workers are not known")
        return
    counters = report.total.counters or {}
    repairs = " ".join(f"{name}={counters[name]}" for name in REPAIRS if counters.get(name))
    click.echo(f"repairs: {repairs or 'none'}")
    if not report.workers:
        click.echo("workers: none")
        return
    click.echo()
    show_table(
        ("worker", "host", ">pid", "version", "queues", ">running", ">slots"),
        [(w.name, w.host, w.pid, w.version, ",".join(w.queues), w.running, w.slots) for w in report.workers],
    )


def _offer(parked: ParkedReport) -> str:
    if parked.is_offered:
        return "a live worker offers it, and will call them back"
    return "no live worker offers it"


def _row(name: str | None, queue: QueueReport, report: Report) -> list[Any]:
    about = "~" if report.counts.is_estimate else ""
    numbers = [getattr(queue, column) for column in _COLUMNS]
    shown = [number if number is None else f"{about}{number}" for number in numbers]
    return [name, *shown, duration(queue.oldest_waiting_s)]
