"""The numbers of the demo as a table. Pure. Called by demo."""

from __future__ import annotations

from collections.abc import Sequence

from .faults import Recovery
from .verdict import Verdict

KEPT = "Nothing was lost, nothing was booked twice, and nothing ran for an order that was rolled back."
_ALLOWED = "allowed: a mail is an outside effect, so it is sent at least once; all under one Message-ID"


def table(verdict: Verdict, recoveries: Sequence[Recovery]) -> str:
    """Render the numbers, and how long each fault was felt."""
    rows = [
        ("orders committed", verdict.committed, "each with two jobs, enqueued in its own transaction"),
        ("orders rolled back", verdict.rolled_back, "after they had enqueued the same two jobs"),
        ("orders sent twice", verdict.sent_twice, "one order each: two requests, one Idempotency-Key"),
        ("booked", verdict.booked, "a ledger row each, through ctx.complete()"),
        ("receipts", verdict.receipts, "a mail each"),
        ("LOST", verdict.lost, "bookings and receipts of committed orders"),
        ("booked twice", verdict.booked_twice, ""),
        ("booked, and still to be booked", verdict.half_done, "at one moment; looked for all the while"),
        ("bookings of rolled-back orders", verdict.booked_after_rollback, ""),
        ("mails for rolled-back orders", verdict.mails_after_rollback, ""),
        ("duplicate mails", verdict.duplicate_mails, _ALLOWED),
        ("left over", verdict.left_over, "rows in the outbox, dead letters, entries in Redis"),
    ]
    counts = [f"  {name:<32}{count:>7,}   {note}".rstrip() for name, count, note in rows]
    times = [
        f"  {'over 60 s' if recovery.seconds is None else f'{recovery.seconds:.1f} s':>9}"
        f"   {recovery.fault}, until {recovery.until}"
        for recovery in sorted(recoveries)
    ]
    return "\n".join([*counts, "", "  recovery", *times])


def last_words(verdict: Verdict) -> str:
    """Say whether the promise was kept, or everything that is wrong."""
    return "\n  ".join(["NOT as promised:", *verdict.problems]) if verdict.problems else KEPT
