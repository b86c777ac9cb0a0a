"""The relay's sleep, and the commits that must wake it: jobq/relay/wake_up.py, and the trigger of the outbox.

A small model of its own. A writer takes a share of the lock K with its INSERT, or says that it will notify; its
commit becomes visible first, then its locks go, then its notification arrives. The relay sleeps holding K alone.
The one thing that must never be: the relay waits, a committed row is unseen, and nothing is on its way to wake it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Literal, NamedTuple

WRITERS = 2


class Writer(NamedTuple):
    stage: Literal["idle", "written", "visible", "over"] = "idle"
    shares: bool = False
    """It has a share of K."""
    notifies: bool = False


class Moment(NamedTuple):
    writers: tuple[Writer, ...] = (Writer(),) * WRITERS
    relay: Literal["clear", "poll", "try", "look", "lock", "clear again", "poll again", "clear late", "wait"] = "clear"
    seen: frozenset[int] = frozenset()
    view: frozenset[int] = frozenset()
    """The snapshot of a statement that does two things."""
    has_lock: bool = False
    is_woken: bool = False

    @property
    def visible(self) -> frozenset[int]:
        return frozenset(number for number, writer in enumerate(self.writers) if writer.stage in ("visible", "over"))


def steps(moment: Moment, broken: str) -> Iterator[tuple[str, Moment]]:
    for number, writer in enumerate(moment.writers):
        yield from _write(moment, number, writer, broken)
    yield _relay(moment, broken)


def _write(moment: Moment, number: int, writer: Writer, broken: str) -> Iterator[tuple[str, Moment]]:
    def with_writer(changed: Writer, *, is_woken: bool = moment.is_woken) -> Moment:
        writers = (*moment.writers[:number], changed, *moment.writers[number + 1 :])
        return moment._replace(writers=writers, is_woken=is_woken)

    if writer.stage == "idle":
        refused = moment.has_lock
        notifies = refused and broken != "nobody notifies"
        yield f"writer {number} inserts", with_writer(Writer("written", shares=not refused, notifies=notifies))
    elif writer.stage == "written":
        yield f"writer {number} commits", with_writer(writer._replace(stage="visible"))
        yield f"writer {number} rolls back", with_writer(Writer())
    elif writer.stage == "visible":
        over = Writer("over")
        yield f"writer {number}'s locks go", with_writer(over, is_woken=moment.is_woken or writer.notifies)


def _relay(moment: Moment, broken: str) -> tuple[str, Moment]:
    """Leader.step and _rest, one statement after the other."""
    match moment.relay:
        case "clear":
            return "the relay's turn begins", moment._replace(relay="poll", is_woken=False)
        case "poll":
            return _polled(moment, "wait" if moment.has_lock else "try")
        case "try" if broken == "K and poll in one statement":
            return "a statement that tries for K and polls begins", moment._replace(relay="lock", view=moment.visible)
        case "try":
            return _locked(moment, "wait" if broken == "no poll after K" else "clear again")
        case "lock":
            says, after = _locked(moment, "wait")
            return says, after._replace(seen=moment.view)
        case "clear again":
            return "the relay's last turn begins", moment._replace(relay="poll again", is_woken=False)
        case "poll again":
            return _polled(moment, "clear late" if broken == "woken cleared after the poll" else "wait")
        case "clear late":
            return "the relay forgets that it was woken", moment._replace(relay="wait", is_woken=False)
        case _:
            if not moment.is_woken:
                return "the relay sleeps", moment
            return "the relay wakes", moment._replace(relay="clear")


def _polled(moment: Moment, then: Literal["try", "clear late", "wait"]) -> tuple[str, Moment]:
    if moment.visible == moment.seen:
        return "the relay polls, and finds nothing", moment._replace(relay=then)
    return "the relay polls, and finds rows", moment._replace(relay="clear", seen=moment.visible, has_lock=False)


def _locked(moment: Moment, then: Literal["clear again", "wait"]) -> tuple[str, Moment]:
    if any(writer.shares and writer.stage != "over" for writer in moment.writers):
        return "K is refused", moment._replace(relay="clear")
    return "the relay has K", moment._replace(relay=then, has_lock=True)


def is_slept_through(moment: Moment) -> bool:
    """A commit is over, the relay waits and has not seen it, and nothing will wake it."""
    unseen = moment.visible - moment.seen
    will_wake = any(writer.notifies and writer.stage != "over" for writer in moment.writers)
    waits = moment.relay == "wait" and not moment.is_woken
    return waits and not will_wake and any(moment.writers[number].stage == "over" for number in unseen)


def search(broken: str = "") -> tuple[int, list[str]]:
    """All moments: how many, and the shortest way to a commit that is slept through, if there is one."""
    ways: dict[Moment, tuple[Moment, str] | None] = {Moment(): None}
    todo = deque(ways)
    while todo:
        moment = todo.popleft()
        if is_slept_through(moment):
            return len(ways), _way(ways, moment)
        for says, after in steps(moment, broken):
            if after not in ways:
                ways[after] = (moment, says)
                todo.append(after)
    return len(ways), []


def _way(ways: dict[Moment, tuple[Moment, str] | None], moment: Moment) -> list[str]:
    way = []
    while (came := ways[moment]) is not None:
        moment, says = came
        way.append(says)
    return way[::-1]
