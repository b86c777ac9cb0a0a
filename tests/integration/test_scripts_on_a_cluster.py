"""All tests of the scripts once more, on a node of a cluster and through the clients of one.

Such a node refuses a script whose keys are not in one slot, be they declared or touched without.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from redis.exceptions import ResponseError

from jobq.broker.client import connect_sync
from tests.integration import (
    test_script_beat,
    test_script_memory,
    test_script_order,
    test_script_strangers,
    test_scripts,
)
from tests.redis_state import open_broker
from tests.valkeys import Cluster, cluster

for _module in (test_scripts, test_script_beat, test_script_memory, test_script_order, test_script_strangers):
    _new = {name: value for name, value in vars(_module).items() if not name.startswith("_") and name not in globals()}
    globals().update(_new)


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster(1) as opened:
        ends_at = time.monotonic() + 30
        while not opened.is_whole():
            assert time.monotonic() < ends_at, "the node has not taken its slots"
            time.sleep(0.01)
        yield opened


@pytest.fixture
def redis_url(nodes: Cluster) -> Iterator[str]:
    yield nodes.url
    nodes.flush()


@pytest.mark.parametrize("keys", [["{a}known", "{b}known"], ["{a}known"]], ids=["declared", "undeclared"])
async def test_a_script_that_leaves_its_slot_is_refused(redis_url: str, keys: list[str]) -> None:
    source = "#!lua\nreturn {redis.call('HLEN', '{a}known'), redis.call('HLEN', '{b}known')}"

    async with open_broker(redis_url) as broker:
        with pytest.raises(ResponseError, match="slot"):
            await broker.client.eval(source, len(keys), *keys)
    with connect_sync(redis_url) as client, pytest.raises(ResponseError, match="slot"):
        client.eval(source, len(keys), *keys)


async def test_a_script_that_a_node_forgot_is_sent_again(redis_url: str, nodes: Cluster) -> None:
    async with open_broker(redis_url) as broker:
        for _ in range(2):
            nodes.nodes[0].ask("SCRIPT FLUSH")
            assert await broker.ack("q", "w", []) == 0
