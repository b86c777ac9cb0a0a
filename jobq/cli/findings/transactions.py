"""What `doctor` finds of transactions and slots that were left open. Called by postgresql. Calls outbox.inspect."""

from __future__ import annotations

from collections.abc import Iterable

from ...outbox import inspect
from ..tables import cell, duration
from . import Finding, Level, Scene

_HELD_TOO_LONG_S = 300.0
_PREPARED_TOO_LONG_S = 300.0
_AWAKE_TOO_LONG_S = 60.0
_LOCKED_TOO_LONG_S = 5.0
_SLOT_TOO_MUCH_BYTES = 1024**3
_END_IT = "end it: pg_terminate_backend(its first number), or set idle_in_transaction_session_timeout"
_SILENCE_IT = "see `prepared`; SET LOCAL jobq.notify = 'off' before PREPARE TRANSACTION"


async def snapshots(scene: Scene) -> Iterable[Finding]:
    holders = await inspect.snapshot_holders(scene.connection, scene.schema, longer_than_s=_HELD_TOO_LONG_S)
    findings = []
    for holder in holders:
        if holder.kind == "session":
            found = f"vacuum is held up for {duration(holder.held_s)} by session {cell(holder.name)}"
            findings.append(Finding("warn", "snapshots", found, _END_IT))
        elif holder.kind == "slot":
            found = f"vacuum is held up by slot {cell(holder.name)}, whose standby is away"
            remedy = "reconnect its standby, or pg_drop_replication_slot() it"
            findings.append(Finding("warn", "snapshots", found, remedy))
    if any(holder.kind == "hidden" for holder in holders):
        found = "transactions of other roles are open, and this role may not see for how long"
        findings.append(Finding("note", "snapshots", found, f"GRANT pg_read_all_stats TO {await scene.role()}"))
    return findings or [Finding("ok", "snapshots", f"none is held for longer than {duration(_HELD_TOO_LONG_S)}")]


async def prepared(scene: Scene) -> Iterable[Finding]:
    remedy = "COMMIT PREPARED or ROLLBACK PREPARED it, as its coordinator decided"
    findings = []
    for one in await inspect.prepared(scene.connection, scene.schema):
        level: Level = "warn" if one.age_s > _PREPARED_TOO_LONG_S else "note"
        holds = "jobs and dead rows" if one.has_jobs else "dead rows"
        since = f"prepared for {duration(one.age_s)}"
        found = f"transaction {cell(one.gid)} of {cell(one.owner)} has been {since}, and holds {holds}"
        findings.append(Finding(level, "prepared", found, remedy))
    return findings or [Finding("ok", "prepared", "no transaction is")]


async def slots(scene: Scene) -> Iterable[Finding]:
    findings = []
    for slot in await inspect.idle_slots(scene.connection, scene.schema):
        if slot.kept_bytes >= _SLOT_TOO_MUCH_BYTES:
            found = f"nobody reads slot {cell(slot.name)}, which keeps {slot.kept_bytes / 1024**3:.1f} GiB of WAL"
            remedy = "reconnect its reader, or pg_drop_replication_slot() it: a full disk stops PostgreSQL"
            findings.append(Finding("warn", "slots", found, remedy))
    return findings or [Finding("ok", "slots", "none keeps much WAL for nobody")]


async def locks(scene: Scene) -> Iterable[Finding]:
    findings = []
    for locker in await inspect.table_lockers(scene.connection, scene.schema, longer_than_s=_LOCKED_TOO_LONG_S):
        who = f"session {cell(locker.session)} {locker.lock} on the outbox"
        found = f"{who}, in a transaction of {duration(locker.age_s)}: nobody can enqueue or complete meanwhile"
        findings.append(Finding("warn", "locks", found, _END_IT))
    return findings or [Finding("ok", "locks", "nobody keeps others from writing to the outbox")]


async def wake_up(scene: Scene) -> Iterable[Finding]:
    findings = []
    for holder in await inspect.wake_holders(scene.connection, scene.schema, longer_than_s=_AWAKE_TOO_LONG_S):
        is_prepared = holder.pid is None
        who = "a prepared transaction" if is_prepared else f"session {holder.pid} {cell(holder.session)}"
        since = "" if holder.age_s is None else f" for {duration(holder.age_s)}"
        found = f"{who} has enqueued and not committed{since}: the relay polls instead of sleeping"
        findings.append(Finding("warn", "wake-up", found, _SILENCE_IT if is_prepared else _END_IT))
    return findings or [Finding("ok", "wake-up", "no old transaction keeps the relay from sleeping")]
