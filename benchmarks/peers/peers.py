"""Who is compared, and how each is run: one entry for each peer and mode.

Invariant: every entry says what was set, why, and where its documentation says so; settings are those documented for
throughput, one worker process, 100 jobs at a time where jobs are coroutines unless another number was faster. What
does not lie in a command line lies in the peer's `*_app.py`. Called by environments, trials and the command line.
Calls nothing.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Peer:
    """One entry of the comparison."""

    name: str
    package: str
    """The distribution whose version is reported."""
    install: tuple[str, ...]
    """What pip or npm is asked for; nothing for jobq, which is here."""
    environment: str
    app: str
    worker: str
    """The command of the one worker process; its places are those of trials."""
    jobs: int
    """To drain: 3 to 8 s of work on two cores."""
    settings: str
    source: str
    """Titles of the documentation pages that the settings are from."""
    recovery: str
    """How jobs of a dead worker come back, and what was set for the kill test."""
    back_s: float
    """Nothing moved for this long: then nothing comes back. Longer than the recovery takes as set."""
    recovery_s: int = 0
    """The lease or timeout that is set in the kill test; 0: there is none to set."""
    mode: str = ""
    reliability: str = "default"
    """`default`, or `reliable` where acknowledgement after the run, or recovery, has to be asked for."""
    beside: tuple[str, ...] = ()
    """Commands of what runs beside the worker and is not killed."""
    concurrency: int = 100
    as_fast_as: str = ""
    """The entry whose way of working this one shares, so that only the kill is measured here."""
    recovery_variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_node(self) -> bool:
        return self.app.endswith(".mjs")


def _jobq(loop: str) -> Peer:
    common = f"--loop {loop} --log-level error"
    return Peer(
        name=f"jobq-{loop}",
        package="jobq",
        install=(),
        environment="jobq",
        app="jobq_app.py",
        beside=(f"{{python}} -m jobq relay {common}",),
        worker=f"{{python}} -m jobq worker {{module}}:jobs -c {{concurrency}} {common}",
        jobs=100_000,
        settings=f"relay and worker as processes, -c 100, {loop}; PostgreSQL and Valkey",
        source="docs/cli.md",
        recovery="lease (default 15 s): 5 s",
        recovery_s=5,
        recovery_variables={"JOBQ_LEASE": "5", "JOBQ_BEAT": "1"},
        back_s=12,
    )


_CORES = os.cpu_count() or 1
_SAQ_SOURCE = "SAQ: README; saq.worker.Worker, saq.job.Job"
_TASKIQ = "{bin}/taskiq worker {module}:broker --workers 1 --max-async-tasks {concurrency} --max-prefetch {concurrency}"
_CELERY = (
    "{bin}/celery -A {module} worker --pool prefork --concurrency {concurrency} --loglevel ERROR"
    " --without-gossip --without-mingle --without-heartbeat"
)
_GRAPHILE_SOURCE = "Graphile Worker: Performance; Configuration > worker"

PEERS: tuple[Peer, ...] = (
    _jobq("asyncio"),
    _jobq("uvloop"),
    Peer(
        name="arq",
        package="arq",
        install=("arq", "uvloop"),
        environment="arq",
        app="arq_app.py",
        worker="{bin}/arq {module}.WorkerSettings",
        jobs=5_000,
        settings="max_jobs=100, keep_result=0, poll_delay=0.05 (default 0.5: ten times the latency), uvloop, hiredis",
        source="arq: Reference > arq.worker",
        recovery="job_timeout + 10 s (default 310 s): 5 + 10 s",
        recovery_s=5,
        back_s=20,
    ),
    Peer(
        name="saq",
        package="saq",
        install=("saq[redis,postgres,hiredis]", "uvloop"),
        environment="saq",
        app="saq_app.py",
        worker="{bin}/saq --quiet {module}.settings",
        jobs=10_000,
        settings="concurrency=100, uvloop, hiredis; retries=1 (default)",
        source=_SAQ_SOURCE,
        recovery="sweep every 60 s of jobs past their timeout of 10 s: 1 s, 5 s; with retries=1 they are aborted",
        recovery_s=5,
        back_s=20,
        mode="redis",
    ),
    Peer(
        name="saq-retries",
        as_fast_as="saq",
        package="saq",
        install=("saq[redis,postgres,hiredis]", "uvloop"),
        environment="saq",
        app="saq_app.py",
        worker="{bin}/saq --quiet {module}.settings",
        jobs=10_000,
        settings="as saq, retries=5",
        source=_SAQ_SOURCE,
        recovery="sweep every 60 s of jobs past their timeout of 10 s, 5 s for each in turn: 1 s, 5 s",
        recovery_s=5,
        back_s=20,
        mode="redis-reliable",
        reliability="reliable",
    ),
    Peer(
        name="saq-postgresql",
        package="saq",
        install=("saq[redis,postgres,hiredis]", "uvloop"),
        environment="saq",
        app="saq_app.py",
        worker="{bin}/saq --quiet {module}.settings",
        jobs=5_000,
        settings="concurrency=100, uvloop, psycopg pool of 20 (default); retries=5",
        source=_SAQ_SOURCE,
        recovery="sweep every 60 s of jobs past their timeout of 10 s, 5 s for each in turn: 1 s, 5 s",
        recovery_s=5,
        back_s=20,
        mode="postgresql-reliable",
        reliability="reliable",
    ),
    Peer(
        name="streaq",
        package="streaq",
        install=("streaq",),
        environment="streaq",
        app="streaq_app.py",
        worker="{bin}/streaq run {module}:worker",
        jobs=10_000,
        settings="concurrency=100, prefetch=concurrency (default), ttl=0, silent; its own uvloop",
        source="streaQ: Worker; Task; benchmarks/README",
        recovery="idle_timeout (default 60 s): 5 s",
        recovery_s=5,
        back_s=12,
    ),
    Peer(
        name="taskiq-list",
        package="taskiq-redis",
        install=("taskiq-redis", "uvloop", "hiredis"),
        environment="taskiq",
        app="taskiq_app.py",
        worker=_TASKIQ + " --log-level WARNING",
        jobs=15_000,
        settings="ListQueueBroker, max-async-tasks 100, max-prefetch 100, no result backend; uvloop, hiredis",
        source="taskiq-redis: README; taskiq: CLI",
        recovery="none: a message leaves Redis when it is read",
        back_s=10,
        mode="list",
    ),
    Peer(
        name="taskiq-stream",
        package="taskiq-redis",
        install=("taskiq-redis", "uvloop", "hiredis"),
        environment="taskiq",
        app="taskiq_app.py",
        worker=_TASKIQ + " --log-level WARNING",
        jobs=15_000,
        settings="RedisStreamBroker, xread_count=100 (default), max-async-tasks 100, max-prefetch 100; uvloop, hiredis",
        source="taskiq-redis: README; taskiq: CLI",
        recovery="idle_timeout (default 600 s): 5 s; looked at when new messages come",
        recovery_s=5,
        back_s=12,
        mode="stream",
        reliability="reliable",
    ),
    Peer(
        name="docket",
        package="pydocket",
        install=("pydocket", "uvloop", "hiredis"),
        environment="docket",
        app="docket_app.py",
        worker="{python} {app} worker",
        jobs=5_000,
        settings="concurrency=100, max_connections=200, execution_ttl=0 (fire and forget); uvloop, hiredis",
        source="docket: Docket in Production",
        recovery="redelivery_timeout (default 300 s): 5 s",
        recovery_s=5,
        back_s=12,
    ),
    Peer(
        name="dramatiq",
        package="dramatiq",
        install=("dramatiq[redis]", "hiredis"),
        environment="dramatiq",
        app="dramatiq_app.py",
        worker="{bin}/dramatiq {module} --processes 1 --threads {concurrency}",
        jobs=10_000,
        concurrency=32,
        settings="1 process, 32 threads (default 8, which is slower here), no results; hiredis",
        source="dramatiq: API Reference > RedisBroker; Advanced Topics",
        recovery="heartbeat_timeout (default 60 s): 5 s; looked at by one command in 1,000: in 10",
        recovery_s=5,
        back_s=20,
    ),
    Peer(
        name="celery",
        package="celery",
        install=("celery[redis]", "hiredis"),
        environment="celery",
        app="celery_app.py",
        worker=_CELERY,
        jobs=8_000,
        concurrency=_CORES,
        settings="prefork and a child for each core (default), prefetch multiplier 64, no results, gossip, mingle,"
        " heartbeat; early acknowledgement (default)",
        source="Celery: Optimizing; Concurrency; Tasks; Using Redis",
        recovery="none for what runs: acknowledged before; prefetched: visibility_timeout (default 3600 s): 10 s",
        recovery_s=10,
        back_s=20,
    ),
    Peer(
        name="celery-late",
        package="celery",
        install=("celery[redis]", "hiredis"),
        environment="celery",
        app="celery_app.py",
        worker=_CELERY,
        jobs=8_000,
        concurrency=_CORES,
        settings="as celery, acks_late, reject_on_worker_lost",
        source="Celery: Optimizing; Concurrency; Tasks; Using Redis",
        recovery="visibility_timeout (default 3600 s): 10 s; looked for every 100 s: 1 s",
        recovery_s=10,
        back_s=20,
        mode="reliable",
        reliability="reliable",
    ),
    Peer(
        name="procrastinate",
        package="procrastinate",
        install=("procrastinate", "psycopg[binary,pool]", "uvloop"),
        environment="procrastinate",
        app="procrastinate_app.py",
        worker="{python} {app} worker",
        jobs=2_000,
        settings="concurrency=100, delete_jobs=successful, pool of 20; uvloop",
        source="procrastinate: Run a worker; Delete finished jobs; Retry stalled jobs",
        recovery="none, unless one writes the documented periodic task",
        back_s=10,
    ),
    Peer(
        name="procrastinate-stalled",
        as_fast_as="procrastinate",
        package="procrastinate",
        install=("procrastinate", "psycopg[binary,pool]", "uvloop"),
        environment="procrastinate",
        app="procrastinate_app.py",
        worker="{python} {app} worker",
        jobs=2_000,
        settings="as procrastinate, with the documented periodic task for stalled jobs",
        source="procrastinate: Run a worker; Delete finished jobs; Retry stalled jobs",
        recovery="heartbeat 30 s, looked at every 10 min: 5 s, 1 s",
        recovery_s=5,
        back_s=15,
        mode="reliable",
        reliability="reliable",
    ),
    Peer(
        name="pgqueuer",
        package="pgqueuer",
        install=("pgqueuer[asyncpg,cli]", "uvloop"),
        environment="pgqueuer",
        app="pgqueuer_app.py",
        worker="{python} {app} worker",
        jobs=30_000,
        concurrency=500,
        settings="batch_size=250, max_concurrent_tasks=500 (more for short jobs), autovacuum as advised; uvloop",
        source="PgQueuer: Performance Tuning",
        recovery="heartbeat_timeout (default 30 s): 5 s",
        recovery_s=5,
        back_s=12,
    ),
    Peer(
        name="bullmq",
        package="bullmq",
        install=("bullmq", "ioredis"),
        environment="bullmq",
        app="bullmq_app.mjs",
        worker="node {app} worker",
        jobs=50_000,
        settings="concurrency 100, removeOnComplete; ioredis",
        source="BullMQ: Workers > Concurrency, Auto-removal of jobs, Stalled Jobs; Queues > Adding jobs in bulk",
        recovery="lockDuration, stalledInterval (default 30 s each): 5 s each",
        recovery_s=5,
        back_s=20,
    ),
    Peer(
        name="graphile-worker",
        package="graphile-worker",
        install=("graphile-worker",),
        environment="graphile-worker",
        app="graphile_worker_app.mjs",
        worker="node {app} worker",
        jobs=10_000,
        concurrency=24,
        settings="concurrentJobs 24, maxPoolSize 25 (100 are no faster)",
        source=_GRAPHILE_SOURCE,
        recovery="after 4 hours",
        back_s=10,
    ),
    Peer(
        name="graphile-worker-batch",
        package="graphile-worker",
        install=("graphile-worker",),
        environment="graphile-worker",
        app="graphile_worker_app.mjs",
        worker="node {app} worker",
        jobs=100_000,
        settings="concurrentJobs 100, maxPoolSize 25, localQueue.size 500, complete- and failJobBatchDelay 0",
        source=_GRAPHILE_SOURCE,
        recovery="after 4 hours",
        back_s=10,
        mode="batch",
    ),
)
