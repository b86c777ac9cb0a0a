"""The search itself: every world holds, and every rule that is broken is found to be needed."""

from __future__ import annotations

import pytest

from . import wake_up
from .explore import explore
from .state import World
from .worlds import BROKEN_RULES, WORLDS


@pytest.mark.parametrize("world", WORLDS, ids=lambda world: world.name)
def test_nothing_is_lost_and_nothing_happens_twice_in_any_order_of_steps(world: World) -> None:
    explored = explore(world)

    assert explored.finding is None, f"\n{explored.finding}"
    print(f"{explored.states} states")


@pytest.mark.parametrize("rule", BROKEN_RULES)
def test_a_rule_that_is_broken_is_found(rule: str) -> None:
    world, broken = BROKEN_RULES[rule]

    explored = explore(world._replace(broken=rule))

    print(f"{rule}:\n{explored.finding}")
    assert explored.finding is not None
    assert explored.finding.property == broken


def test_no_commit_is_slept_through() -> None:
    states, way = wake_up.search()

    assert way == []
    assert states > 300


@pytest.mark.parametrize(
    "rule", ["K and poll in one statement", "no poll after K", "woken cleared after the poll", "nobody notifies"]
)
def test_a_broken_rule_of_the_wake_up_sleeps_through_a_commit(rule: str) -> None:
    _, way = wake_up.search(rule)

    print(f"{rule}:\n" + "\n".join(way))
    assert way != []
