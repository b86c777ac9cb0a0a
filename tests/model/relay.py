"""The relay's steps: jobq/relay/relay.py (one turn after the other), push.py, walk.py.

A leader does one thing at a time: it pushes what it has polled before it walks, and once the walk has asked Redis
about a page, it brings what is missing before it does anything else. All the others go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator

from . import state as at
from .scripts import ADOPT, Entry
from .state import LOST, Relay, State, Step, Walk, World

TO_OLD = {"mine": "old", "next": "old"}


def steps(world: World, state: State) -> Iterator[Step]:
    relay = state.relay
    match relay.walk:
        case Walk("missing"):
            yield _read_again(state, relay.walk)
            return
        case Walk("found"):
            yield from _push_found(world, state, relay.walk)
            return
    yield from _meet(world, state)
    if relay.hand:
        yield from _push_polled(world, state)
        return
    if state.fresh or (relay.walk is not None and relay.walk.stage == "page"):
        yield _poll(state)
    if relay.walk is not None and (relay.walk.stage == "polled" or world.broken == "walk without a poll in between"):
        yield from _ask_redis(world, state, relay.walk)
    elif relay.walk is None and world.broken != "no walk":
        yield from _begin_walk(world, state)


def reset(state: State) -> State:
    """A new leader, from a new snapshot (Leader.start): it walks over everything (MUST), and knows no token."""
    # Its first push takes whatever token is there: what the last one left is of no more meaning.
    return _tokens(state, TO_OLD)._replace(relay=Relay(), fresh=frozenset())


def _poll(state: State) -> Step:
    """Leader._poll, poll.sql: one statement moves the snapshot on and reads what the last one did not show."""
    found = tuple(
        Entry(id_, state.jobs[id_].generation) for id_ in sorted(state.fresh) if state.jobs[id_].phase == "live"
    )
    walk = state.relay.walk._replace(stage="polled") if state.relay.walk is not None else None
    says = f"the relay polls, and finds {_told(found)}"
    return Step(says, state._replace(fresh=frozenset(), relay=state.relay._replace(hand=found, walk=walk)))


def _meet(world: World, state: State) -> Iterator[Step]:
    """ReliablePush.touch: an empty push, which finds a loss, or takes whatever token is there."""
    relay, token = state.relay, state.redis[0]
    if world.broken == "push without token":
        if relay.token == ADOPT:
            yield Step("the relay looks at no token", state._replace(relay=relay._replace(token="mine")))
        return
    if relay.token != ADOPT and token == "mine":
        return
    keys, reply = at.run(state.redis, "push", relay.token, "next", ())
    if reply is None:
        yield Step("the relay finds that Redis lost data", _refused(state))
    else:
        yield Step("the relay touches the queue", _answered(state._replace(redis=keys)))


def _push_polled(world: World, state: State) -> Iterator[Step]:
    """ReliablePush.push of what a poll found. Without an answer it is sent again, with the same two tokens."""
    relay = state.relay
    if relay.token == ADOPT:
        return
    says = f"the relay pushes {_told(relay.hand)}"
    for more, kind, after, reply in at.send(world, state, "push", _expected(world, relay), "next", relay.hand):
        if reply is LOST:
            yield Step(says + more, after, kind)
        elif reply is None:
            yield Step(says + ", and is refused", _refused(after), kind)
        else:
            yield Step(says + more, _answered(_put_down(after)), kind)
    if state.redis[0] == "next":
        left = state._replace(relay=relay._replace(hand=(), is_dirty=True))
        yield Step("the relay gives up sending, and leaves it to the walk", left)
    if state.may(world, "aborted push"):
        yield _aborted_push(world, state)


def _aborted_push(world: World, state: State) -> Step:
    """Redis ends push.lua between its two writes, for the first of its entries."""
    entry = state.relay.hand[0]
    redis = at.thawed(state.redis)
    if redis.newest(entry.id) < entry.generation:
        if world.broken == "known before the list":
            redis.known[entry.id] = entry.generation
        else:
            redis.ready[entry.priority].append(entry)
    left = state._replace(redis=at.frozen(redis), relay=state.relay._replace(hand=(), is_dirty=True))
    return Step(f"the relay pushes {_told([entry])}, and Redis dies half way", left.after("aborted push"), "fault")


def _begin_walk(world: World, state: State) -> Iterator[Step]:
    """Walk._read_on, page.sql: a page of rows. A repair, when something is dirty; else the endless scrub."""
    relay = state.relay
    if not relay.is_dirty and not world.has_slow_scrub:
        yield from _scrub(world, state)
        return
    if relay.token == ADOPT and not relay.is_dirty:
        return
    page = tuple(Entry(id_, job.generation) for id_, job in enumerate(state.jobs) if job.phase == "live")
    kind: at.Kind = "step" if relay.is_dirty else "scrub"
    walk: Walk | None = Walk("page", page) if page else None
    if world.broken == "walk asks Redis first":
        page = tuple(Entry(id_, 1) for id_ in range(len(state.jobs)) if not at.known(state.redis, id_))
        walk = Walk("page", page) if page else None
    if walk is not None or relay.is_dirty:
        name = "repair" if relay.is_dirty else "scrub"
        after = state._replace(relay=relay._replace(walk=walk, is_dirty=False))
        yield Step(f"a {name} begins, and reads {_told(walk.entries if walk else ())}", after, kind)


def _scrub(world: World, state: State) -> Iterator[Step]:
    """A whole scrub in one, for worlds in which it is only to bring what was lost."""
    rows = [Entry(id_, job.generation) for id_, job in enumerate(state.jobs) if job.phase == "live"]
    found = tuple(entry for entry in rows if at.known(state.redis, entry.id) < entry.generation)
    if found and not state.fresh and state.relay.token != ADOPT:
        keys, reply = at.run(state.redis, "push", _expected(world, state.relay), "next", found)
        if reply is not None:
            yield Step(f"a scrub brings {_told(found)}", _answered(state._replace(redis=keys)), "scrub")


def _ask_redis(world: World, state: State, walk: Walk) -> Iterator[Step]:
    """Walk.step after the next poll (MUST), HMGET: which of the page Redis does not know at its generation."""
    if state.relay.token == ADOPT:
        return
    missing = tuple(entry for entry in walk.entries if at.known(state.redis, entry.id) < entry.generation)
    if world.broken == "walk asks Redis first":
        missing = walk.entries  # it asked when it began
    next_ = Walk("missing", missing) if missing else None
    says = f"the walk asks Redis, which lacks {_told(missing)}"
    yield Step(says, state._replace(relay=state.relay._replace(walk=next_)))


def _read_again(state: State, walk: Walk) -> Step:
    """Walk._bring, reread.sql: those that are still there, as they are now. Redis was asked in between (MUST)."""
    jobs = [(entry.id, state.jobs[entry.id]) for entry in walk.entries]  # type: ignore[call-overload]
    found = tuple(Entry(id_, job.generation) for id_, job in jobs if job.phase == "live")
    next_ = Walk("found", found) if found else None
    return Step(
        f"the walk reads again, and finds {_told(found)}", state._replace(relay=state.relay._replace(walk=next_))
    )


def _push_found(world: World, state: State, walk: Walk) -> Iterator[Step]:
    if state.relay.token == ADOPT:
        return
    says = f"the walk pushes {_told(walk.entries)}"
    for more, kind, after, reply in at.send(world, state, "push", _expected(world, state.relay), "next", walk.entries):
        done = after._replace(relay=after.relay._replace(walk=None))
        if reply is LOST:
            # Three sends without an answer: the list is dirty again.
            yield Step(says + more, done._replace(relay=done.relay._replace(is_dirty=True)), kind)
        elif reply is None:
            yield Step(says + ", and is refused", _refused(after), kind)
        else:
            yield Step(says + more, _answered(done), kind)


def _expected(world: World, relay: Relay) -> str:
    return ADOPT if world.broken == "push without token" else relay.token


def _put_down(state: State) -> State:
    return state._replace(relay=state.relay._replace(hand=()))


def _answered(state: State) -> State:
    """From now on the token just left is the one to expect, and any that was there before is old."""
    return _tokens(state, {"mine": "old", "next": "mine"})._replace(relay=state.relay._replace(token="mine"))


def _refused(state: State) -> State:
    """ReliablePush._note_refusal: take what is there next time, and have the walk repair everything."""
    relay = state.relay._replace(token=ADOPT, hand=(), is_dirty=True, walk=None)
    return _tokens(state, TO_OLD)._replace(relay=relay)


def _tokens(state: State, names: dict[str, str]) -> State:
    call = state.late_call
    if call is not None and call[0] == "push":
        call = ("push", names.get(call[1], call[1]), names.get(call[2], call[2]), call[3])
    redis = at.renamed_token(state.redis, names)
    assert redis is not None
    return state._replace(redis=redis, old_redis=at.renamed_token(state.old_redis, names), late_call=call)


def _told(entries: tuple[Entry, ...] | list[Entry]) -> str:
    return ", ".join(f"{entry.id}:{entry.generation}" for entry in entries) or "nothing"
