"""All states of a world, breadth first; and, from each of them, whether the jobs still get done.

Progress is asked backwards. The steps of the protocol alone (no fault, no choice of the application) are walked from
the states in which all is over to those that lead there. A state that is not reached can never get its jobs done,
whatever happens. And one that is will: the states are finite, so a scheduler that lets nothing wait for ever that
may happen again and again comes to the end. Asked twice: with the endless scrub, and with only those walks that the
relay knows to be needed.
"""

from __future__ import annotations

import gc
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from . import faults, relay, sweeper, worker
from .properties import DRAINS, DRAINS_SOON, broken_by, is_over
from .state import State, Step, World, run, start


@dataclass
class Finding:
    """What is broken, and the shortest way there."""

    property: str
    trace: list[str]

    def __str__(self) -> str:
        lines = [f"{number:3} {says}" for number, says in enumerate(self.trace, 1)]
        return "\n".join([*lines, f"  broken: {self.property}"])


@dataclass
class Explored:
    states: int
    finding: Finding | None


def next_steps(world: World, state: State) -> Iterator[Step]:
    """Every atomic step that may come next."""
    yield from faults.application(state)
    yield from relay.steps(world, state)
    for number in range(world.workers):
        yield from worker.steps(world, state, number)
    yield from sweeper.steps(world, state)
    if world.faults:
        yield from faults.steps(world, state)


class Explorer:
    def __init__(self, world: World):
        self.world = world
        self.numbers: dict[State, int] = {start(world): 0}
        self.states = [start(world)]
        self.came_from = array("l", [-1])
        self.goals: list[int] = []
        self.edges: dict[str, tuple[array[int], array[int]]] = {
            kind: (array("l"), array("l")) for kind in ("step", "scrub")
        }

    def explore(self) -> Explored:
        """Search everything; stop at the first state or step that breaks a property of safety."""
        for number, state in enumerate(self.states):  # which grows meanwhile
            if is_over(state):
                self.goals.append(number)
            for step in next_steps(self.world, state):
                known = len(self.states)
                reached = self.numbers.setdefault(step.state, known)
                if reached == known:
                    self.states.append(step.state)
                    self.came_from.append(number)
                if step.kind in self.edges:
                    sources, targets = self.edges[step.kind]
                    sources.append(number)
                    targets.append(reached)
                if step.breaks:
                    return self._found(step.breaks, number, step.says)
                if reached == known and (broken := broken_by(self.world, step.state)):
                    return self._found(broken, reached)
        return self._progress()

    def _progress(self) -> Explored:
        for kinds, property_ in ((("step", "scrub"), DRAINS), (("step",), DRAINS_SOON)):
            drains = self._lead_to_goals(kinds)
            for number, state in enumerate(self.states):
                if not drains[number] and not (property_ == DRAINS_SOON and state.needs_scrub):
                    return self._found(property_, number)
        return Explored(len(self.states), None)

    def _lead_to_goals(self, kinds: tuple[str, ...]) -> bytearray:
        """Mark the states from which these steps lead to the end."""
        before: list[list[int]] = [[] for _ in self.states]
        for kind in kinds:
            for source, target in zip(*self.edges[kind], strict=True):
                before[target].append(source)
        marked = bytearray(len(self.states))
        todo = list(self.goals)
        while todo:
            number = todo.pop()
            if not marked[number]:
                marked[number] = 1
                todo += before[number]
        return marked

    def _found(self, property_: str, number: int, last: str | None = None) -> Explored:
        return Explored(len(self.states), Finding(property_, [*self._trace(number), *([last] if last else [])]))

    def _trace(self, number: int) -> list[str]:
        """What was said on the way to a state: each step is looked for again, since keeping all takes memory."""
        path = [number]
        while self.came_from[path[-1]] >= 0:
            path.append(self.came_from[path[-1]])
        path.reverse()
        says = []
        for before, after in pairwise(path):
            steps = next_steps(self.world, self.states[before])
            says.append(next(step.says for step in steps if step.state == self.states[after]))
        return says


def explore(world: World) -> Explored:
    """Search a world. Nothing in it is garbage, and looking for some would take most of the time."""
    gc.disable()
    try:
        return Explorer(world).explore()
    finally:
        run.cache_clear()
        gc.enable()
