"""jobq.testing: what an application's own tests use.

    enqueued       the jobs that a transaction sees, to compare with `task.job(...)`
    run_pending    runs them in the test itself, without Redis and without waiting

The pytest plugin (`jobq_pytest`) adds the servers: a migrated database for each test, an empty Redis.
Invariant: nothing here is loaded by `import jobq`.
"""

from .pending import Attempt, run_pending
from .seen import EnqueuedJob, enqueued

__all__ = ["Attempt", "EnqueuedJob", "enqueued", "run_pending"]
