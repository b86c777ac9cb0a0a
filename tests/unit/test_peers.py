"""The comparison with jobq's peers: the verdict, the table, and that every entry is complete. Nothing is measured."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import pytest

from benchmarks import peers as group
from benchmarks import results
from benchmarks.figures import Figure
from benchmarks.peers import environments, marks
from benchmarks.peers.peers import PEERS, Peer
from benchmarks.peers.table import rates, table
from benchmarks.peers.trials import count_ends, read_ends

_NAMED = [pytest.param(peer, id=peer.name) for peer in PEERS]
_BY_NAME = {peer.name: peer for peer in PEERS}
_CIRCUMSTANCES = {
    "versions": {"jobq": "1.0"},
    "cores": 2,
    "cpu": "a CPU",
    "date": "2026-01-01 00:00 UTC",
    "command": "python3 dev.py bench peers",
}


def _line(name: str, *samples: float, is_distribution: bool = False) -> results.Line:
    figure = Figure(f"peers/{name}", "a unit", "1.2", list(samples), [0.0], is_distribution)
    return results.line(figure, _CIRCUMSTANCES)


def _row(page: str, name: str) -> str:
    return next(line for line in page.splitlines() if line.startswith(f"| `{name}` "))


def test_a_job_that_never_ended_is_lost_and_one_that_ended_again_ran_twice() -> None:
    assert count_ends([0, 1, 1, 3, 3, 3], 5) == (2, 2)


def test_numbers_of_other_jobs_do_not_count() -> None:
    assert count_ends([0, 1, 7, -1], 2) == (0, 0)


def test_a_piece_of_a_line_that_a_killed_worker_left_is_not_read() -> None:
    assert read_ends("4\n12\n1") == [4, 12]
    assert read_ends("") == []


@pytest.mark.parametrize("peer", _NAMED)
def test_every_peer_says_what_was_set_and_where_that_is_documented(peer: Peer) -> None:
    assert peer.settings
    assert peer.source
    assert peer.recovery
    assert peer.reliability in ("default", "reliable")
    assert peer.back_s > peer.recovery_s
    assert peer.jobs > 0


@pytest.mark.parametrize("peer", _NAMED)
def test_every_peer_has_an_application_that_counts_runs_starts_and_ends(peer: Peer) -> None:
    text = environments.app_of(peer).read_text()
    if not peer.is_node:
        ast.parse(text)
    for mark in ("marks.ran()", "marks.started(", "marks.ended("):
        assert mark in text


def test_every_application_has_a_peer() -> None:
    applications = {path.name for path in environments.HERE.glob("*_app.*")}
    assert applications == {peer.app for peer in PEERS}


@pytest.mark.parametrize("peer", _NAMED)
def test_every_peer_is_installed_in_one_version_which_stands_with_its_figures(peer: Peer) -> None:
    assert peer.version[0].isdecimal()
    assert {measure.about for measure in group.MEASURES if measure.name == f"peers/{peer.name}-kill"} == {peer.version}


def test_names_of_peers_are_told_apart() -> None:
    assert len(_BY_NAME) == len(PEERS)


def test_an_entry_that_shares_the_speed_of_another_names_one_that_is_measured() -> None:
    measured = {peer.name for peer in PEERS if not peer.as_fast_as}
    assert {peer.as_fast_as for peer in PEERS} - {""} <= measured


def test_a_machine_without_node_is_a_reason_and_no_failure_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(environments.PeerFailed, match="no node"):
        environments.make_ready(_BY_NAME["bullmq"])


def test_measures_are_slow_and_every_peer_is_killed() -> None:
    names = {measure.name for measure in group.MEASURES}
    assert len(names) == len(group.MEASURES)
    assert {f"peers/{peer.name}-kill" for peer in PEERS} <= names
    assert {measure.group for measure in group.MEASURES} == {"peers"}
    assert all(measure.is_slow for measure in group.MEASURES)


def test_runs_are_counted_where_another_process_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(marks, "DIRECTORY", tmp_path)
    monkeypatch.setattr(marks, "_files", marks._Files())
    (tmp_path / "runs").write_bytes(bytes(8 * marks.SLOTS))
    marks.ran()
    marks.ran()
    assert sum(memoryview((tmp_path / "runs").read_bytes()).cast("q")) == 2


def test_ends_are_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = marks._Files()
    monkeypatch.setattr(marks, "DIRECTORY", tmp_path)
    monkeypatch.setattr(marks, "_files", files)
    marks.ended(3)
    marks.ended(14)
    for descriptor in files._opened.values():
        os.close(descriptor)
    assert read_ends((tmp_path / "ends").read_text()) == [3, 14]


def test_a_run_is_known_to_enqueue_in_transactions_where_its_peer_says_so() -> None:
    for peer in PEERS:
        assert ("writing()" in environments.app_of(peer).read_text()) >= peer.has_transactions
    measured = {measure.name for measure in group.MEASURES if measure.name.endswith("-enqueue")}
    assert measured == {"peers/jobq-enqueue", "peers/procrastinate-enqueue", "peers/pgqueuer-enqueue"}


def test_the_table_has_a_row_for_each_peer_with_all_that_was_found() -> None:
    latencies = [float(number) for number in range(1, 101)]
    page = table(
        [
            _line("jobq", 400.0),
            _line("arq", 300.0, 100.0, 200.0),
            _line("arq-latency", *latencies, is_distribution=True),
            _line("arq-kill/lost", 7),
            _line("arq-kill/twice", 3),
            _line("arq-kill/done", 12.5),
            _line("jobq-enqueue", 50.0),
        ]
    )

    assert _row(page, "arq") == "| `arq` 1.2 | default | 200 | 100 to 300 | 0.50 | 50.0 | 99.0 | 7 | 3 | 12.5 |"
    assert "| `jobq` 1.2 | 50.0 | 50.0 to 50.0 |" in page
    assert _BY_NAME["arq"].settings in page
    assert _BY_NAME["arq"].source in page
    assert "`saq`" not in page


def test_the_fastest_peer_stands_first_and_one_of_the_same_speed_beside_its_like() -> None:
    lines = [_line("jobq", 2.0), _line("saq", 1.0), _line("saq-retries-kill/lost", 0), _line("bullmq", 3.0)]

    page = table(lines)

    places = [page.index(f"| `{name}` ") for name in ("bullmq", "jobq", "saq", "saq-retries")]
    assert places == sorted(places)
    assert _row(page, "saq-retries").startswith("| `saq-retries` 1.2 | reliable | as `saq` |")
    assert [line["name"] for line in rates(lines)] == ["peers/bullmq", "peers/jobq", "peers/saq"]


def test_who_could_not_be_measured_stands_below_with_the_reason() -> None:
    page = table([_line("jobq", 2.0), results.failure("peers/bullmq", "there is no node", _CIRCUMSTANCES)])

    assert "- `bullmq` could not be measured: there is no node" in page
