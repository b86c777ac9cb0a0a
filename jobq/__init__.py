"""jobq: an asyncio job runner with a transactional outbox.

Invariant: importing it loads neither redis nor click, and does no I/O.
"""

from .app import JobQ
from .context import Context
from .errors import (
    AlreadyDone,
    ConfigurationError,
    InvalidArguments,
    InvalidResult,
    JobqError,
    NotInTransaction,
    SchemaMismatch,
    TransactionUsed,
    WrongDatabase,
)
from .model import DeadJob, Enqueued, Intent
from .outcomes import Reject, Retry, Snooze
from .retry import RetryPolicy
from .task import Task

__version__ = "0.1.0"

__all__ = [
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
]
