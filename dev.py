"""Run jobq's demo, tests and benchmarks where there is only Python and pip: `python3 dev.py demo`.

Owns the environment they run in: `.venv` beside this file or, where that cannot be, one in the user's cache.
Invariant: the stamp is completed last, so what was interrupted, moved or is out of date is made again; and an
environment that something else made is never touched.
Standard library only, and no syntax newer than Python 3.6, so that an older Python can say what is wrong.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent
OLDEST_PYTHON = (3, 11)
OLDEST_PIP = (22, 3)  # the first with --python
STAMP = "jobq-dev.json"
LOCK = "jobq-dev.lock"
USAGE = """usage: python3 dev.py demo  [arguments of `jobq demo`]
       python3 dev.py test  [arguments of pytest]
       python3 dev.py bench [arguments of the benchmarks]
       python3 dev.py reference  (writes docs/cli.md)
       python3 dev.py mutants [NAME ...]  (breaks rules in a copy: which tests notice?)
       python3 dev.py chaos [--seconds N] [--seed S] [--faults A,B]"""
EXTRAS = ("demo", "dev", "bench")  # each holds those before it
# command: the extra of pyproject.toml it needs, the program in the environment, its first arguments
COMMANDS = {
    "demo": ("demo", "jobq", ["demo"]),
    "test": ("dev", "python", ["-m", "pytest", "-n", "auto", "--maxprocesses", "4"]),
    "bench": ("bench", "python", ["-m", "benchmarks"]),
    "chaos": ("dev", "python", ["-m", "tests.chaos"]),
    "reference": ("dev", "python", ["-m", "tests.reference"]),
    "mutants": ("dev", "python", ["-m", "tests.mutants"]),
}


def main(arguments: list) -> None:
    """Make the environment ready and become the command."""
    if not arguments or arguments[0] not in COMMANDS:
        sys.exit(USAGE)
    extra, program, first = COMMANDS[arguments[0]]
    environment = Environment(choose_directory())
    environment.make_ready(extra)
    os.chdir(str(ROOT))
    path = str(environment.directory / "bin" / program)
    os.execve(path, [path, *first, *arguments[1:]], environment.variables())


class Environment:
    """A virtual environment with jobq installed from this checkout.

    1. A stamp inside says what it was made from. When all of that still holds, nothing is done.
    2. Otherwise only the directory is stamped, jobq is installed, and then the stamp is completed.
    3. Stamped with the directory alone, moved, or of another Python: it is emptied first.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.python = directory / "bin" / "python"

    def make_ready(self, extra: str) -> None:
        """Install jobq with the extra, unless it is there."""
        if self.is_ready(extra):
            return
        self.directory.mkdir(mode=0o755, parents=True, exist_ok=True)
        with self.locked():
            if self.is_ready(extra):  # another dev.py made it while this one waited
                return
            say(f"Setting up {self.directory} (once, and again when pyproject.toml has changed)")
            stamp = self.read_stamp()
            if covers(stamp.get("extra"), extra):
                extra = stamp["extra"]
            is_usable = stamp == dict(self.wanted(stamp.get("extra")), pyproject=stamp.get("pyproject"))
            self.write_stamp({"directory": str(self.directory)})
            # Crash here, or in what follows: the stamp is incomplete, so all of it is made again.
            if not is_usable:
                self.create()
            run([*installer(self.python), "--editable", f"{ROOT}[{extra}]"], self.variables())
            self.write_stamp(self.wanted(extra))

    def is_ready(self, extra: str) -> bool:
        stamp = self.read_stamp()
        return covers(stamp.get("extra"), extra) and stamp == self.wanted(stamp["extra"])

    def wanted(self, extra) -> dict:
        """The stamp of an environment that is up to date."""
        return {
            "directory": str(self.directory),
            "checkout": str(ROOT),
            "pyproject": hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest(),
            "python": self.python_version(),
            "extra": extra,
        }

    def create(self) -> None:
        """Make it empty, and without pip in it: Debian's Python cannot put one there."""
        if Path(sys.prefix).resolve() == self.directory:
            sys.exit(f"{self.directory} must be made again: run dev.py by another Python than its own.")
        if importlib.util.find_spec("venv") is None:
            sys.exit("This Python has no `venv` module: install it (Debian, Ubuntu: apt install python3).")
        for path in self.directory.iterdir():
            if path.name in (STAMP, LOCK):
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(str(path))
            else:
                path.unlink()
        run([sys.executable, "-m", "venv", "--without-pip", str(self.directory)], self.variables())

    def python_version(self) -> str:
        """The version of the environment's Python as it runs now, empty when it does not."""
        ask = [str(self.python), "-I", "-S", "-c", "import sys; print(sys.version)"]
        try:
            asked = subprocess.run(ask, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True)
        except (OSError, subprocess.CalledProcessError):
            return ""
        return asked.stdout.decode()

    def read_stamp(self) -> dict:
        try:
            return json.loads((self.directory / STAMP).read_text())
        except (OSError, ValueError):
            return {}

    def write_stamp(self, stamp: dict) -> None:
        unfinished = self.directory / (STAMP + ".new")
        unfinished.write_text(json.dumps(stamp))
        unfinished.replace(self.directory / STAMP)

    @contextmanager
    def locked(self):
        """Let one dev.py at a time set it up."""
        import fcntl  # not on Windows, which main() is not reached on

        with (self.directory / LOCK).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.set_inheritable(lock.fileno(), True)  # a pip that outlives a killed dev.py still holds it
            yield

    def variables(self) -> dict:
        """The process environment of what runs in it."""
        found = {name: value for name, value in os.environ.items() if name != "PYTHONHOME"}
        found["VIRTUAL_ENV"] = str(self.directory)
        found["PATH"] = os.pathsep.join([str(self.directory / "bin"), found.get("PATH", os.defpath)])
        found["PIP_USER"] = "0"  # a user's own pip.conf may ask for what no virtual environment can do
        found["PIP_ROOT_USER_ACTION"] = "ignore"
        found["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
        if not os.access(str(ROOT), os.W_OK):  # the tools' caches cannot be where they are by default
            caches = self.directory / "caches"
            found["PYTEST_ADDOPTS"] = f"{found.get('PYTEST_ADDOPTS', '')} -o 'cache_dir={caches / 'pytest'}'"
            found["HYPOTHESIS_STORAGE_DIRECTORY"] = str(caches / "hypothesis")
            found["MYPY_CACHE_DIR"] = str(caches / "mypy")
            found["RUFF_CACHE_DIR"] = str(caches / "ruff")
        return found


def covers(installed, extra: str) -> bool:
    """Tell whether all of one extra is there when another is."""
    return installed in EXTRAS and EXTRAS.index(installed) >= EXTRAS.index(extra)


def choose_directory() -> Path:
    """`.venv` here if it is ours to make or to renew, else the user's cache, else the temporary directory."""
    name = "jobq-" + hashlib.sha256(str(ROOT).encode()).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    temporary = Path(tempfile.gettempdir()) / f"dev-{os.geteuid()}-{name}"
    places = [ROOT / ".venv", cache / "dev" / name, temporary]
    for directory in places:
        if is_ours(directory):
            if directory != places[0]:
                say(f"{places[0]} is read-only, or of another tool or user: using {directory}")
            return directory
    return sys.exit("No place for an environment: {} must be writable.".format(" or ".join(map(str, places))))


def is_ours(directory: Path) -> bool:
    """Tell whether the directory can be made, or is this user's and was made (or will be) by dev.py."""
    if not directory.is_symlink() and not directory.exists():
        above = next(path for path in directory.parents if path.exists())
        return os.access(str(above), os.W_OK | os.X_OK)
    is_own = directory.is_dir() and directory.lstat().st_uid == os.geteuid()
    if not is_own or not os.access(str(directory), os.W_OK | os.X_OK):
        return False
    return (directory / STAMP).exists() or not set(os.listdir(str(directory))) - {LOCK, STAMP + ".new"}


def installer(python: Path) -> list:
    """The beginning of a command that installs into the environment of this Python."""
    if importlib.util.find_spec("pip") and pip_version() >= OLDEST_PIP:
        return [sys.executable, "-m", "pip", "--python", str(python), "install", "-qq"]
    if shutil.which("uv"):
        return ["uv", "pip", "install", "--python", str(python), "--quiet"]
    if importlib.util.find_spec("ensurepip"):
        run([str(python), "-m", "ensurepip", "--default-pip"], dict(os.environ), stdout=subprocess.DEVNULL)
        return [str(python), "-m", "pip", "install", "-qq"]
    return sys.exit(
        "There is neither pip 22.3 or newer for this Python nor uv: install one of them"
        " (Debian, Ubuntu: apt install python3-pip)."
    )


def pip_version() -> tuple:
    import pip

    return tuple(int(part) for part in pip.__version__.split(".")[:2] if part.isdigit())


def run(command: list, variables: dict, stdout=None) -> None:
    if subprocess.call(command, env=variables, stdout=stdout, close_fds=False) != 0:
        sys.exit("dev.py: this command failed: " + " ".join(command))


def say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def check_python() -> None:
    """End with a sentence where jobq cannot run."""
    if os.name != "posix":
        sys.exit("dev.py starts PostgreSQL and Valkey for Linux or macOS: on Windows, use WSL.")
    if sys.version_info >= OLDEST_PYTHON:
        return
    newer = [name for name in (f"python3.{minor}" for minor in range(11, 20)) if shutil.which(name)]
    remedy = f"run `{newer[-1]} dev.py`" if newer else "install one, and run dev.py with it"
    sys.exit(
        "jobq needs Python {}.{} or newer, and this is Python {}.{}: {}.".format(
            *OLDEST_PYTHON, *sys.version_info[:2], remedy
        )
    )


if __name__ == "__main__":
    check_python()
    try:
        main(sys.argv[1:])
    except KeyboardInterrupt:
        sys.exit(130)
