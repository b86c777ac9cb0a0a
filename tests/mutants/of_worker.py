"""Mutations of the worker."""

from __future__ import annotations

from tests.mutants.mutation import Edit, Mutation

_TURNS = "jobq/worker/turns.py"
_OWNED = "jobq/worker/owned.py"
_HEARTBEAT = "jobq/worker/heartbeat.py"
_SETTLER = "jobq/worker/settler.py"
_SWEEPER = "jobq/worker/sweeper.py"
_WORKER = "jobq/worker/worker.py"
_SHUTDOWN = "jobq/worker/shutdown.py"

OF_WORKER = (
    Mutation(
        name="ack-before-commit",
        breaks="Entries are acked before their rows are settled.",
        edits=(
            Edit(
                _SETTLER,
                "        locked = set(holdings)\n        try:\n",
                "        locked = set(holdings)\n"
                "        for holding in holdings:\n"
                "            await self._broker.ack(holding.queue, self._worker, [holding.entry])\n"
                "        try:\n",
            ),
        ),
        tests=("tests/integration/test_settler.py::test_nothing_is_acked_before_its_row_is_settled",),
    ),
    Mutation(
        name="pre-read-any-generation",
        breaks="The pre-read lets any generation run.",
        edits=(
            Edit(
                _TURNS, "            if job is None or job.generation > generation:\n", "            if job is None:\n"
            ),
            Edit(_TURNS, "            elif job.generation < generation:\n", "            elif False:\n"),
        ),
        tests=(
            "tests/integration/test_turns.py::test_an_entry_whose_row_is_newer_is_a_ghost_and_never_runs",
            "tests/integration/test_turns.py::test_an_entry_whose_row_is_older_is_rewound_and_never_runs",
        ),
    ),
    Mutation(
        name="block-on-a-queue",
        breaks="An idle worker blocks on a ready list, and a wait cut off loses an entry.",
        edits=(
            Edit(
                "jobq/broker/scripts.py",
                "self.keys(queue).bell: queue for",
                "self.keys(queue).ready[1]: queue for",
            ),
            Edit(
                "jobq/broker/scripts.py",
                "self.client.sent_at_bell(self.keys(queue).bell, fetch,",
                "self.client.sent_at_bell(self.keys(queue).ready[1], fetch,",
            ),
        ),
        tests=(
            "tests/integration/test_turns.py::test_an_idle_worker_is_woken_by_the_bell_and_never_blocks_on_a_queue",
            "tests/integration/test_turns_queues.py::test_the_bell_of_every_queue_wakes_a_worker",
        ),
    ),
    Mutation(
        name="start-on-an-old-lease",
        breaks="Runs start however long ago the last beat was answered.",
        edits=(
            Edit(
                _HEARTBEAT,
                "        return time.monotonic() - self.acked_at < self._settings.start_margin\n",
                "        return True\n",
            ),
        ),
        tests=("tests/integration/test_turns.py::test_nothing_starts_when_the_last_answered_beat_is_too_old",),
    ),
    Mutation(
        name="vanished-with-its-queue",
        breaks="A worker counts as vanished when the name of its queue is lost.",
        edits=(Edit(_SWEEPER, ", *(queue for queue, _ in self._watches)}", "}"),),
        tests=(
            "tests/integration/test_sweeper.py"
            "::test_a_worker_that_beats_is_not_swept_when_the_names_of_the_queues_are_lost",
        ),
    ),
    Mutation(
        name="sweep-where-no-writes-go",
        breaks="Workers are swept while the node of their queue takes no writes.",
        edits=(Edit(_SWEEPER, "await self._broker.check_writable(queue)", "pass"),),
        tests=("tests/faults/test_cluster.py::test_nobody_is_swept_while_the_node_of_his_queue_takes_no_writes",),
    ),
    Mutation(
        name="suspect-beside-others",
        breaks="A job that killed two workers runs beside others.",
        edits=(
            Edit(
                _TURNS,
                "            elif job.crashes >= CRASHES_BEFORE_ALONE and not alone:\n",
                "            elif False:\n",
            ),
        ),
        tests=("tests/integration/test_turns.py::test_a_job_that_killed_two_workers_runs_with_nothing_beside_it",),
    ),
    Mutation(
        name="suspect-among-entries",
        breaks="A job that killed two workers runs while other entries stand in its worker's list.",
        edits=(Edit(_TURNS, "len(self._owned) == 1", "not self.runs"),),
        tests=(
            "tests/integration/test_turns.py::test_nothing_but_the_suspect_stands_in_the_working_list_while_it_runs",
        ),
    ),
    Mutation(
        name="shutdown-without-release",
        breaks="What has not started is not handed back when the worker stops.",
        edits=(
            Edit(
                _TURNS,
                '        """Release what has not started, jobs that wait for a thread among it."""\n',
                "        return\n",
            ),
        ),
        tests=(
            "tests/integration/test_worker.py::test_what_has_not_started_goes_back_to_the_front_in_order",
            "tests/integration/test_worker.py"
            "::test_jobs_that_wait_for_a_thread_go_back_unrun_as_soon_as_the_worker_stops",
        ),
    ),
    Mutation(
        name="stop-counts-as-crash",
        breaks="What a stopping worker cannot interrupt is left to a sweeper, which counts a crash.",
        edits=(Edit(_SHUTDOWN, "            self._postpone_runs()\n", ""),),
        tests=(
            "tests/integration/test_worker.py"
            "::test_a_task_that_swallows_its_cancellation_runs_again_after_the_lease_and_the_exit_code_says_so",
        ),
    ),
    Mutation(
        name="name-of-the-host",
        breaks="A worker is named after its host and process id, which containers share.",
        edits=(Edit(_WORKER, 'f"w-{secrets.token_hex(6)}"', 'f"w-{socket.gethostname()}-{os.getpid()}"'),),
        tests=("tests/integration/test_worker.py::test_two_workers_on_one_host_with_one_pid_have_different_names",),
    ),
    Mutation(
        name="heartbeat-in-the-loop",
        breaks="The heartbeat is a task of the event loop, which jobs may block.",
        edits=(
            Edit(
                _HEARTBEAT,
                "        self._thread.start()\n",
                "        import asyncio\n\n"
                "        async def beat_in_the_loop() -> None:\n"
                "            while not self._stopping.is_set():\n"
                "                self.step()\n"
                "                await asyncio.sleep(self._settings.beat)\n\n"
                "        self._task = asyncio.get_running_loop().create_task(beat_in_the_loop())\n",
            ),
            Edit(
                _HEARTBEAT,
                "        self._stopping.set()\n",
                "        self._stopping.set()\n        self._task.cancel()\n",
            ),
        ),
        tests=("tests/integration/test_heartbeat.py::test_the_beat_goes_on_while_the_loop_is_blocked",),
    ),
    Mutation(
        name="beat-lists-running-only",
        breaks="A beat does not list what has been fetched and not started, or has ended and is not settled.",
        edits=(
            Edit(
                _OWNED,
                "list(self._holdings[queue].values()) if holding.is_listed]",
                "list(self._holdings[queue].values()) if holding.is_running]",
            ),
        ),
        tests=(
            "tests/unit/test_owned.py",
            "tests/integration/test_heartbeat.py"
            "::test_whatever_a_process_owns_is_listed_until_redis_has_confirmed_its_end",
        ),
    ),
    Mutation(
        name="beat-lists-the-dead",
        breaks="A beat vouches for a run whose task is gone.",
        edits=(
            Edit(
                _OWNED,
                "        return self.is_settling or self.task is None or not self.task.done()\n",
                "        return True\n",
            ),
        ),
        tests=("tests/unit/test_owned.py",),
    ),
    Mutation(
        name="adoption-on-one-beat",
        breaks="An entry is adopted that only one beat has seen.",
        edits=(Edit(_HEARTBEAT, "        agreed = set(before.unknown)\n", "        agreed = set(now.unknown)\n"),),
        tests=("tests/integration/test_heartbeat.py::test_nothing_is_adopted_that_only_every_other_beat_saw",),
    ),
    Mutation(
        name="put-back-on-one-beat",
        breaks="What Redis lacks is put back by the first beat that misses it.",
        edits=(
            Edit(
                _HEARTBEAT,
                "            put_back=[raw for raw in before.missing if raw in still_owned],\n",
                "            put_back=owned,\n",
            ),
        ),
        tests=("tests/integration/test_heartbeat.py::test_a_beat_that_races_an_ack_brings_no_finished_job_back",),
    ),
    Mutation(
        name="sweep-before-update",
        breaks="A dead worker is swept before its jobs have their new generation.",
        edits=(
            Edit(
                _SWEEPER,
                "        standings = {}\n        if entries:\n",
                "        standings = {}\n"
                "        swept = await self._broker.sweep(queue, worker, counter, {})\n"
                "        if entries:\n",
            ),
            Edit(
                _SWEEPER,
                "        swept = await self._broker.sweep(queue, worker, counter, _verdicts(entries, standings))\n",
                "        _verdicts(entries, standings)\n",
            ),
        ),
        tests=(
            "tests/integration/test_sweeper.py"
            "::test_a_sweeper_that_dies_half_way_is_finished_by_the_next_and_nothing_counts_twice",
            "tests/integration/test_sweeper.py::test_a_worker_whose_counter_stood_still_for_a_lease_is_swept",
        ),
    ),
    Mutation(
        name="sessions-live-on",
        breaks="The sessions of a dead worker inside ctx.complete() are left alone.",
        edits=(Edit(_SWEEPER, "        await settle.end_backends(connection, self._schema, worker)\n", ""),),
        tests=("tests/integration/test_sweeper.py::test_sessions_of_the_dead_worker_inside_complete_are_ended",),
    ),
    Mutation(
        name="poison-never",
        breaks="A job that kills every worker runs for ever.",
        edits=(
            Edit(_SWEEPER, "            if row.crashes >= CRASHES_BEFORE_POISON\n", "            if row.crashes < 0\n"),
        ),
        tests=("tests/integration/test_sweeper.py::test_three_crashes_in_a_row_bury_a_job_as_poison",),
    ),
    Mutation(
        name="gap-counts-as-standstill",
        breaks="A worker counts as dead that nobody looked at for a lease.",
        edits=(
            Edit(
                _SWEEPER,
                "        if now - self._looked_at > _LONGEST_GAP_S:\n            self._watches.clear()\n",
                "",
            ),
        ),
        tests=("tests/integration/test_sweeper.py::test_a_gap_between_two_looks_starts_every_watch_anew",),
    ),
    Mutation(
        name="outage-counts-as-standstill",
        breaks="A worker counts as dead that could not be looked at for a lease.",
        edits=(
            Edit(
                _SWEEPER,
                "            self._watches.clear()\n            self._outage.begin(error)\n",
                "            self._outage.begin(error)\n",
            ),
        ),
        tests=("tests/integration/test_sweeper.py::test_a_failed_look_starts_every_watch_anew",),
    ),
)
