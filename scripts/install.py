"""Puts what a requirements file names into .venv; started by environment.sh in the project's folder, without packages.

    python3 scripts/install.py requirements.txt

Versions are those of constraints.txt, or the newest that the ranges allow with LATEST=1. A .venv that is whole is left
as it is. One that an earlier install left half done is emptied and made again, since nobody can tell which of its files
are whole; what was downloaded is in the installer's cache and not fetched twice.
"""

import ast
import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

VENV = Path(".venv")
PYTHON = VENV / "bin" / "python"
LOG = VENV / "install.log"
# Is there from before the first change until all is installed and on the disk.
UNFINISHED = VENV / "unfinished"
# Only what was made here may be deleted; a .venv that a person made may hold more than we put there.
MADE_HERE = VENV / "made_by_scripts"
CONSTRAINTS = Path("constraints.txt")

# What pip is told about where packages come from holds for uv too. pip takes the best version of all its indexes, uv by
# itself only looks into the first that knows a package, hence UV_INDEX_STRATEGY below.
UV_NAMES = {
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "no-index": "UV_NO_INDEX",
    "constraint": "UV_CONSTRAINT",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
    "timeout": "UV_HTTP_TIMEOUT",
    "default-timeout": "UV_HTTP_TIMEOUT",
}


class InstallError(Exception):
    """The install cannot be done; the message says why and what helps."""


def say(line: str) -> None:
    print(line, flush=True)


def latest() -> bool:
    value = os.environ.get("LATEST", "")
    if value not in ("", "0", "1"):
        raise InstallError(f"LATEST is {value!r}; 1 takes the newest versions, 0 or nothing those of {CONSTRAINTS}")
    return value == "1"


def with_included(requirements: Path) -> list[Path]:
    """The file and those that it includes by a line "-r FILE"."""
    lines = [line.split() for line in requirements.read_text(encoding="utf-8").splitlines()]
    included = [requirements.parent / words[1] for words in lines if len(words) == 2 and words[0] == "-r"]
    return [requirements, *(file for path in included for file in with_included(path))]


