"""The real scripts against a model of them, in every order hypothesis can think of.

The model is the one of tests/model, whose states are searched there: what holds for it holds for what Redis runs.
The examples are the same at every run; JOBQ_EXAMPLES=2000 tries as many new ones.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from .scripts_machine import ScriptsMachine
from .scripts_pair import PATIENCE_S

EXAMPLES = 40
ASKED = int(os.environ.get("JOBQ_EXAMPLES", "0"))


@pytest.mark.timeout(600 + 10 * ASKED)  # what fails is made smaller, which takes its time
def test_the_scripts_do_what_the_model_does_and_keep_every_job_reachable_whatever_happens(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobq.broker.scripts.CALL_TIMEOUT_S", PATIENCE_S)
    machine = type("Machine", (ScriptsMachine,), {"url": redis_url})
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine,
        settings=settings(
            max_examples=ASKED or EXAMPLES,
            derandomize=not ASKED,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            database=None,
        ),
    )
