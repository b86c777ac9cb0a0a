"""jobq.testing: what an application's own tests use.

    enqueued       the jobs that a transaction sees, to compare with `task.job(...)`
    run_pending    runs them in the test itself, without Redis and without waiting
    Crashes        kills relays and workers at named points, on real servers, and recovers

The pytest plugin (`jobq_pytest`) adds the servers: a migrated database for each test, an empty Redis.
Invariant: nothing here is loaded by `import jobq`.
"""

from .crashes import CRASH_POINTS, Crashes, CrashPoint
from .pending import Attempt, run_pending
from .seen import EnqueuedJob, enqueued

__all__ = ["CRASH_POINTS", "Attempt", "CrashPoint", "Crashes", "EnqueuedJob", "enqueued", "run_pending"]
