"""PostgreSQL fails over to an asynchronous replica, and its last commits are lost: what becomes of their jobs.

Relay and workers are real processes, and none is started again. Most tests look at what one failover left behind.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests import postgres_shop as orders
from tests.faults import failover_app as app
from tests.postgres_pair import postgres_pair
from tests.postgres_shop import Address, Aftermath, Shop, fail_over_with_orders_of_every_kind

SURVIVORS = {
    *orders.DONE,
    *orders.UNDONE,
    orders.PAID,
    orders.TOLD,
    orders.CAUGHT,
    orders.RETRIED,
    *orders.NEW,
    orders.AGAIN,
}


@pytest.fixture(scope="module")
async def aftermath(tmp_path_factory: pytest.TempPathFactory) -> Aftermath:
    async with (
        postgres_pair() as pair,
        Shop.open(pair, tmp_path_factory.mktemp("shop")) as shop,
        Address.of(pair.primary) as address,
    ):
        return await fail_over_with_orders_of_every_kind(shop, address)


async def test_every_surviving_order_has_one_effect_and_a_lost_one_has_none(aftermath: Aftermath) -> None:
    assert aftermath.orders - {97} == SURVIVORS
    assert aftermath.effects == Counter(SURVIVORS - {orders.TOLD})


async def test_what_the_replica_knew_to_be_done_never_starts_again(aftermath: Aftermath) -> None:
    assert not {f"book {id_}" for id_ in orders.DONE} & aftermath.notes_after.keys()


async def test_completions_that_were_lost_are_undone_with_their_effects_and_run_again_once(
    aftermath: Aftermath,
) -> None:
    again = [*(f"book {id_}" for id_ in orders.UNDONE), f"pay {orders.PAID}", f"tell {orders.TOLD}"]
    assert [aftermath.notes_before[note] for note in again] == [1] * len(again)
    assert [aftermath.notes_after[note] for note in again] == [1] * len(again)


async def test_a_step_whose_result_was_lost_is_taken_again(aftermath: Aftermath) -> None:
    assert aftermath.notes_before[f"charge {orders.PAID}"] == 1
    assert aftermath.notes_after[f"charge {orders.PAID}"] == 1


async def test_entries_of_the_lost_future_never_run(aftermath: Aftermath) -> None:
    lost = {f"book {id_}" for id_ in (*orders.LOST, *orders.GHOSTS)}
    assert not lost & aftermath.notes_after.keys()
    assert aftermath.stats["ghost"] >= len(orders.GHOSTS)


async def test_a_generation_that_was_lost_is_dropped_and_the_one_before_it_runs_once(aftermath: Aftermath) -> None:
    assert aftermath.stats["rewound"] == 1
    assert aftermath.notes_after[f"book {orders.RETRIED}"] == 1


async def test_a_job_caught_inside_complete_runs_again(aftermath: Aftermath) -> None:
    assert aftermath.notes_before[f"book {orders.CAUGHT}"] == 1
    assert aftermath.notes_after[f"book {orders.CAUGHT}"] == 1


async def test_jobs_whose_transactions_have_the_numbers_of_lost_ones_run(aftermath: Aftermath) -> None:
    assert aftermath.first_new_xid < aftermath.last_old_xid - orders.BURNT_XIDS
    assert {aftermath.notes_after[f"book {id_}"] for id_ in orders.NEW} == {1}


async def test_an_idempotency_key_that_was_lost_with_its_job_is_free_and_an_older_one_holds(
    aftermath: Aftermath,
) -> None:
    assert aftermath.lost_key[0] != aftermath.lost_key[1]
    assert aftermath.old_key[0] == aftermath.old_key[1]


async def test_nothing_is_dropped_on_the_word_of_a_replica(aftermath: Aftermath) -> None:
    assert aftermath.ghosts_in_between == 0


async def test_a_replica_in_place_of_the_primary_is_an_outage_and_no_error(aftermath: Aftermath) -> None:
    assert "WrongDatabase" in aftermath.said[1]
    assert not [said for said in aftermath.said if "failed, trying again" in said]


@pytest.mark.parametrize("how", ["hosts in a URL", "hosts of the application's engine"])
async def test_processes_that_know_both_hosts_find_the_new_primary(how: str, tmp_path: Path) -> None:
    async with (
        postgres_pair() as pair,
        Shop.open(pair, tmp_path) as shop,
        Address.of(pair.primary, pair.replica) as address,
    ):
        where = {"JOBQ_DATABASE_URL": address.url}
        if how == "hosts of the application's engine":
            where = {"JOBQ_TEST_ENGINE": address.engine_url}
        await shop.start("relay", says="relay leads", **where)
        await shop.start("worker", says="worker ready", **where)
        await shop.order(app.book, *orders.DONE)
        await shop.completed(*orders.DONE)
        await shop.order(app.book, *orders.UNDONE, gate="after")
        await shop.noted(*(f"book {id_}" for id_ in orders.UNDONE))
        await pair.cut_off()

        await pair.fail_over()
        shop.primary = pair.replica
        shop.open_gate("after")
        await shop.order(app.book, *orders.NEW)
        await shop.drained()

        assert await shop.effects() == Counter({*orders.DONE, *orders.UNDONE, *orders.NEW})
        # Waiting for the new primary, in the pool too, uses up no attempt.
        assert not any("job retried" in process.said for process in shop.processes)
