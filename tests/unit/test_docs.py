"""The pages: what they link to is there, what they mention exists, and their numbers are those of the code."""

from __future__ import annotations

import ast
import configparser
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from jobq.cli import cli
from jobq.settings import CRASHES_BEFORE_POISON, RelaySettings, WorkerSettings
from tests import reference
from tests.markdown import blocks, files, write_files

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
COMMANDS = {"jobq": cli, **dict(reference.commands())}
OF_OTHERS = {"JOBQ_DEBUG", "JOBQ_TEST_DATABASE_URL", "JOBQ_TEST_REDIS_URL"}
"""Variables that are no option's."""

per_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


# Links and the index


@per_page
def test_links_lead_somewhere(page: Path) -> None:
    missing = []
    for target in re.findall(r"\]\((?!https?://)([^)\s]+)\)", prose(page)):
        path, _, anchor = target.partition("#")
        file = (page.parent / path) if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            missing.append(target)

    assert missing == []


def test_the_index_names_every_page() -> None:
    index = (DOCS / "README.md").read_text(encoding="utf-8")

    assert {page.name for page in DOCS.glob("*.md")} - {"README.md"} == set(re.findall(r"\(([\w-]+\.md)", index))


def test_the_readme_leads_to_the_index_and_the_tutorial() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")

    assert "(docs/README.md)" in readme
    assert "(docs/tutorial.md)" in readme


# Commands


def test_the_page_of_commands_is_that_of_the_commands() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.render(), "run: python3 dev.py reference"


@per_page
def test_commands_and_their_options_exist(page: Path) -> None:
    wrong = [f"{call}: {trouble}" for call in calls(page) if (trouble := trouble_with(call))]

    assert wrong == []


@per_page
def test_options_that_are_mentioned_alone_exist(page: Path) -> None:
    known = {name for command in COMMANDS.values() for name in option_names(command)}
    mentioned = re.findall(r"(?<!`)`(--[a-z][a-z-]*)(?:[ =][^`]*)?`(?!`)", prose(page))

    assert [name for name in mentioned if name not in known] == []


@per_page
def test_variables_exist(page: Path) -> None:
    known = {option.envvar for command in COMMANDS.values() for option in command.params}
    mentioned = set(re.findall(r"\bJOBQ_[A-Z_]*[A-Z]\b", page.read_text(encoding="utf-8")))

    assert mentioned - known - OF_OTHERS == set()


def test_a_wrong_call_would_be_found() -> None:
    assert trouble_with("worker shop.jobs:jobs --no-such 3") == "no option --no-such"
    assert trouble_with("workers") == "no command workers"
    assert trouble_with("migrate upgrade --lock-timeout 3 head") is None


# Code


def test_every_page_with_code_has_a_test_that_names_it() -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    with_code = [page for page in DOCS.glob("*.md") if any(blocks(page, language) for language in ("python", "sh"))]

    assert [page.name for page in with_code if f'"{page.name}"' not in tests and f'"{page.stem}"' not in tests] == []


