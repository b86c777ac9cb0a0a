"""The process between jobq and one server: it starts the server, passes signals on, and ends it after jobq.

Run as a script, by path, with the standard library only. Invariant: no server outlives its owner.
The owner's end shows as the end of stdin or, where a fork of the owner still holds that pipe, as another
parent. The keeper's own end, by SIGKILL too, the kernel tells the server (Linux). That notice is bound to the
thread that forked: here a main thread, which lives as long as its process; in jobq itself it could be any.

    keeper.py OWNER_PID UID GID LAST_SIGNAL PROGRAM [ARGUMENT ...]
    stdin    one byte per signal to send        stdout    the server's pid        stderr    the server's log
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import threading
import time

PR_SET_PDEATHSIG = 1
OWNER_CHECK_S = 1.0
LAST_SIGNAL_S = 5.0


def start(command: list[str], uid: int, gid: int, last_signal: int) -> "subprocess.Popen[bytes]":
    keeper = os.getpid()
    prctl = ctypes.CDLL(None).prctl if sys.platform == "linux" else None

    def die_with_keeper() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, last_signal)
        if os.getppid() != keeper:
            os._exit(1)  # the keeper died before the kernel knew what to do about it

    return subprocess.Popen(  # noqa: S603  # our owner's own command
        command,
        user=uid if uid >= 0 else None,
        group=gid if gid >= 0 else None,
        extra_groups=[] if uid >= 0 else None,
        stdin=subprocess.DEVNULL,
        stdout=2,
        cwd="/",
        close_fds=False,  # the locks of its directories stay held for as long as the server lives
        preexec_fn=die_with_keeper,  # runs after the change of user, which would undo it
    )


def obey(server: "subprocess.Popen[bytes]", owner: int, last_signal: int) -> None:
    """Send the server what stdin says, until the owner is gone; then end it."""
    while os.getppid() == owner:
        if select.select([0], [], [], OWNER_CHECK_S)[0]:
            orders = os.read(0, 64)
            if not orders:
                break
            for order in orders:
                server.send_signal(order)
    server.send_signal(last_signal)
    server.send_signal(signal.SIGCONT)
    time.sleep(LAST_SIGNAL_S)
    server.kill()


def main() -> int:
    owner, uid, gid, last_signal = map(int, sys.argv[1:5])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the server would inherit
    server = start(sys.argv[5:], uid, gid, last_signal)
    os.write(1, b"%d\n" % server.pid)
    threading.Thread(target=obey, args=(server, owner, last_signal), daemon=True).start()
    return server.wait()


if __name__ == "__main__":
    os._exit(main() & 0xFF)
