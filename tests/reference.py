"""docs/cli.md, made from the commands themselves: `python3 dev.py reference` writes it anew.

Called by hand when commands have changed, and by the test that holds the page to them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import click

from jobq.cli import cli
from jobq.cli.failures import ExitCode

PAGE = Path(__file__).parents[1] / "docs" / "cli.md"

_EXIT_CODES = {
    ExitCode.OK: "done; a worker or relay was told to stop, and did",
    ExitCode.FAILED: "a check or a command failed",
    ExitCode.USAGE: "a wrong option, or one that is missing",
    ExitCode.APP: "APP cannot be imported, or is no JobQ",
    ExitCode.UNREACHABLE: "PostgreSQL or Redis cannot be reached",
    ExitCode.SCHEMA: "the tables are not those of this release: `jobq migrate upgrade`",
    ExitCode.FORCED: "stopped by force, or frozen for `--frozen-after` seconds: jobs that still ran run again",
    ExitCode.INTERRUPTED: "Ctrl-C, in a worker or relay the second one",
}
_HEAD = """# Commands

<!-- Made from the commands by `python3 dev.py reference`: change those, not this page. -->

`APP` is `module:attribute` of your `JobQ`, such as `shop.jobs:jobs`. The working directory is on the path.

A setting is looked up on the command line, then in the environment, then in `[tool.jobq]` of `./pyproject.toml`, then
comes the default. What the code of `APP` gives to `JobQ(...)` stands above all of them.

```toml
[tool.jobq]
app = "shop.jobs:jobs"
queues = ["mail", "default"]
concurrency = 50
```

stdout is data; stderr is logs and progress. `NO_COLOR=1` takes the colours away, `JOBQ_DEBUG=1` adds tracebacks to
failures. Secrets in URLs are shown as `***`.
"""


def render() -> str:
    """Return the page."""
    codes = "\n".join(f"| {code.value} | {_EXIT_CODES[code]} |" for code in ExitCode)
    sections = [_HEAD, f"## Exit codes\n\n| code | meaning |\n|---|---|\n{codes}\n"]
    sections += [_section(path, command) for path, command in commands()]
    return "\n".join(sections)


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command that can be seen, by how it is called, in the order of `jobq --help`."""
    yield from _below("jobq", cli)


def _below(path: str, group: click.Group) -> Iterator[tuple[str, click.Command]]:
    with click.Context(group) as ctx:
        for name in group.list_commands(ctx):
            command = group.get_command(ctx, name)
            assert command is not None
            if command.hidden:
                continue
            yield f"{path} {name}", command
            if isinstance(command, click.Group):
                yield from _below(f"{path} {name}", command)


def _section(path: str, command: click.Command) -> str:
    level = "#" * (len(path.split()))
    usage = " ".join([path, *command.collect_usage_pieces(click.Context(command, info_name=path))])
    parts = [f"{level} {path}", f"```text\n{usage}\n```", _prose(command.help or "")]
    rows = [_row(option) for option in command.params if isinstance(option, click.Option) and not option.hidden]
    if rows:
        head = "| option | meaning | default | environment | `[tool.jobq]` |\n|---|---|---|---|---|"
        parts.append("\n".join([head, *rows]))
    return "\n\n".join(parts) + "\n"


def _prose(text: str) -> str:
    """A docstring as Markdown: what follows \\b is shown as it is."""
    paragraphs = []
    for paragraph in inspect.cleandoc(text).split("\n\n"):
        marked, _, shown = paragraph.partition("\b\n")
        if not shown:
            paragraphs.append(marked)
            continue
        title, _, lines = shown.partition("\n")
        paragraphs.append(f"{title}\n\n```text\n{inspect.cleandoc(lines)}\n```")
    return "\n\n".join(paragraphs)


def _row(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in sorted(option.opts, key=len, reverse=True))
    if not option.is_flag:
        names += f" {_value(option)}"
    key = max(option.opts, key=len).removeprefix("--") if callable(option.default) else ""
    cells = (names, option.help or "", _default(option), _code(option.envvar), _code(key))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _value(option: click.Option) -> str:
    if isinstance(option.type, click.Choice) and option.metavar is None:
        return " or ".join(f"`{choice}`" for choice in option.type.choices)
    return option.metavar or option.type.name.upper()


def _default(option: click.Option) -> str:
    if isinstance(option.show_default, str):
        return option.show_default
    is_plain = isinstance(option.default, (str, int, float)) and not isinstance(option.default, bool)
    return str(option.default) if option.show_default and is_plain else ""


def _code(name: object) -> str:
    return f"`{name}`" if isinstance(name, str) and re.fullmatch(r"[\w-]+", name) else ""


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
