"""The source itself: style, types, layers, the headers of SQL and Lua, and what the wheel carries."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import jobq

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "jobq"
REFUSED = ROOT / "tests" / "typing" / "refused.py"
ACCEPTED = ROOT / "tests" / "typing" / "accepted.py"
PLUGIN = ROOT / "jobq_pytest.py"
SQL = sorted((PACKAGE / "outbox" / "sql").glob("*.sql"))
LUA = sorted((PACKAGE / "broker" / "lua").glob("*.lua"))
MARK = "  # refused"


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a tool of this environment on the checkout."""
    return subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False, timeout=390
    )


# Style and layers


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_finds_nothing(command):
    done = run("ruff", *command, ".")

    assert done.returncode == 0, done.stdout + done.stderr


def test_the_layers_are_kept():
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_says_what_it_is(path):
    source = path.read_text()

    if source.strip():
        summary = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
        assert summary.endswith((".", ":")), "the first line of the docstring is one sentence"


# Types


@pytest.fixture
def refused(tmp_path: Path) -> Path:
    """A copy of the refused calls, which no configuration leaves out."""
    copy = tmp_path / "refused_calls.py"
    copy.write_text(REFUSED.read_text())
    return copy


def expected_lines() -> set[int]:
    lines = {number for number, line in enumerate(REFUSED.read_text().splitlines(), 1) if line.endswith(MARK)}
    assert len(lines) > 70
    return lines


def assert_refused_where_marked(errors: list[tuple[str, int, str]], refused: Path) -> None:
    """`errors` are of (file, line, message)."""
    elsewhere = [error for error in errors if Path(error[0]).name != refused.name]
    assert elsewhere == []
    source = ["", *refused.read_text().splitlines()]
    found = {line for _, line, _ in errors}
    assert [source[line] for line in sorted(expected_lines() - found)] == [], "accepted, and should not be"
    assert [source[line] for line in sorted(found - expected_lines())] == [], "refused, and should not be"


@pytest.mark.timeout(400)  # on two busy cores, with nothing cached
def test_mypy_accepts_the_package_and_right_calls_and_refuses_wrong_ones(refused):
    done = run("mypy", "--strict", "--output", "json", str(PACKAGE), str(PLUGIN), str(ACCEPTED), str(refused))

    assert done.returncode in (0, 1), done.stdout + done.stderr
    findings = [json.loads(line) for line in done.stdout.splitlines()]
    errors = [(found["file"], found["line"], found["message"]) for found in findings if found["severity"] == "error"]
    assert_refused_where_marked(errors, refused)


@pytest.mark.timeout(400)  # on two busy cores, with nothing cached
def test_pyright_accepts_the_package_and_right_calls_and_refuses_wrong_ones(refused):
    done = run(
        "pyright",
        "--pythonpath",
        sys.executable,
        "--outputjson",
        str(PACKAGE),
        str(PLUGIN),
        str(ACCEPTED),
        str(refused),
    )

    assert done.returncode in (0, 1), done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] > 50
    errors = [
        (found["file"], found["range"]["start"]["line"] + 1, found["message"])
        for found in report["generalDiagnostics"]
        if found["severity"] == "error"
    ]
    assert_refused_where_marked(errors, refused)


# SQL and Lua


def header_of(lines: list[str]) -> str:
    """The comment that a file begins with, as one text."""
    comment: list[str] = []
    for line in lines:
        if not line.startswith("--"):
            break
        comment.append(line.removeprefix("--").strip())
    return "\n".join(comment)


def test_there_are_sql_and_lua_files():
    assert len(SQL) > 15
    assert len(LUA) > 5


@pytest.mark.parametrize("path", SQL, ids=lambda path: path.name)
def test_an_sql_file_begins_with_a_sentence_and_is_one_statement(path):
    lines = path.read_text().splitlines()
    header = header_of(lines)
    body = "\n".join(line for line in lines if not line.startswith("--"))

    assert re.match(r"[A-Z].*\.$", header, re.DOTALL)
    assert ";" not in body
    assert "::" not in body, "write CAST(... AS type): parsers of parameters read :: otherwise"


