"""The comparison with jobq's peers: the verdict, the table, and that every entry is complete. Nothing is measured."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path

import pytest

from benchmarks import peers as group
from benchmarks.peers import environments, marks
from benchmarks.peers.peers import PEERS, Peer
from benchmarks.peers.table import Row, markdown
from benchmarks.peers.verdict import Verdict, count_ends, read_ends

_NAMED = [pytest.param(peer, id=peer.name) for peer in PEERS]
_MACHINE: dict[str, object] = {"cores": 2}


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


def test_names_of_peers_are_told_apart() -> None:
    assert len({peer.name for peer in PEERS}) == len(PEERS)
    assert [peer.name for peer in environments.find(["arq", "bullmq"])] == ["arq", "bullmq"]
    with pytest.raises(KeyError):
        environments.find(["ark"])


def test_an_entry_that_shares_the_speed_of_another_names_one_that_is_measured() -> None:
    measured = {peer.name for peer in PEERS if not peer.as_fast_as}
    assert {peer.as_fast_as for peer in PEERS} - {""} <= measured


def test_a_machine_without_node_is_a_reason_and_no_failure_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(environments.PeerFailed, match="no node"):
        environments.make_ready(environments.find(["bullmq"])[0])


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


def test_table_has_medians_quantiles_and_the_verdict() -> None:
    row = Row(PEERS[0], "1.2", 100, [300.0, 100.0, 200.0], [float(number) for number in range(1, 101)])
    row.verdict = Verdict(jobs=500, lost=7, twice=3, waited_s=20.0, done_s=None)
    line = next(line for line in markdown([row], _MACHINE).splitlines() if line.startswith(f"| {PEERS[0].name} | 1.2"))
    assert "| 200 (100-300) | 50.5 | 99.0 | 7 | 3 | - |" in line


def test_who_could_not_be_run_stands_in_the_table_with_the_reason() -> None:
    row = Row(PEERS[0], failures={"install": "there is no node"})
    page = markdown([row], _MACHINE)
    assert f"| {PEERS[0].name} | - |" in page
    assert f"**{PEERS[0].name}**: install: there is no node" in page


def test_json_keeps_every_rate_and_the_settings() -> None:
    row = Row(PEERS[0], "1.2", 100, [300.0, 100.0], [1.0, 3.0])
    row.verdict = Verdict(jobs=500, lost=0, twice=0, waited_s=20.0, done_s=4.5)
    found = json.loads(row.as_json(_MACHINE))
    assert found["drain"] == [300.0, 100.0]
    assert found["settings"] == PEERS[0].settings
    assert found["killed"]["done_s"] == 4.5
    assert found["machine"] == _MACHINE
