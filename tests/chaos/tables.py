"""The tables of the chaos application, and triggers that write down the life of every row of the outbox.

What a trigger writes is committed with what it tells of, or not at all: `history` has one row for each generation
that ended, whoever ended it. None of these tables has a constraint that would hide a double effect.
"""

from __future__ import annotations

TABLES = """
    CREATE SCHEMA chaos;
    CREATE TABLE chaos.orders (id uuid PRIMARY KEY, kind text, job_id uuid, failures int, at timestamptz DEFAULT now());
    CREATE TABLE chaos.effect (order_id uuid, job_id uuid, generation int, note text);
    CREATE INDEX ON chaos.effect (order_id);
    CREATE TABLE chaos.history (
        job_id uuid, generation int, next int,
        attempts int, next_attempts int, crashes int, next_crashes int,
        by text, at timestamptz DEFAULT clock_timestamp()
    );
    CREATE INDEX ON chaos.history (job_id);
    CREATE TABLE chaos.run (
        name text, at double precision, worker text, job_id uuid, order_id uuid, task text, generation int, attempt int,
        seen text
    );
    CREATE TABLE chaos.run_end (name text, at double precision, outcome text);
    CREATE TABLE chaos.told (order_id uuid, what text, at double precision);
    CREATE FUNCTION chaos.note() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        INSERT INTO chaos.history VALUES (
            OLD.id, OLD.generation, NEW.generation, OLD.attempts, NEW.attempts, OLD.crashes, NEW.crashes,
            current_setting('application_name')
        );
        RETURN NULL;
    END $$;
    CREATE TRIGGER note AFTER UPDATE OR DELETE ON jobq.outbox FOR EACH ROW EXECUTE FUNCTION chaos.note();
"""
"""`next` is the generation that followed, null where the row went. `seen` says what a run's worker had read before it
began: `due`, `over` when the end of the job was visible by then, `unread` when it had read nothing."""

INDEXES = """
    CREATE INDEX ON chaos.run (job_id, generation);
    CREATE INDEX ON chaos.run (order_id);
    CREATE INDEX ON chaos.run (name);
    CREATE INDEX ON chaos.run_end (name);
    CREATE INDEX ON chaos.orders (job_id);
    CREATE INDEX ON chaos.told (order_id);
    ANALYZE;
"""
"""Made when all is over, for the checker."""
