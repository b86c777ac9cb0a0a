"""Every default of jobq, with its unit. Values arrive here from code or from the command line."""

from __future__ import annotations

from datetime import timedelta
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

ARGS_LIMIT = 1024 * 1024
"""Bytes of JSON that the arguments of one job may take; a CHECK on the table holds the same."""
NESTING_LIMIT = 64
"""Levels of lists and objects in the arguments of one job."""
CRASHES_BEFORE_ALONE = 2
"""A job whose worker died this often in a row is run with nothing beside it."""
CRASHES_BEFORE_POISON = 3
"""A job whose worker died this often in a row is buried."""
HEAVIEST_QUEUE = 100
"""The largest weight of a queue."""
ERROR_LIMIT = 4000
"""Characters of an error that are kept in `last_error`."""


WakeUpBy: TypeAlias = Literal["notify", "poll"]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class WorkerSettings(_Settings):
    """How one worker process behaves. Durations in seconds."""

    queues: tuple[str, ...] = Field(default=("default",), min_length=1)
    weights: dict[str, Annotated[int, Field(ge=1, le=HEAVIEST_QUEUE)]] = {}
    """Of all starts while every queue has work, how many are a queue's. 1 for queues that are not named."""
    strict: bool = False
    """Serve queues in their order, the next only when those before are empty. Excludes weights."""
    concurrency: int = Field(default=100, ge=1, le=10_000)
    """Jobs that run at the same time in this process."""
    threads: int = Field(default=20, ge=1, le=1_000)
    """Synchronous tasks that run at the same time in this process."""
    lease: float = Field(default=15.0, gt=0)
    """A worker whose counter stands still for this long, as watched by another, has lost its jobs."""
    beat: float = Field(default=2.0, gt=0)
    """Between two heartbeats."""
    grace: float = Field(default=25.0, ge=0)
    """Given to running jobs at shutdown. Kubernetes kills after 30 s by default."""
    frozen_after: float = Field(default=300.0, gt=0)
    """The heartbeat stops when the event loop has not turned for this long: its jobs go elsewhere. The process ends
    when it has taken no turn for as long."""
    max_jobs: int | None = Field(default=None, ge=1)
    """Runs after which the process makes room for a fresh one."""
    max_rss: int | None = Field(default=None, ge=1)
    """Bytes of resident memory at which the process makes room for a fresh one."""

    @model_validator(mode="after")
    def _check_queues(self) -> Self:
        if len(set(self.queues)) < len(self.queues):
            raise ValueError("a queue is named twice")
        if strangers := self.weights.keys() - set(self.queues):
            raise ValueError(f"weights for queues that are not served: {', '.join(sorted(strangers))}")
        if self.strict and self.weights:
            raise ValueError("weights and strict exclude each other")
        return self

    @property
    def start_margin(self) -> float:
        """No run starts when the last acknowledged beat is older than this: the lease may be gone."""
        return max(self.lease - 3.0, self.lease / 2)


class RelaySettings(_Settings):
    """How one relay process behaves. Durations in seconds."""

    beat: float = Field(default=2.0, gt=0)
    """The workers' heartbeat interval: after a loss of Redis the relay gives them two to re-assert."""
    wake_up: WakeUpBy = "notify"
    """How the relay learns of a commit. Through a pooler in transaction mode it polls, whatever is said here."""
    poll_shortest: float = Field(default=0.002, gt=0)
    poll_longest: float = Field(default=0.025, gt=0)
    """Between two polls while the relay cannot sleep."""
    sleep_after: int = Field(default=3, ge=0)
    """Polls in a row that found nothing, before the relay tries to sleep."""
    sleep_longest: float = Field(default=1.0, gt=0)
    """A sleeping relay looks up by itself after this long."""
    poll_limit: int = Field(default=5_000, ge=1)
    """Rows one poll hands over; the walk brings the rest."""
    push_limit: int = Field(default=500, ge=1)
    """Entries in one script call."""
    page: int = Field(default=1_000, ge=1)
    """Rows in one page of the walk."""
    look_ahead: float = Field(default=10.0, gt=0)
    """Jobs due within this time are held in memory and pushed on time."""
    ready_limit: int = Field(default=100_000, ge=1)
    """Entries in one ready list; what is beyond waits in PostgreSQL."""
    scrub_pause: float = Field(default=0.05, ge=0)
    """Between two pages of the endless scrub."""
    scrub_every: float = Field(default=5.0, ge=0)
    """Between two passes of the scrub over the whole table."""
    detect_loss_every: float = Field(default=1.0, gt=0)
    takeover_after: float = Field(default=10.0, gt=0)
    """A standby that saw no push for this long ends the leader's session."""
    frozen_after: float = Field(default=300.0, gt=0)
    """The process ends when it has taken no turn, as leader or standby, for this long."""
    tidy_every: float = Field(default=60.0, gt=0)
    dead_kept: timedelta = timedelta(days=180)
