"""Who is compared, and how each is run: one entry for each peer and mode.

Invariant: every entry says what was set, why, and where its documentation says so; settings are those documented for
throughput, one worker process, 100 jobs at a time where jobs are coroutines unless another number was faster. What
does not lie in a command line lies in the peer's `*_app.py`. Called by environments, trials and table. Calls nothing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata

JOBS = 100_000


@dataclass(frozen=True)
class Peer:
    """One entry of the comparison."""

    name: str
    install: tuple[str, ...]
    """What pip or npm is asked for, first the peer, with its version; nothing for jobq, which is here."""
    environment: str
    app: str
    worker: str
    """The command of the one worker process; its places are those of trials."""
    jobs: int
    """To drain: some 5 s of work on two cores. Of a run with another --jobs than JOBS, that share of them."""
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
    has_transactions: bool = False
    """Whether it enqueues in the application's transaction; then its producer knows `enqueue`."""
    recovery_variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def version(self) -> str:
        return re.split("==|@", self.install[0])[1] if self.install else metadata.version("jobq")

    @property
    def is_node(self) -> bool:
        return self.app.endswith(".mjs")


_CORES = os.cpu_count() or 1
_SAQ_SOURCE = "SAQ: README; saq.worker.Worker, saq.job.Job"
_TASKIQ = "{bin}/taskiq worker {module}:broker --workers 1 --max-async-tasks {concurrency} --max-prefetch {concurrency}"
_CELERY = (
    "{bin}/celery -A {module} worker --pool prefork --concurrency {concurrency} --loglevel ERROR"
    " --without-gossip --without-mingle --without-heartbeat"
)
_GRAPHILE_SOURCE = "Graphile Worker: Performance; Configuration > worker"

