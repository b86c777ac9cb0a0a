"""What the benchmarks make of their samples. Nothing is measured here."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import cpu, results, suite, targets
from benchmarks.figures import Figure, Measure, Samples
from benchmarks.stage import Stage
from benchmarks.targets import TARGETS, Target

CIRCUMSTANCES = {
    "versions": {"jobq": "1.0", "PostgreSQL": "18.4"},
    "cores": 2,
    "cpu": "a CPU",
    "date": "2026-01-01 00:00 UTC",
    "command": "python3 dev.py bench",
}


async def nothing(stage: Stage) -> Samples:
    return 1.0


def measure(name: str, **options: Any) -> Measure:
    return Measure(name, "jobs/s", nothing, **options)


def line(name: str, *samples: float, is_distribution: bool = False) -> results.Line:
    figure = Figure(name, "jobs/s", samples=list(samples), others_cpu=[0.02], is_distribution=is_distribution)
    return results.line(figure, CIRCUMSTANCES)


def names(measures: list[Measure]) -> list[str]:
    return [measure.name for measure in measures]


def test_runs_go_round_and_a_measure_may_have_fewer() -> None:
    measures = [measure("a/1"), measure("a/2", repeat=1), measure("b/1", repeat=3)]

    order = [(number, measure.name) for number, measure in suite.rounds(measures, 2)]

    assert order == [(1, "a/1"), (1, "a/2"), (1, "b/1"), (2, "a/1"), (2, "b/1"), (3, "b/1")]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ([], ["drain/one", "latency/idle"]),
        (["drain"], ["drain/one", "drain/slow"]),
        (["drain/slow"], ["drain/slow"]),
        (["idle", "drain/one"], ["drain/one", "latency/idle"]),
        (["all"], ["drain/one", "drain/slow", "latency/idle"]),
    ],
)
def test_measures_are_named_by_group_or_variant_and_slow_ones_only_by_name(asked: list[str], found: list[str]) -> None:
    there = [measure("drain/one"), measure("drain/slow", is_slow=True), measure("latency/idle")]

    assert names(suite.chosen(there, asked)) == found


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(suite.UnknownMeasure, match="drian"):
        suite.chosen([measure("drain/one")], ["drain", "drian"])


def test_every_measure_has_a_name_of_its_own_and_every_target_a_measure() -> None:
    there = suite.measures()

    assert len(set(names(there))) == len(there)
    wanted = [figure for target in TARGETS for figure in (target.figure, *target.over)]
    has_peers = "peers" in {measure.group for measure in there}
    for figure in (figure for figure in wanted if has_peers or not figure.startswith("peers/")):
        assert any(figure == name or figure.startswith(f"{name}/") for name in names(there)), figure


def test_the_samples_of_all_runs_come_together_under_each_name() -> None:
    figures: dict[str, Figure] = {}
    one = measure("latency/idle", units={"share": "%"}, about="one job at a time")

    suite.note(figures, one, {"": 3.0, "share": 10.0, "start": [1.0, 2.0]}, 0.1)
    suite.note(figures, one, {"": 5.0, "share": 20.0, "start": [3.0]}, 0.2)

    assert list(figures) == ["latency/idle", "latency/idle/share", "latency/idle/start"]
    assert figures["latency/idle"].samples == [3.0, 5.0]
    assert figures["latency/idle"].others_cpu == [0.1, 0.2]
    assert figures["latency/idle"].about == "one job at a time"
    assert figures["latency/idle/share"].unit == "%"
    assert figures["latency/idle/start"].samples == [1.0, 2.0, 3.0]
    assert figures["latency/idle/start"].is_distribution


def test_a_percentile_is_the_smallest_sample_that_so_many_do_not_exceed() -> None:
    figure = Figure("a", "ms", samples=[float(number) for number in range(1000, 0, -1)])

    assert [figure.percentile(percent) for percent in (50, 99, 99.9, 100)] == [500, 990, 999, 1000]
    assert Figure("a", "ms", samples=[7.0]).percentile(50) == 7.0


def test_new_results_replace_those_of_the_same_measures_and_no_others() -> None:
    order = ["drain/one", "drain/one-more", "latency/idle"]
    before = [line("drain/one", 1), line("drain/one/old", 1), line("drain/one-more", 2), line("drain/one-gone", 9)]

    after = results.merged(before, [line("latency/idle", 4), line("drain/one", 3)], order)

    assert [(line["name"], line["median"]) for line in after] == [
        ("drain/one", 3),
        ("drain/one-more", 2),
        ("latency/idle", 4),
        ("drain/one-gone", 9),
    ]


def test_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    lines = [line("drain/one", 12_345.678, 1.0, 2.5), line("latency/idle", 1, 2, 3, is_distribution=True)]

    results.write(tmp_path / "results", lines)

    assert results.read(tmp_path / "results") == lines
    assert sorted(path.name for path in (tmp_path / "results").iterdir()) == ["drain.md", "figures.jsonl", "latency.md"]
    assert results.read(tmp_path / "elsewhere") == []


def test_a_table_shows_median_and_range_or_percentiles_and_where_it_was_measured() -> None:
    table = results.table(
        [line("drain/one", 12_345.6, 1.0, 20_000), line("drain/two", *range(1, 101), is_distribution=True)]
    )

    assert table.splitlines() == [
        "| | median | min to max | | others' CPU |",
        "|---|---:|---:|---|---:|",
        "| `one` | 12,346 | 1.00 to 20,000 | jobs/s | 2% |",
        "",
        "| | p50 | p99 | p99.9 | | samples | others' CPU |",
        "|---|---:|---:|---:|---|---:|---:|",
        "| `two` | 50.0 | 99.0 | 100 | jobs/s | 100 | 2% |",
        "",
        "2026-01-01 00:00 UTC, 1 runs, 2 cores (a CPU). jobq 1.0, PostgreSQL 18.4. `python3 dev.py bench`",
    ]


def test_a_table_of_several_runs_says_which_figures_are_of_which() -> None:
    later = line("drain/two", 2) | {"date": "2026-02-02 00:00 UTC"}

    notes = results.table([line("drain/one", 1), later]).splitlines()[-2:]

    assert notes[0].startswith("- 2026-01-01")
    assert notes[0].endswith("(`one`)")
    assert notes[1].startswith("- 2026-02-02")
    assert notes[1].endswith("(`two`)")


def test_what_yielded_nothing_is_kept_with_its_reason_until_it_is_measured() -> None:
    failed = results.failure("drain/one", "no disk", CIRCUMSTANCES)

    lines = results.merged([line("drain/one", 1), line("drain/two", 2)], [failed], ["drain/one", "drain/two"])

    assert "- `one` could not be measured: no disk" in results.table(lines)
    assert "| `one`" not in results.table(lines)
    assert results.merged(lines, [line("drain/one", 3)], ["drain/one", "drain/two"])[0]["median"] == 3


def test_a_group_may_have_a_table_of_its_own(tmp_path: Path) -> None:
    results.write(tmp_path, [line("drain/one", 1), line("peers/a", 2)], {"peers": lambda lines: f"{len(lines)} peer"})

    assert (tmp_path / "peers.md").read_text() == "1 peer"
    assert "| `one` |" in (tmp_path / "drain.md").read_text()


def test_a_page_takes_up_tables_between_its_marks_and_keeps_all_else(tmp_path: Path) -> None:
    results.write(tmp_path, [line("drain/one", 1)])
    (tmp_path / "drain.svg").touch()
    page = (
        "Above\n<!-- results: drain -->\nold\n<!-- end -->\nBetween\n<!-- results: peers -->\nkept\n<!-- end -->\nBelow"
    )

    filled = results.with_tables(page, tmp_path)

    assert "| `one` | 1.00 |" in filled
    assert "![drain](results/drain.svg)" in filled
    assert "old" not in filled
    assert filled.startswith("Above\n")
    assert filled.endswith("Between\n<!-- results: peers -->\nkept\n<!-- end -->\nBelow")
    assert results.with_tables(filled, tmp_path) == filled


@pytest.mark.parametrize(("target", "is_met"), [(("a", 10), True), (("a", 10.1), False)])
def test_a_target_is_met_at_its_bound(target: tuple[str, float], is_met: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TARGETS", (Target("what", *target), Target("other", "never measured", 1)))

    (verdict,) = targets.verdicts({"a": {"median": 10.0}})

    assert verdict.is_met is is_met


def test_a_target_may_be_an_upper_bound_of_a_percentile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "TARGETS", (Target("what", "a", 5, is_most=True, statistic="p99"),))

    assert [verdict.is_met for verdict in targets.verdicts({"a": {"median": 9.0, "p99": 5.0}})] == [True]
    assert [verdict.is_met for verdict in targets.verdicts({"a": {"median": 1.0, "p99": 5.1}})] == [False]


def test_a_target_may_be_a_ratio_to_the_best_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        targets, "TARGETS", (Target("what", "drain/one", 1.4, over=("peers/a", "peers/b", "peers/gone")),)
    )

    (verdict,) = targets.verdicts(
        {"drain/one": {"median": 280}, "peers/a": {"median": 100}, "peers/b": {"median": 200}}
    )

    assert verdict.found == pytest.approx(1.4)
    assert "| what | >= 1.40 | 1.40 | met |" in results.verdict_table([verdict])
    assert targets.verdicts({"drain/one": {"median": 280}}) == []


def test_what_others_took_is_what_the_machine_did_beyond_the_benchmark() -> None:
    before = cpu.Reading(at=10.0, seconds={"relay": 1.0}, ours=4.0, machine=100.0)
    after = cpu.Reading(at=12.0, seconds={"relay": 1.5, "worker": 0.25}, ours=5.0, machine=101.0 + cpu.cores())

    used = after.since(before)

    assert used.seconds == {"relay": 0.5, "worker": 0.25}
    assert used.others_share == pytest.approx(0.5)


def test_cpu_that_this_process_takes_is_not_others() -> None:
    before = cpu.read({"me": [os.getpid()]})
    while cpu.read({"me": [os.getpid()]}).seconds["me"] < before.seconds["me"] + 0.05:
        pass

    used = cpu.read({"me": [os.getpid()]}).since(before)

    assert used.seconds["me"] == used.ours > 0.04
    assert used.others_share >= 0.0
    assert cpu.resident_bytes(os.getpid(), peak=True) >= cpu.resident_bytes(os.getpid()) * 0.9 > 1_000_000
