"""Mutations of the relay."""

from __future__ import annotations

from tests.mutants.mutation import Edit, Mutation

_RELAY = "jobq/relay/relay.py"
_WALK = "jobq/relay/walk.py"
_FOLLOW = "jobq/outbox/follow.py"

OF_RELAY = (
    Mutation(
        name="walk-off",
        breaks="Nobody compares the two stores.",
        edits=(
            Edit(
                _WALK,
                '        """Compare the page read last time with Redis, and read the next one."""\n',
                "        return\n",
            ),
        ),
        tests=(
            "tests/faults/test_crash_table.py::test_after_commit_before_push_the_next_leaders_walk_finds_it",
            "tests/integration/test_walk.py::test_the_scrub_finds_what_every_other_path_missed",
        ),
    ),
    Mutation(
        name="walk-without-second-look",
        breaks="The walk pushes what Redis lacks without reading it again.",
        edits=(
            Edit(
                _WALK,
                "        entries = await follow.reread(self._connection, self._schema, missing)\n",
                '        entries = [f"{id_.hex}:{of}:{priority}" for id_, of in rows if id_ in set(missing)]\n',
            ),
        ),
        tests=(
            "tests/integration/test_walk.py"
            "::test_a_job_completed_and_acked_after_its_page_was_read_is_not_pushed_again",
        ),
    ),
    Mutation(
        name="walk-order-reversed",
        breaks="The walk reads the rows again before it asks Redis, and not after it.",
        edits=(
            Edit(
                _WALK,
                "        known = await self._broker.known(queue, [id_ for id_, _ in rows])\n"
                "        missing = [id_ for (id_, generation), has in zip(rows, known, strict=True) "
                "if has < generation]\n"
                "        if not missing:\n"
                "            return\n"
                "        entries = await follow.reread(self._connection, self._schema, missing)\n",
                "        found = await follow.reread(self._connection, self._schema, [id_ for id_, _ in rows])\n"
                "        known = await self._broker.known(queue, [type(rows[0][0])(entry[:32]) for entry in found])\n"
                '        entries = [entry for entry, it in zip(found, known) if it < int(entry.split(":")[1])]\n',
            ),
        ),
        tests=("tests/integration/test_walk.py::test_a_job_that_ends_while_the_walk_compares_is_not_pushed_again",),
    ),
    Mutation(
        name="old-horizon",
        breaks="A poll looks as far ahead as before the timers were read.",
        edits=(
            Edit(
                _RELAY,
                "        await self._timers.look_ahead()\n        found = await self._poll()\n",
                "        self._old = self._timers.horizon\n"
                "        await self._timers.look_ahead()\n"
                "        found = await self._poll()\n",
            ),
            Edit(
                _RELAY,
                "            horizon=self._timers.horizon,\n",
                '            horizon=getattr(self, "_old", self._timers.horizon),\n',
            ),
        ),
        tests=(
            "tests/integration/test_timers.py"
            "::test_a_delay_around_the_look_ahead_is_pushed_whenever_it_was_written_and_committed",
            "tests/integration/test_timers.py::test_no_delay_is_lost_while_rows_are_committed_all_the_time",
        ),
    ),
    Mutation(
        name="late-commits-missed",
        breaks="A poll does not ask for transactions that were open at the last one.",
        edits=(
            Edit(
                "jobq/outbox/sql/poll.sql",
                "        OR xid = ANY (CAST(:xip AS xid8[]))\n",
                "        OR (xid = ANY (CAST(:xip AS xid8[])) AND false)\n",
            ),
        ),
        tests=("tests/integration/test_follow.py",),
    ),
    Mutation(
        name="sleep-without-a-later-poll",
        breaks="The relay sleeps as soon as it has K, and does not poll once more.",
        edits=(
            Edit(
                _RELAY,
                "            return 0.0\n        idle = ",
                "            return self._settings.sleep_longest\n        idle = ",
            ),
        ),
        tests=(
            "tests/integration/test_wake_up.py"
            "::test_what_is_committed_between_the_last_poll_and_the_lock_is_found_before_it_sleeps",
        ),
    ),
    Mutation(
        name="lock-and-poll-in-one",
        breaks="The relay takes K in the statement that polls, whose snapshot is older than the lock.",
        edits=(
            Edit(
                "jobq/outbox/sql/poll.sql",
                "    queue, priority, entries, again, delays\n",
                "    queue, priority, entries, again, delays,\n"
                "    CASE WHEN CAST(:wanted AS boolean)\n"
                "        THEN pg_try_advisory_lock(CAST(:space AS int), hashtext(CAST(:schema_name AS text))) END\n",
            ),
            Edit(
                _FOLLOW,
                "    rows = await _ask(_poll, connection, schema, xmax=since.xmax, xip=since.xip, horizon=horizon, "
                "limit=limit)\n",
                "    values = dict(xmax=since.xmax, xip=since.xip, horizon=horizon, limit=limit)\n"
                "    values |= dict(wanted=K['wanted'], space=WAKE_LOCK, schema_name=schema)\n"
                "    rows = await _ask(_poll, connection, schema, **values)\n"
                "    K['had'] = bool(rows[0][7])\n",
            ),
            Edit(_FOLLOW, "NewRows(*row[2:])", "NewRows(*row[2:7])"),
            Edit(_FOLLOW, '_CHANNEL = "jobq"\n', '_CHANNEL = "jobq"\nK = {"wanted": False, "had": False}\n'),
            Edit(
                _RELAY,
                "        self._since, lists, is_cut = await follow.poll(\n",
                "        may_sleep = self._idle_turns > self._settings.sleep_after and self._backlog.is_clean\n"
                "        follow.K['wanted'] = may_sleep and self._wake_up._can_hear and not self._wake_up.is_asleep\n"
                "        self._since, lists, is_cut = await follow.poll(\n",
            ),
            Edit(
                _RELAY,
                "        # The snapshot has moved on",
                "        self._wake_up.is_asleep |= follow.K['had']\n        # The snapshot has moved on",
            ),
            Edit(_RELAY, "        if may_sleep and await self._wake_up.fall_asleep():\n", "        if False:\n"),
        ),
        tests=(
            "tests/integration/test_wake_up.py"
            "::test_it_sleeps_after_a_few_quiet_polls_and_one_more_that_it_takes_with_the_lock",
            "tests/faults/test_wake_up_race.py",
        ),
    ),
    Mutation(
        name="snapshot-kept",
        breaks="A relay that lost PostgreSQL goes on from the snapshot it had, which a restart may have undone.",
        edits=(
            Edit(
                _RELAY,
                "        since, now = await follow.take_snapshot(connection, schema)\n",
                "        since, now = await follow.take_snapshot(connection, schema)\n"
                "        is_first = broker.database_id not in _KEPT\n"
                "        since = _KEPT.get(broker.database_id, since)\n",
            ),
            Edit(
                _RELAY,
                "        leader._backlog.mark_all()\n        return leader\n",
                "        if is_first:\n            leader._backlog.mark_all()\n        return leader\n",
            ),
            Edit(
                _RELAY,
                "        # The snapshot has moved on",
                "        _KEPT[self._push._broker.database_id] = self._since\n        # The snapshot has moved on",
            ),
            Edit(_RELAY, "_FULL_LIST_EVERY_S = 0.05\n", "_FULL_LIST_EVERY_S = 0.05\n_KEPT = {}\n"),
        ),
        tests=(
            "tests/faults/test_postgres_lost_commits.py"
            "::test_what_is_committed_under_numbers_that_were_lost_runs_and_what_was_lost_does_not[by_crash]",
            "tests/integration/test_relay.py::test_what_a_relay_has_read_and_not_pushed_is_brought_by_the_next_one",
        ),
    ),
    Mutation(
        name="no-hold-after-a-loss",
        breaks="After a loss of Redis workers have no time to say what they run.",
        edits=(Edit("jobq/relay/push.py", "hold_s=2 * self._settings.beat", "hold_s=0.0"),),
        tests=(
            "tests/integration/test_walk.py"
            "::test_after_a_loss_nothing_is_pushed_before_the_hold_is_over_and_then_everything",
        ),
    ),
)
