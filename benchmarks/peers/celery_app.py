"""Celery on Redis. Its tasks are functions, so the job is one.

Settings: "User Guide > Optimizing", "Tasks > Ignore results you don't want" and "Using Redis" of its documentation.
"""

from __future__ import annotations

import time

import marks
from celery import Celery

app = Celery("celery_app", broker=f"redis+socket://{marks.SOCKET}")
app.conf.update(
    task_ignore_result=True,
    worker_prefetch_multiplier=64,
    broker_connection_retry_on_startup=True,
)
if marks.MODE == "reliable":
    app.conf.update(task_acks_late=True, task_reject_on_worker_lost=True)
if marks.RECOVERY_S:
    app.conf.broker_transport_options = {
        "visibility_timeout": marks.RECOVERY_S,
        "unacked_restore_interval": 1,
        "unacked_restore_throttle": 1,
    }


@app.task
def nothing(number: int, word: str) -> None:
    marks.ran()


@app.task
def note_start(number: int, word: str) -> None:
    marks.started(number)


@app.task
def sleep(number: int, word: str) -> None:
    time.sleep(marks.SLEEP_S)
    marks.ended(number)


TASKS = {"nothing": nothing, "note_start": note_start, "sleep": sleep}

if __name__ == "__main__":
    marks.main(lambda: marks.synchronously(lambda task, number: TASKS[task].delay(number, marks.WORD)))
