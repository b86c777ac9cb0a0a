"""All mutations, by the part of jobq they break. Called by the program and by tests/integration/test_mutants.py."""

from __future__ import annotations

from tests.mutants.mutation import Mutation
from tests.mutants.of_postgresql import OF_POSTGRESQL
from tests.mutants.of_redis import OF_REDIS
from tests.mutants.of_relay import OF_RELAY
from tests.mutants.of_worker import OF_WORKER

MUTATIONS: list[Mutation] = [*OF_POSTGRESQL, *OF_REDIS, *OF_RELAY, *OF_WORKER]