PEERS: tuple[Peer, ...] = (
    Peer(
        name="jobq",
        install=(),
        environment="jobq",
        app="jobq_app.py",
        beside=("{python} -m jobq relay --log-level error",),
        worker="{python} -m jobq worker {module}:jobs -c {concurrency} --log-level error",
        jobs=200_000,
        concurrency=500,
        settings="relay and worker as processes, -c 500 (more for short jobs); uvloop",
        source="docs/cli.md, docs/costs.md",
        recovery="lease (default 15 s): 5 s",
        recovery_s=5,
        recovery_variables={"JOBQ_LEASE": "5", "JOBQ_BEAT": "1"},
        back_s=12,
        has_transactions=True,
    ),
    Peer(
        name="arq",
        install=("arq==0.28.0", "uvloop"),
        environment="arq",
        app="arq_app.py",
        worker="{bin}/arq {module}.WorkerSettings --custom-log-dict {module}.LOGGING",
        jobs=10_000,
        settings="max_jobs=100, keep_result=0, poll_delay=0.05 (default 0.5: ten times the latency), uvloop, hiredis,"
        " warnings only in its log",
        source="arq: Reference > arq.worker; arq.cli",
        recovery="job_timeout + 10 s (default 310 s): 5 + 10 s",
        recovery_s=5,
        back_s=20,
    ),
    Peer(
        name="saq",
        install=("saq[redis,postgres,hiredis]==0.26.4", "uvloop"),
        environment="saq",
        app="saq_app.py",
        worker="{bin}/saq --quiet {module}.settings",
        jobs=15_000,
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
        install=("saq[redis,postgres,hiredis]==0.26.4", "uvloop"),
        environment="saq",
        app="saq_app.py",
        worker="{bin}/saq --quiet {module}.settings",
        jobs=15_000,
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
        install=("saq[redis,postgres,hiredis]==0.26.4", "uvloop"),
        environment="saq",
        app="saq_app.py",
        worker="{bin}/saq --quiet {module}.settings",
        jobs=4_000,
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
        install=("streaq==7.2.0", "uvloop"),
        environment="streaq",
        app="streaq_app.py",
        worker="{bin}/streaq run {module}:worker",
        jobs=8_000,
        settings="concurrency=100, prefetch=concurrency (default), ttl=0, silent; uvloop",
        source="streaQ: Worker; Task",
        recovery="idle_timeout (default 60 s): 5 s",
        recovery_s=5,
        back_s=12,
    ),
    Peer(
        name="taskiq-list",
        install=("taskiq-redis==1.2.4", "uvloop", "hiredis"),
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
        install=("taskiq-redis==1.2.4", "uvloop", "hiredis"),
        environment="taskiq",
        app="taskiq_app.py",
        worker=_TASKIQ + " --log-level WARNING",
        jobs=20_000,
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
        install=("pydocket==0.27.0", "uvloop", "hiredis"),
        environment="docket",
        app="docket_app.py",
        worker="{python} {app} worker",
        jobs=2_500,
        settings="concurrency=100, max_connections=200, execution_ttl=0 (fire and forget); uvloop, hiredis",
        source="docket: Docket in Production",
        recovery="redelivery_timeout (default 300 s): 5 s",
        recovery_s=5,
        back_s=12,
    ),
    Peer(
        name="dramatiq",
        install=("dramatiq[redis]==2.2.1", "hiredis"),
        environment="dramatiq",
        app="dramatiq_app.py",
        worker="env dramatiq_queue_prefetch=256 {bin}/dramatiq {module} --processes 1 --threads {concurrency}",
        jobs=25_000,
        concurrency=32,
        settings="1 process, 32 threads (default 8), queue prefetch 256 (default 64): both faster; no results; hiredis",
        source="dramatiq: API Reference > RedisBroker, Environment Variables",
        recovery="heartbeat_timeout (default 60 s): 5 s; looked at by one command in 1,000: in 10",
        recovery_s=5,
        back_s=20,
    ),
    Peer(
        name="celery",
        install=("celery[redis]==5.7.0", "hiredis"),
        environment="celery",
        app="celery_app.py",
        worker=_CELERY,
        jobs=6_000,
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
        install=("celery[redis]==5.7.0", "hiredis"),
        environment="celery",
        app="celery_app.py",
        worker=_CELERY,
        jobs=6_000,
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
        install=("procrastinate==3.10.0", "psycopg[binary,pool]", "uvloop"),
        environment="procrastinate",
        app="procrastinate_app.py",
        worker="{python} {app} worker",
        jobs=4_000,
        settings="concurrency=100, delete_jobs=successful, pool of 20; uvloop",
        source="procrastinate: Launch a worker; Delete finished jobs; Retry stalled jobs",
        recovery="none, unless one writes the documented periodic task",
        back_s=10,
        has_transactions=True,
    ),
    Peer(
        name="procrastinate-stalled",
        as_fast_as="procrastinate",
        install=("procrastinate==3.10.0", "psycopg[binary,pool]", "uvloop"),
        environment="procrastinate",
        app="procrastinate_app.py",
        worker="{python} {app} worker",
        jobs=4_000,
        settings="as procrastinate, with the documented periodic task for stalled jobs",
        source="procrastinate: Launch a worker; Delete finished jobs; Retry stalled jobs",
        recovery="heartbeat 30 s, looked at every 10 min: 5 s, 1 s",
        recovery_s=5,
        back_s=15,
        mode="reliable",
        reliability="reliable",
    ),
    Peer(
        name="pgqueuer",
        install=("pgqueuer[asyncpg,cli]==1.6.0", "uvloop"),
        environment="pgqueuer",
        app="pgqueuer_app.py",
        worker="{python} {app} worker",
        jobs=80_000,
        concurrency=500,
        settings="batch_size=250, max_concurrent_tasks=500 (more for short jobs), autovacuum as advised; uvloop",
        source="PgQueuer: Performance Tuning",
        recovery="heartbeat_timeout (default 30 s): 5 s",
        recovery_s=5,
        back_s=12,
        has_transactions=True,
    ),
    Peer(
        name="bullmq",
        install=("bullmq@6.7.0", "ioredis"),
        environment="bullmq",
        app="bullmq_app.mjs",
        worker="node {app} worker",
        jobs=80_000,
        settings="concurrency 100, removeOnComplete; ioredis",
        source="BullMQ: Workers > Concurrency, Auto-removal of jobs, Stalled Jobs; Queues > Adding jobs in bulk",
        recovery="lockDuration, stalledInterval (default 30 s each): 5 s each",
        recovery_s=5,
        back_s=20,
    ),
    Peer(
        name="graphile-worker",
        install=("graphile-worker@0.17.3",),
        environment="graphile-worker",
        app="graphile_worker_app.mjs",
        worker="node {app} worker",
        jobs=15_000,
        concurrency=24,
        settings="concurrentJobs 24, maxPoolSize 25 (100 are no faster)",
        source=_GRAPHILE_SOURCE,
        recovery="after 4 hours",
        back_s=10,
    ),
    Peer(
        name="graphile-worker-batch",
        install=("graphile-worker@0.17.3",),
        environment="graphile-worker",
        app="graphile_worker_app.mjs",
        worker="node {app} worker",
        jobs=250_000,
        concurrency=24,
        settings="concurrentJobs 24, maxPoolSize 25, localQueue.size 500, complete- and failJobBatchDelay 0: its own",
        source=_GRAPHILE_SOURCE,
        recovery="after 4 hours",
        back_s=10,
        mode="batch",
    ),
)