@per_page
def test_python_compiles(page: Path) -> None:
    for block in blocks(page, "python"):
        compile(block.text, str(page), "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@per_page
def test_data_can_be_read(page: Path) -> None:
    for block in blocks(page):
        match block.language:
            case "yaml":
                assert list(yaml.safe_load_all(block.text))
            case "ini":
                has_sections = re.search(r"^\[", block.text, re.MULTILINE)
                parser = configparser.ConfigParser(interpolation=None)
                parser.read_string(block.text if has_sections else f"[variables]\n{block.text}")
            case "toml":
                known = {"app", "schema", "database_url", "redis_url"} | {
                    max(option.opts, key=len).removeprefix("--").replace("-", "_")
                    for option in COMMANDS["jobq worker"].params
                }
                given = tomllib.loads(block.text).get("tool", {}).get("jobq", {})
                assert {name.replace("-", "_") for name in given} <= known


def test_the_code_that_no_test_runs_passes_a_strict_type_checker(tmp_path: Path) -> None:
    written = write_files(DOCS / "guarantees.md", tmp_path)

    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", *map(str, written)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )

    assert checked.returncode == 0, checked.stdout + checked.stderr


# Numbers


def test_the_grace_of_kubernetes_exceeds_that_of_the_worker() -> None:
    spec = pod("worker.yaml")
    (container,) = spec["containers"]

    grace = float(option_of(container["command"], "--grace") or WorkerSettings().grace)
    assert spec["terminationGracePeriodSeconds"] >= grace + 5
    assert WorkerSettings().grace + 5 <= 30, "the default of Kubernetes, as the page says"


@pytest.mark.parametrize("file", ["worker.yaml", "relay.yaml"])
def test_the_probes_of_kubernetes_ask_where_the_process_answers(file: str) -> None:
    (container,) = pod(file)["containers"]
    (health,) = [entry["value"] for entry in container["env"] if entry["name"] == "JOBQ_HEALTH"]

    for probe, path in (("livenessProbe", "/healthz"), ("readinessProbe", "/readyz")):
        asked = container[probe]["httpGet"]
        assert asked == {"path": path, "port": int(health.rpartition(":")[2])}
    assert health.startswith("0.0.0.0:"), "the kubelet asks from outside the pod"
    assert container["securityContext"]["runAsNonRoot"] is True


def test_the_units_of_systemd_give_the_worker_its_grace() -> None:
    units = {name: unit(name) for name in ("shop-worker.service", "shop-relay.service")}

    for parts in units.values():
        assert parts.sections() == ["Unit", "Service", "Install"]
        assert parts["Service"]["Type"] == "exec"
        assert parts["Service"]["Restart"] == "always"
        assert parts["Unit"]["StartLimitIntervalSec"] == "0"
    assert float(units["shop-worker.service"]["Service"]["TimeoutStopSec"]) >= WorkerSettings().grace + 5
    assert units["shop-worker.service"]["Service"]["KillMode"] == "mixed"


def test_the_numbers_in_the_text_are_those_of_the_code() -> None:
    worker, relay = WorkerSettings(), RelaySettings()
    text = {page.name: re.sub(r"\s+", " ", page.read_text(encoding="utf-8")) for page in DOCS.glob("*.md")}

    for name in ("kubernetes.md", "systemd.md"):
        assert f"lease ({worker.lease:g} s)" in text[name]
    assert f"grace ({worker.grace:g} s)" in text["systemd.md"]
    assert f"`--grace` seconds ({worker.grace:g})" in text["upgrading.md"]
    assert f"Without `--grace` it is {worker.grace:g} seconds" in text["kubernetes.md"]
    assert f"After {worker.lease:g} seconds" in text["guarantees.md"]
    assert f"After {worker.lease:g} seconds" in text["tutorial.md"]
    assert f"after about {relay.takeover_after:g} seconds" in text["kubernetes.md"]
    assert f"kept for {relay.dead_kept.days} days" in text["guarantees.md"]
    assert CRASHES_BEFORE_POISON == 3, "guarantees.md says that poison killed three workers in a row"


def test_the_words_are_those_of_the_readme() -> None:
    rows = re.findall(r"^\| ([a-z, ]+) \|", (DOCS / "guarantees.md").read_text().partition("## The words")[2], re.M)
    words = {word for row in rows for word in row.split(", ")}
    readme = (ROOT / "README.md").read_text(encoding="utf-8").partition("The words: ")[2].partition("\n\n")[0]

    assert set(re.findall(r"\*\*(\w+)\*\*", readme)) <= words


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """What its headings are called in links."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def calls(page: Path) -> Iterator[str]:
    """What stands behind `jobq` wherever it is called: in blocks, and in code between the words."""
    for span in re.findall(r"(?<!`)`jobq ([^`]+)`(?!`)", prose(page)):
        yield span.replace("\n", " ")
    for block in blocks(page):
        if block.language in ("python", "sql", "toml"):
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            plain = line.replace('", "', " ").partition(" #")[0]
            yield from re.findall(r"""(?:^|\$ |&& |\$\(|/bin/|uv run |\["|jobq |=\S+ )jobq ([^|;&)"\]\n]+)""", plain)


def trouble_with(call: str) -> str | None:
    """Follow a call down the commands; returns what is not there."""
    command: click.Command = cli
    path = "jobq"
    for word in shlex.split(call.replace("'", "")):
        if word.startswith("-") and word not in ("-", "--"):
            if word.partition("=")[0] not in option_names(command):
                return f"no option {word}"
        elif isinstance(command, click.Group) and re.fullmatch(r"[a-z][a-z-]*", word):
            path = f"{path} {word}"
            if path not in COMMANDS:
                return f"no command {word}"
            command = COMMANDS[path]
    return None


def option_names(command: click.Command) -> set[str]:
    names = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    return names | {"--help", "-h"}


def option_of(command: list[str], name: str) -> str | None:
    return command[command.index(name) + 1] if name in command else None


def pod(file: str) -> dict[str, Any]:
    document = yaml.safe_load(files(DOCS / "kubernetes.md")[file])
    spec: dict[str, Any] = document["spec"]["template"]["spec"]
    return spec


def unit(name: str) -> configparser.ConfigParser:
    (text,) = [block.text for block in blocks(DOCS / "systemd.md", "ini") if name in block.text.partition("\n")[0]]
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(text)
    return parser
