"""Processes that jobq starts and looks after: those of `jobq worker --processes N`, and the one of `jobq dev`.

    supervisor   keeps N workers running; a script of its own, into which `jobq worker` turns
    reload       one process after another, each until the code has changed
    children     a process that either of them started, and its end of the line to it
    supervised   the line in that process: orders come in, notices go out

Invariant: what was started here ends with what started it, by SIGKILL too. Called by run, serving and dev. Calls logs.
"""