def fingerprint(requirements: Path) -> str:
    """Changes with every file that decides what is installed, and with LATEST."""
    files = sorted(with_included(requirements)) + ([] if latest() else [CONSTRAINTS])
    parts = [f"{file.name}\n{hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files]
    return hashlib.sha256("\n".join([*parts, f"latest={latest()}"]).encode()).hexdigest()


def stamp(requirements: Path) -> Path:
    return VENV / f"installed.{requirements.name}.sha256"


def is_whole(requirements: Path) -> bool:
    """True if .venv holds these requirements; of a .venv whose Python was removed from the machine nothing is left."""
    if UNFINISHED.exists() or not PYTHON.exists():
        return False
    try:
        return stamp(requirements).read_text(encoding="utf-8").strip() == fingerprint(requirements)
    except OSError:
        return False


@contextlib.contextmanager
def lock():
    """One install at a time. The system frees the lock when the last process that holds it ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # a system without such locks
        yield None
        return
    with open(".venv.lock", "a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another command is installing into .venv; waiting until it has finished …")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as problem:
            say(f"warning: .venv.lock cannot be locked ({problem}); start no second install before this has ended")
        yield file.fileno()


def run(command: list, held: int | None, environment: dict | None = None) -> bool:
    """Runs a command whose output goes to the log, and says now and then how far it is.

    The command inherits the lock: where this process is killed, an installer that works on keeps others out.
    """
    began, next_line = time.monotonic(), 15.0
    with LOG.open("a", encoding="utf-8") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment,
                pass_fds=[] if held is None else [held],
            )  # fmt: skip
        except OSError as problem:  # a program that is not made for this machine
            log.write(f"{problem}\n")
            return False
        while True:
            try:
                return process.wait(timeout=1) == 0
            except subprocess.TimeoutExpired:
                passed = time.monotonic() - began
            except KeyboardInterrupt:
                process.wait()
                raise
            if passed >= next_line:
                next_line += min(next_line, 60.0)
                say(f"  … {passed:.0f} s  {last_line()}")


def last_line() -> str:
    lines = LOG.read_text(encoding="utf-8", errors="replace").split("\n")
    printable = ("".join(c for c in line if c.isprintable()).strip() for line in reversed(lines))
    return next((line for line in printable if line), "")[:100]


def settings_for_uv() -> dict[str, str]:
    """This process's environment, and what pip's configuration files and variables say, as uv's variables.

    A variable of uv's own that is set already stays.
    """
    listed = subprocess.run(
        [PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout.splitlines()  # fmt: skip
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in listed:
        name, _, value = line.partition("=")
        section, _, key = name.partition(".")
        if section in found and value:
            with contextlib.suppress(ValueError, SyntaxError):
                found[section][key.lstrip(".")] = str(ast.literal_eval(value))
    environment = {"UV_INDEX_STRATEGY": "unsafe-best-match"}
    # As with pip: a variable counts more than [install] in a file, and that more than [global].
    for key, value in (found["global"] | found["install"] | found[":env:"]).items():
        if key in UV_NAMES and value:
            environment[UV_NAMES[key]] = (",".join if key == "find-links" else " ".join)(value.split())
    return environment | os.environ


def prepare(requirements: Path, held: int | None) -> None:
    """Leaves a .venv with pip in it, marked as unfinished."""
    cut_off = UNFINISHED.exists() or (VENV.exists() and (VENV / "pyvenv.cfg").exists() and not PYTHON.exists())
    if cut_off and not MADE_HERE.exists():
        aside = VENV.with_name(f".venv.aside-{time.strftime('%Y%m%d-%H%M%S')}")
        VENV.rename(aside)
        say(f".venv is incomplete and was not made by this script: it is now called {aside}; delete it when you like")
    elif cut_off:
        say("an earlier install was cut off: .venv is made again; what was downloaded is not fetched twice")
        empty()
    new = not VENV.exists() or not any(VENV.iterdir())
    VENV.mkdir(exist_ok=True)
    UNFINISHED.touch()
    if new:
        MADE_HERE.touch()
    for old in VENV.glob("installed.*"):
        old.unlink()
    LOG.write_text("")
    if PYTHON.exists() and run([PYTHON, "-c", "import pip"], held):
        return
    # The Python of a .venv that is being made again cannot make it; the one that made that one can.
    inside = Path(sys.prefix).resolve() == VENV.resolve()
    maker = getattr(sys, "_base_executable", sys.executable) if inside else sys.executable
    if not run([maker, "-m", "venv", VENV], held):
        sys.stderr.write(tail())
        raise InstallError(f"{maker} -m venv failed; on Debian and Ubuntu: apt-get install python3-venv")


def empty() -> None:
    """Deletes what is in .venv; the marks go on saying what it is, should this be cut off too."""
    for path in VENV.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path not in (UNFINISHED, MADE_HERE):
            path.unlink()


def tail() -> str:
    lines = LOG.read_text(encoding="utf-8", errors="replace").splitlines()
    return "".join(f"  {line}\n" for line in lines[-20:])


def install(requirements: Path, held: int | None) -> None:
    """uv first, which is several times as fast; pip where uv cannot be had or fails."""
    bounds = [] if latest() else ["-c", CONSTRAINTS]
    what = ["-r", requirements, *bounds, *(["--upgrade"] if latest() else [])]
    pip = [PYTHON, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]
    say(f"installing {requirements} {'in the newest versions' if latest() else f'in the versions of {CONSTRAINTS}'} …")
    if run([*pip, "--retries", "1", "uv", *bounds], held):
        uv = [VENV / "bin" / "uv", "pip", "install", "--python", PYTHON]
        if run([*uv, *what], held, settings_for_uv()):
            return
        say(f"uv failed ({last_line()}); trying pip, which takes longer …")
    else:
        say(f"uv cannot be had ({last_line()}); taking pip, which takes longer …")
    if not run([*pip, *what], held):
        sys.stderr.write(tail())
        raise InstallError(
            f"installing {requirements} failed, the lines above say why. The same command tries again"
            + (
                ""
                if latest()
                else f". If {CONSTRAINTS} names a version that is not made for this Python or machine, put"
            )
            + ("" if latest() else " LATEST=1 before the command: it then takes the newest versions that there are")
        )


def damaged_file() -> str | None:
    """A file of an installed package that is missing, or empty and should not be: what a power cut leaves behind."""
    site = [str(path) for path in VENV.glob("lib/python*/site-packages")]
    for distribution in importlib.metadata.distributions(path=site):
        for file in distribution.files or []:
            if not file.size or ".." in file.parts:  # programs in bin get another first line, so another size
                continue
            try:
                there = os.stat(file.locate()).st_size
            except FileNotFoundError:
                there = 0
            if not there:
                return str(file)
    return None


def finish(requirements: Path) -> None:
    # After a power cut a stamp must not be there before the files it speaks of.
    os.sync()
    for file in with_included(requirements):
        stamp(file).write_text(fingerprint(file) + "\n", encoding="utf-8")
    UNFINISHED.unlink()


def make_whole(requirements: Path, held: int | None) -> None:
    began = time.monotonic()
    say(f"setting up .venv, Python {sys.version.split()[0]}: 3 GB to load, 6 GB of disk, two minutes on a fast line …")
    prepare(requirements, held)
    install(requirements, held)
    if file := damaged_file():
        say(f"{file} was not written as it should be; once more, without the installer's cache")
        os.environ.update(UV_NO_CACHE="1", PIP_NO_CACHE_DIR="1")
        prepare(requirements, held)
        install(requirements, held)
        if file := damaged_file():
            raise InstallError(f".venv is damaged: {file} is empty or missing. Is the disk full or broken?")
    finish(requirements)
    say(f"installed in {time.monotonic() - began:.0f} s")


def main() -> int:
    requirements = Path(sys.argv[1])
    try:
        if is_whole(requirements):
            return 0
        with lock() as held:
            if not is_whole(requirements):  # another command may have done it meanwhile
                make_whole(requirements, held)
    except KeyboardInterrupt:
        print("\nstopped; the same command installs again", file=sys.stderr)
        return 130
    except (InstallError, OSError) as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
