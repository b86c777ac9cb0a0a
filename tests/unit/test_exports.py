"""What `import jobq` gives, and what it does not load."""

from __future__ import annotations

import inspect
import subprocess
import sys

import jobq

PUBLIC = {
    "AlreadyDone",
    "ConfigurationError",
    "Context",
    "DeadJob",
    "Enqueued",
    "Intent",
    "InvalidArguments",
    "InvalidResult",
    "JobQ",
    "JobqError",
    "NotInTransaction",
    "Reject",
    "Retry",
    "RetryPolicy",
    "SchemaMismatch",
    "Snooze",
    "Task",
    "TransactionUsed",
    "WrongDatabase",
}


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_public_names_are_these_and_in_order():
    assert set(jobq.__all__) == PUBLIC
    assert jobq.__all__ == sorted(jobq.__all__)
    assert all(inspect.getdoc(getattr(jobq, name)) for name in jobq.__all__)


def test_what_is_imported_at_the_top_is_public_or_a_module():
    names = {name for name, value in vars(jobq).items() if not name.startswith("_") and not inspect.ismodule(value)}

    assert names == PUBLIC


def test_every_error_derives_from_the_root_except_the_one_that_must_not_be_caught():
    errors = {value for value in vars(jobq).values() if inspect.isclass(value) and issubclass(value, BaseException)}
    outcomes = {jobq.Reject, jobq.Retry, jobq.Snooze}

    assert not issubclass(jobq.AlreadyDone, Exception)
    assert all(issubclass(error, jobq.JobqError) for error in errors - outcomes - {jobq.AlreadyDone})


def test_import_jobq_loads_neither_redis_nor_click():
    loaded = run("import sys, jobq; print(*sorted({'redis', 'click', 'alembic', 'hiredis'} & set(sys.modules)))")

    assert loaded == ""


def test_import_jobq_loads_nothing_of_its_testing_part():
    assert run("import sys, jobq; print([name for name in sys.modules if name.startswith('jobq.testing')])") == "[]"


def test_import_jobq_starts_nothing():
    assert run("import threading, jobq; print(threading.active_count())") == "1"


def test_the_names_can_be_imported_with_a_star():
    assert run("from jobq import *; print(JobQ.__name__)") == "JobQ"
