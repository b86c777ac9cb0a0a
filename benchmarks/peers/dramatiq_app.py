"""dramatiq on Redis. Its actors are functions in threads, so the job is one: no coroutine is faster there.

Settings: "API Reference > RedisBroker, Environment Variables" of its documentation.
"""

from __future__ import annotations

import time

import dramatiq
import marks
import redis
from dramatiq.brokers.redis import RedisBroker

# Maintenance, which looks for dead workers, is done by one command in a thousand: with 3,000 jobs a second at once, but
# on a system as idle as that of the kill test hardly ever. So there it is one in ten.
recovery = {"heartbeat_timeout": 1000 * marks.RECOVERY_S, "maintenance_chance": 100_000} if marks.RECOVERY_S else {}
broker = RedisBroker(client=redis.Redis(unix_socket_path=marks.SOCKET), **recovery)
dramatiq.set_broker(broker)


@dramatiq.actor
def nothing(number: int, word: str) -> None:
    marks.ran()


@dramatiq.actor
def note_start(number: int, word: str) -> None:
    marks.started(number)


@dramatiq.actor
def sleep(number: int, word: str) -> None:
    time.sleep(marks.SLEEP_S)
    marks.ended(number)


TASKS = {"nothing": nothing, "note_start": note_start, "sleep": sleep}

if __name__ == "__main__":
    marks.main(lambda: marks.synchronously(lambda task, number: TASKS[task].send(number, marks.WORD)))
