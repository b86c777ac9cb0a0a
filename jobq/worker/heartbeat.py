"""The heartbeat: a thread that keeps this worker's lease, with a connection of its own.

1. Every beat it tells Redis all that the process owns, and renews the counter.
2. What Redis lost of it is put back, and what Redis holds beyond it is adopted: each only when two beats in a
   row agree, or beats that race acks would bring finished jobs back to life (MUST).
3. It falls silent when the event loop has not turned for a long time, so that a frozen process loses its jobs.

A thread, because jobs may block the loop for longer than a lease. Called by worker. Calls broker.beat.
"""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
import traceback
from collections.abc import Callable
from itertools import count

from ..broker.client import TROUBLE, connect_sync
from ..broker.keys import Keys
from ..broker.scripts import Beat, beat
from ..outage import Outage
from ..settings import WorkerSettings
from .owned import Owned

log = logging.getLogger(__name__)

_TICK_S = 0.25
_BLOCKED_S = 1.0


class Heartbeat:
    """Renews the lease until it is stopped, or the loop is frozen."""

    def __init__(
        self,
        redis_url: str,
        keys: list[Keys],
        worker: str,
        owned: Owned,
        settings: WorkerSettings,
        *,
        info: str,
        adopt: Callable[[str, list[bytes]], None],
        lose: Callable[[str, list[bytes]], None],
    ):
        self._client = connect_sync(redis_url)
        self._keys = list(keys)
        self._worker = worker
        self._owned = owned
        self._settings = settings
        self._info = info
        self._adopt = adopt
        self._lose = lose
        # A random start, so that a counter seen before a restart of Redis never comes back.
        self._counter = count(random.getrandbits(48))
        self._before = {keys.queue: Beat(True, [], [], []) for keys in self._keys}
        self.outage = Outage("redis", "heartbeat")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="jobq heartbeat", daemon=True)
        self._loop_thread = threading.get_ident()
        self._ticked_at = time.monotonic()
        self._reported_block = 0.0
        self.acked_at = float("-inf")
        """Monotonic time of the last beat that Redis answered, for all queues."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop and join: nothing vouches for this worker after that."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2 * self._settings.beat + 10)
        self._client.close()

    def loop_ticked(self) -> None:
        """The event loop turns."""
        self._ticked_at = time.monotonic()

    @property
    def may_start(self) -> bool:
        """Whether the lease surely holds long enough to start a run."""
        return time.monotonic() - self.acked_at < self._settings.start_margin

    def step(self) -> None:
        """Beat once for each queue."""
        sent_at = time.monotonic()
        for keys in list(self._keys):
            try:
                self._beat(keys)
            except BaseException:
                self._forget()
                # Last from now on: in a cluster the node of one queue may be away, and the others keep their leases.
                self._keys.remove(keys)
                self._keys.append(keys)
                raise
        self.acked_at = sent_at
        self.outage.end()

    def _run(self) -> None:
        next_beat = 0.0
        is_silent = False
        while not self._stopping.is_set():
            still_s = time.monotonic() - self._ticked_at
            self._report_blocked_loop(still_s)
            was_silent, is_silent = is_silent, still_s > self._settings.frozen_after
            if is_silent and not was_silent:
                log.error("heartbeat stops: the event loop is frozen", extra={"fields": {"still_s": round(still_s)}})
            if not is_silent and time.monotonic() >= next_beat:
                next_beat = time.monotonic() + self._settings.beat
                try:
                    self.step()
                except TROUBLE as error:
                    next_beat = time.monotonic() + min(self.outage.begin(error), self._settings.beat)
                except Exception:
                    log.exception("heartbeat failed, trying again")
            self._stopping.wait(min(_TICK_S, self._settings.beat))

    def _beat(self, keys: Keys) -> None:
        before = self._before[keys.queue]
        owned = self._owned.listed(keys.queue)
        still_owned = set(owned)
        now = beat(
            self._client,
            keys,
            self._worker,
            counter=next(self._counter),
            info=self._info,
            owned=owned,
            put_back=[raw for raw in before.missing if raw in still_owned],
        )
        # Crash here, or no answer: the counter has moved once more, and stands still from here on.
        if not now.registered and owned:
            log.warning("redis had lost this worker, told it again", extra={"fields": {"owned": len(owned)}})
        agreed = set(before.unknown)
        if unknown := [raw for raw in now.unknown if raw in agreed]:
            self._adopt(keys.queue, unknown)
        if now.lost:
            self._lose(keys.queue, now.lost)
        self._before[keys.queue] = now

    def _forget(self) -> None:
        """A beat without an answer says nothing: the next two must agree anew."""
        for keys in self._keys:
            self._before[keys.queue] = Beat(True, [], [], [])

    def _report_blocked_loop(self, still_s: float) -> None:
        if still_s < _BLOCKED_S:
            self._reported_block = 0.0
            return
        if self._reported_block == self._ticked_at:
            return
        self._reported_block = self._ticked_at
        frame = sys._current_frames().get(self._loop_thread)
        stack = "".join(traceback.format_stack(frame)[-8:]) if frame is not None else ""
        log.warning("event loop blocked", extra={"fields": {"still_s": round(still_s, 1), "stack": stack}})
