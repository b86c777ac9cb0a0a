"""docker-compose.yml and the Dockerfile, read: there is no engine to run them with."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobq.settings import WorkerSettings
from tests import reference
from tests.unit.test_docs import trouble_with

ROOT = Path(__file__).parents[2]
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
VARIABLES = {option.envvar for _, command in reference.commands() for option in command.params}
BUILT_HERE = {name: service for name, service in SERVICES.items() if service["image"] == "jobq"}

per_service = pytest.mark.parametrize("name", SERVICES)
per_built = pytest.mark.parametrize("name", BUILT_HERE)


# Compose


def test_there_are_both_stores_and_all_that_uses_them() -> None:
    assert set(SERVICES) == {"postgres", "valkey", "migrate", "relay", "worker", "shop", "mail"}


@per_service
def test_a_service_is_watched_or_runs_once(name: str) -> None:
    service = SERVICES[name]

    if service["restart"] == "no":
        assert service["healthcheck"] == {"disable": True}
    else:
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["healthcheck"]["interval"]


@per_service
def test_ports_are_open_to_this_machine_alone(name: str) -> None:
    assert [port for port in SERVICES[name].get("ports", []) if not port.startswith("127.0.0.1:")] == []


@per_service
def test_whoever_needs_another_waits_for_it(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        runs_once = SERVICES[other]["restart"] == "no"
        assert how == {"condition": "service_completed_successfully" if runs_once else "service_healthy"}


@per_built
def test_commands_and_variables_exist(name: str) -> None:
    service = BUILT_HERE[name]
    program, *arguments = service["command"]

    assert service["build"] == "."
    if program == "jobq":
        assert trouble_with(shlex.join(arguments)) is None
    assert {key for key in service["environment"] if key.startswith("JOBQ_")} <= VARIABLES


def test_the_worker_has_time_to_stop() -> None:
    given = SERVICES["worker"]["stop_grace_period"]

    assert float(given.removesuffix("s")) >= WorkerSettings().grace + 5


def test_valkey_keeps_what_it_has_and_evicts_nothing() -> None:
    command = SERVICES["valkey"]["command"]

    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_the_stores_keep_their_data_in_volumes() -> None:
    document = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    named = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}

    assert named == set(document["volumes"])


# Image


def instructions() -> list[tuple[str, str]]:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_image_does_not_run_as_root() -> None:
    last_stage = instructions()[max(at for at, (name, _) in enumerate(instructions()) if name == "FROM") :]

    users = [value for name, value in last_stage if name == "USER"]
    assert users
    # By number: Kubernetes cannot tell of a name that it is not root.
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", users[-1])
    assert json.loads(dict(last_stage)["CMD"])[0] == "jobq"


def test_what_the_image_copies_is_there_and_is_not_ignored() -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [value.split() for name, value in instructions() if name == "COPY"]
    sources = [source for words in copied if not words[0].startswith("--from=") for source in words[:-1]]

    assert sources
    assert "*" in ignored, "what is sent to the engine is named one by one"
    for source in sources:
        assert (ROOT / source).exists()
        assert f"!{source.partition('/')[0]}" in ignored


def test_the_image_copies_all_that_the_wheel_is_made_of() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    wheel = build["targets"]["wheel"]
    first_stage = instructions()[: [name for name, _ in instructions()].index("FROM", 1)]
    copied = {source for name, value in first_stage if name == "COPY" for source in value.split()[:-1]}

    needed = {*wheel["packages"], *(source.partition("/")[0] for source in wheel["force-include"])}
    assert needed | {"pyproject.toml", "README.md", "LICENSE"} <= copied


def test_the_image_has_what_the_shop_imports() -> None:
    (install,) = [value for name, value in instructions() if name == "RUN" and "pip install" in value]
    imported = {
        found.partition(".")[0]
        for path in (ROOT / "examples" / "shop").glob("*.py")
        for found in re.findall(r"^(?:from|import) ([a-z]\w*)", path.read_text(encoding="utf-8"), re.MULTILINE)
    }

    installed = {*shlex.split(install), "sqlalchemy", "pydantic", "jobq"}  # the last three come with jobq
    standard = {"__future__", "os", "collections", "contextlib", "dataclasses", "email"}
    assert imported - standard <= installed
    assert {"uvicorn", "aiosmtpd"} <= installed, "what docker-compose.yml starts"