@pytest.mark.parametrize("path", SQL, ids=lambda path: path.name)
def test_an_sql_file_is_used(path):
    users = "".join(module.read_text() for module in (PACKAGE / "outbox").glob("*.py"))

    assert f'Statement("{path.stem}")' in users


def numbers_used(code: str, name: str) -> set[int]:
    return {int(number) for number in re.findall(rf"\b{name}\[(\d+)\]", code)}


def numbers_described(header: str, name: str) -> set[int]:
    return {int(number) for number in re.findall(rf"^{name}\[(\d+)", header, re.MULTILINE)}


def ranges_described(header: str, name: str) -> set[int]:
    """Where `NAME[n..]` or `NAME[n..m]` begin."""
    return {int(number) for number in re.findall(rf"^{name}\[(\d+)\S* ?\.\.", header, re.MULTILINE)}


@pytest.mark.parametrize("path", LUA, ids=lambda path: path.name)
def test_a_lua_file_says_what_it_does_takes_and_returns(path):
    lines = path.read_text().splitlines()
    header = header_of(lines[1:])
    code = "\n".join(line.partition("--")[0] for line in lines[1:])

    assert re.fullmatch(r"#!lua( flags=[a-z,-]+)?", lines[0])
    assert re.match(r"[A-Z].*?\.$", header, re.MULTILINE | re.DOTALL)
    assert re.search(r"^Returns ", header, re.MULTILINE)
    for name in ("KEYS", "ARGV"):
        used, described = numbers_used(code, name), numbers_described(header, name)
        ranges = ranges_described(header, name)
        assert used <= described, f"{name} that the header does not describe"
        assert described - ranges <= used, f"{name} that the header describes and nobody uses"
        if re.search(rf"{name}\[[a-z]|#{name}", code):
            assert ranges, f"the header describes no {name}[n..]"
        computed = {int(number) + 1 for number in re.findall(rf"{name}\[(\d+) \+ ", code)}
        assert computed <= ranges | described
    for line in header.splitlines():
        if re.match(r"KEYS\[\d+\] ", line):
            assert re.search(r"\((STRING|LIST|HASH|SET)\)", line), f"without its type: {line}"


@pytest.mark.parametrize("path", LUA, ids=lambda path: path.name)
def test_a_lua_file_is_used(path):
    assert f'"{path.stem}"' in (PACKAGE / "broker" / "scripts.py").read_text()


@pytest.mark.parametrize("name", ["fetch", "beat", "ack", "release", "sweep"])
def test_what_drains_a_full_redis_is_allowed_to(name):
    first = (PACKAGE / "broker" / "lua" / f"{name}.lua").read_text().partition("\n")[0]

    assert first == "#!lua flags=allow-oom"


# The wheel


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    done = run("build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT))
    assert done.returncode == 0, done.stdout + done.stderr
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def files_below(folder: Path) -> set[str]:
    """Their paths in the folder, without what running leaves behind."""
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_holds_the_whole_package_the_migrations_and_the_shop_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}

    expected = {f"jobq/{name}" for name in files_below(PACKAGE)}
    expected |= {f"jobq/migrations/{name}" for name in files_below(ROOT / "migrations")}
    expected |= {f"jobq/examples/shop/{name}" for name in files_below(ROOT / "examples" / "shop")}
    assert names == expected | {"jobq_pytest.py"}
    assert {
        "jobq/py.typed",
        "jobq/outbox/sql/enqueue.sql",
        "jobq/broker/lua/push.lua",
        "jobq/migrations/env.py",
        "jobq/migrations/versions/jobq_0001_tables.py",
        "jobq/examples/shop/jobs.py",
    } <= names


def test_the_wheel_says_its_version_its_licence_and_its_command(wheel):
    meta = {name.partition(".dist-info/")[2]: wheel.read(name).decode() for name in wheel.namelist() if ".dist" in name}

    assert f"\nVersion: {jobq.__version__}\n" in meta["METADATA"]
    assert "\nLicense-Expression: MIT\n" in meta["METADATA"]
    assert "jobq = jobq.cli:main" in meta["entry_points.txt"]
    assert "[pytest11]\njobq = jobq_pytest\n" in meta["entry_points.txt"]
    assert "MIT License" in meta["licenses/LICENSE"]
