"""Every error that jobq itself raises.

    JobqError
      + ConfigurationError      something is set up wrongly; the message names it and the remedy
          + SchemaMismatch      the tables are missing, older or newer than this release
          + WrongDatabase       the URL leads to another database, or to a replica
      + NotInTransaction        enqueue() was called where nothing would be committed with the job
      + InvalidArguments        arguments a task does not take, or that cannot be stored
      + InvalidResult           what a step returned, or what an earlier run has kept of it, does not fit
      + TransactionUsed         a second ctx.complete() in one run

    AlreadyDone(BaseException)  raised by ctx.complete() and ctx.step() in a run whose job is no longer its own

Errors of PostgreSQL, Redis and the network pass through unwrapped.
"""

from __future__ import annotations


class JobqError(Exception):
    """The root of every error that jobq raises on its own account."""


class ConfigurationError(JobqError):
    """Something is set up wrongly. The message names the thing and the remedy."""


class SchemaMismatch(ConfigurationError):
    """The tables in PostgreSQL are missing, older or newer than this release of jobq needs."""


class WrongDatabase(ConfigurationError):
    """The connection leads to a replica, or to another database than before."""


class NotInTransaction(JobqError):
    """A job was to be enqueued outside a transaction. Nothing was written."""


class InvalidArguments(JobqError):
    """A task does not take these arguments, or they cannot be stored as JSON. Nothing was written."""


class InvalidResult(JobqError):
    """The result of a step cannot be kept, or what was kept of it does not fit its annotation any more.

    The step's effect has happened, and another run would repeat it. So the job is dead at once (reason `invalid`),
    whatever attempts are left, and waits for a person.
    """


class TransactionUsed(JobqError):
    """`ctx.complete()` finishes the job: a run enters it once only, and takes no step from there on."""


class AlreadyDone(BaseException):
    """The job was completed, cancelled or rescheduled elsewhere: this run has nothing left to do.

    Raised on entry to `ctx.complete()` and `ctx.step()`, so that neither block nor step runs. It is not an `Exception`:
    a task's `except Exception` must not turn a stale run into a second effect.
    """
