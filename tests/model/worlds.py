"""The bounds that are searched, each small enough to be searched whole: which jobs, which faults, how many.

One job meets nearly everything: the protocol treats jobs apart, but for what one statement or script does to several,
and what one slot or one position in a list does to the other. Worlds with two are for those. Workers and faults are
what makes the orders: most worlds have two of each.
"""

from __future__ import annotations

from .properties import (
    DRAINS,
    DRAINS_SOON,
    KNOWN_IS_LISTED,
    NO_GHOST,
    ONE_BODY,
    ONE_CRASH,
    ONE_EFFECT,
    ONE_START,
    START_OF_LIVE,
)
from .state import World

CALM = World("calm", has_slow_beats=True, has_slow_scrub=True)
RETRIES = World("retries", generations=2, has_slow_beats=True, has_slow_scrub=True)
PLAIN = World("plain", jobs=("plain",), has_slow_beats=True, has_slow_scrub=True)
DEATHS = World("deaths", faults=("death", "late", "sweeper death"), at_most=2)
FLUSH = World("flush", faults=("flush", "death", "reply lost"), at_most=2)
RELAYS = World("relays", faults=("relay death", "reply lost", "aborted push", "flush"), at_most=2, has_slow_scrub=True)
TIME_TRAVEL = World("time travel", faults=("time travel", "death"), at_most=2)
LOST_COMMIT = World("lost commit", jobs=("effects", "effects"), workers=1, faults=("failover",))

WORLDS = [
    CALM,
    RETRIES,
    PLAIN,
    DEATHS,
    World("deaths and retries", generations=2, faults=("death", "late")),
    World("one dead, the other late", faults=("death", "late"), at_most=2, frail=frozenset({1})),
    World("deaths of plain jobs", jobs=("plain",), faults=("death", "late", "reply lost"), at_most=2),
    World("entries given back", can_release=True, faults=("death", "reply lost"), at_most=2),
    World("a task not known everywhere", ignorant=frozenset({0}), faults=("death", "reply lost", "flush"), at_most=2),
    RELAYS,
    FLUSH,
    World("flush and retries", generations=2, faults=("flush",)),
    World("flush and slow beats", has_slow_beats=True, faults=("flush",)),
    TIME_TRAVEL,
    World("late calls and late workers", faults=("late call", "late"), at_most=2),
    World("late calls and flush", faults=("late call", "flush"), at_most=2),
    World("failover and retries", generations=2, faults=("failover", "death"), at_most=2),
    World("failover and late workers", faults=("failover", "late"), at_most=2),
    LOST_COMMIT,
    World("two jobs", jobs=("effects", "plain"), faults=("death", "reply lost")),
    World("two jobs and a flush", jobs=("effects", "plain"), starts_committed=True, faults=("flush",)),
]

BROKEN_RULES = {
    "completion split from its effects": (DEATHS, ONE_EFFECT),
    "ack before commit": (CALM, ONE_START),
    "ack without generation": (RETRIES, ONE_START),
    "no walk": (FLUSH, DRAINS),
    "push without token": (FLUSH, DRAINS_SOON),
    "beat lists only what runs": (PLAIN, ONE_START),
    "sweep before the UPDATE": (DEATHS, ONE_START),
    "adoption on one beat": (CALM, NO_GHOST),
    "known before the list": (RELAYS, KNOWN_IS_LISTED),
    "walk asks Redis first": (CALM, NO_GHOST),
    "walk without a poll in between": (CALM, NO_GHOST),
    "snapshot kept over a failover": (LOST_COMMIT, DRAINS_SOON),
    "DELETE not first": (FLUSH, ONE_BODY),
    "no pre-read": (TIME_TRAVEL, START_OF_LIVE),
    "start without a lease": (DEATHS, ONE_START),
    "crash counted whatever the generation": (DEATHS, ONE_CRASH),
}
"""What a rule's absence breaks, and in which world."""
