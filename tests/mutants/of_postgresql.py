"""Mutations of what jobq does in PostgreSQL, and of `ctx.complete()`."""

from __future__ import annotations

from tests.mutants.mutation import Edit, Mutation

_SQL = "jobq/outbox/sql"
_DATABASE = "jobq/outbox/database.py"
_ENQUEUE = "jobq/outbox/enqueue.py"
_COMPLETE = "jobq/complete.py"

OF_POSTGRESQL = (
    Mutation(
        name="not-in-transaction",
        breaks="enqueue() takes a connection that would commit by itself.",
        edits=(
            Edit(_ENQUEUE, "    if not tx.is_in_transaction():\n", "    if False:\n"),
            Edit(_ENQUEUE, '    if getattr(adapted, "autocommit", False):\n', "    if False:\n"),
        ),
        tests=("tests/integration/test_enqueue.py::test_without_a_transaction_nothing_is_written",),
    ),
    Mutation(
        name="expired-key",
        breaks="An idempotency key that has expired makes a second job while the first is still there.",
        edits=(
            Edit(
                f"{_SQL}/enqueue_many.sql",
                "                AND NOT EXISTS (SELECT FROM {schema}.outbox WHERE id = held.job_id)\n",
                "",
            ),
        ),
        tests=("tests/integration/test_idempotency.py::test_an_expired_key_holds_while_its_row_is_there",),
    ),
    Mutation(
        name="keys-in-any-order",
        breaks="A batch claims the keys of renamed tasks before all others.",
        edits=(
            Edit(
                _ENQUEUE,
                "    if len(intents) > 1 and any(intent.former_names for intent in intents):\n",
                "    if False:\n",
            ),
        ),
        tests=(
            "tests/integration/test_idempotency.py::test_batches_of_two_releases_with_the_same_keys_do_not_deadlock",
        ),
    ),
    Mutation(
        name="isolation-not-set",
        breaks="jobq's own connections have whatever isolation level the database gives them.",
        edits=(Edit(_DATABASE, '    "default_transaction_isolation": "read committed",\n', ""),),
        tests=(
            "tests/integration/test_database.py::test_a_connection_reads_what_is_committed_whatever_the_database_says",
        ),
    ),
    Mutation(
        name="replica-taken",
        breaks="Rows are read on a replica.",
        edits=(
            Edit(
                _DATABASE,
                '        if await connection.fetchval("SELECT pg_is_in_recovery()"):\n',
                "        if False:\n",
            ),
        ),
        tests=("tests/integration/test_database.py::test_a_replica_behind_the_url_is_refused",),
    ),
    Mutation(
        name="any-database",
        breaks="Rows are read in another database than the one jobq started with.",
        edits=(Edit(_DATABASE, "        if self._database_id not in (None, found):\n", "        if False:\n"),),
        tests=(
            "tests/integration/test_turns.py::test_another_database_behind_the_url_is_refused_and_nothing_is_dropped",
        ),
    ),
    Mutation(
        name="complete-any-generation",
        breaks="A batch completes rows at whatever generation.",
        edits=(
            Edit(
                f"{_SQL}/complete.sql",
                "        WHERE outbox.id = asked.id AND outbox.generation = asked.generation\n",
                "        WHERE outbox.id = asked.id\n",
            ),
        ),
        tests=("tests/integration/test_settle.py::test_complete_deletes_only_the_generation_that_ran",),
    ),
    Mutation(
        name="ctx-complete-any-generation",
        breaks="ctx.complete() deletes the row at whatever generation.",
        edits=(
            Edit(
                f"{_SQL}/complete_one.sql",
                "AND generation = CAST(:generation AS int)\n",
                "AND CAST(:generation AS int) > 0\n",
            ),
        ),
        tests=("tests/integration/test_context.py::test_a_run_whose_job_has_moved_on_has_no_effect",),
    ),
    Mutation(
        name="delete-not-first",
        breaks="ctx.complete() deletes the row after the task's own statements.",
        edits=(
            Edit(
                _COMPLETE,
                "        session, transaction, xid = await _begin(stack, job, run, run.sessions, patience)\n"
                "        patience.rest()\n"
                "        try:\n"
                "            yield session\n"
                "        finally:\n"
                "            patience.go_on()  # also for the ROLLBACK\n"
                "        await _check_still_open(job, run, session, transaction, xid, patience)\n",
                "        session = await stack.enter_async_context(run.sessions())\n"
                "        transaction = await stack.enter_async_context(session.begin())\n"
                "        yield session\n"
                "        key = (job.id, job.generation)\n"
                "        if await begin_complete(session, run.schema, key, worker=run.worker) is None:\n"
                "            raise AlreadyDone\n",
            ),
        ),
        tests=(
            "tests/integration/test_context.py::test_the_row_is_deleted_before_the_first_statement_of_the_block",
            "tests/integration/test_context.py::test_a_second_run_waits_for_the_first_and_its_block_does_not_run",
        ),
    ),
    Mutation(
        name="completion-beside-effects",
        breaks="The effects are committed first, and the completion in a transaction of its own.",
        edits=(
            Edit(
                _COMPLETE,
                "        session, transaction, xid = await _begin(stack, job, run, run.sessions, patience)\n"
                "        patience.rest()\n"
                "        try:\n"
                "            yield session\n"
                "        finally:\n"
                "            patience.go_on()  # also for the ROLLBACK\n"
                "        await _check_still_open(job, run, session, transaction, xid, patience)\n",
                "        session = await stack.enter_async_context(run.sessions())\n"
                "        async with session.begin():\n"
                "            yield session\n"
                "        session, transaction, xid = await _begin(stack, job, run, run.sessions, patience)\n",
            ),
        ),
        tests=("tests/integration/test_context.py::test_a_run_whose_job_has_moved_on_has_no_effect",),
    ),
    Mutation(
        name="commit-cancelled",
        breaks="A cancellation breaks into the COMMIT of ctx.complete().",
        edits=(
            Edit(
                _COMPLETE,
                "        _, cancelled = await to_the_end(transaction.__aexit__(None, None, None))\n",
                "        await transaction.__aexit__(None, None, None)\n        cancelled = None\n",
            ),
        ),
        tests=("tests/integration/test_context.py::test_a_cancellation_during_commit_waits_for_its_end",),
    ),
    Mutation(
        name="crash-not-counted",
        breaks="The death of its worker leaves no mark on a job.",
        edits=(Edit(f"{_SQL}/crash.sql", "crashes = crashes + 1\n", "crashes = crashes\n"),),
        tests=(
            "tests/integration/test_settle.py::test_a_crash_is_counted_once_however_often_it_is_reported",
            "tests/integration/test_sweeper.py::test_three_crashes_in_a_row_bury_a_job_as_poison",
        ),
    ),
    Mutation(
        name="crash-without-fence",
        breaks="A crash leaves the generation as it was.",
        edits=(Edit(f"{_SQL}/crash.sql", "SET generation = generation + 1, crashes", "SET crashes"),),
        tests=(
            "tests/integration/test_settle.py::test_a_crash_is_counted_once_however_often_it_is_reported",
            "tests/integration/test_sweeper.py::test_two_sweepers_at_the_same_time_count_a_crash_once",
        ),
    ),
)
