"""How the scripts get an environment, with tiny packages from a folder, a stand-in for uv, and no network."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent

# Writes down how it was called, does with pip what uv would do, and can be told to misbehave.
STAND_IN_FOR_UV = """#!python
import json, os, pathlib, subprocess, sys, time
settings = {name: value for name, value in os.environ.items() if name.startswith("UV_")}
with open("uv_said.txt", "a") as said:
    said.write(json.dumps({"args": sys.argv[1:], "env": settings}) + "\\n")
if os.environ.get("FAKE_UV") == "fails":
    sys.exit("no space for uv")
rest = sys.argv[sys.argv.index("--python") + 2 :]
status = subprocess.call([sys.executable, "-m", "pip", "install", "-q", *rest])
(file,) = pathlib.Path(".venv").glob("lib/python*/site-packages/tinypkg/__init__.py")
if os.environ.get("FAKE_UV") == "damages" and "UV_NO_CACHE" not in os.environ:
    file.write_text("")
if os.environ.get("FAKE_UV") == "hangs":
    file.write_text("version = ")
    while not os.path.exists("go_on"):
        time.sleep(0.05)
    file.write_text("version = '1.0'\\n")
sys.exit(status)
"""


def write_wheel(folder, name, version, files):
    info = f"{name}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in {**files, f"{info}/RECORD": record + f"{info}/RECORD,,\n"}.items():
            entry = zipfile.ZipInfo(path)
            entry.external_attr = (0o100755 if "/scripts/" in path else 0o100644) << 16
            wheel.writestr(entry, text)


@pytest.fixture(scope="module")
def empty_venv(tmp_path_factory):
    """Making one takes seconds, copying it does not."""
    folder = tmp_path_factory.mktemp("made") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def project(bare_project, empty_venv):
    """The project with a .venv in which nothing is installed yet."""
    shutil.copytree(empty_venv, bare_project / ".venv", symlinks=True)
    (bare_project / ".venv" / "made_by_scripts").touch()
    return bare_project


@pytest.fixture
def bare_project(tmp_path):
    """A project that needs tinypkg (1.0 by constraints.txt, 2.0 is the newest) and, for its tests, tinydev. No uv."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for version in ("1.0", "2.0"):
        write_wheel(wheels, "tinypkg", version, {"tinypkg/__init__.py": f"version = '{version}'\n"})
    write_wheel(wheels, "tinydev", "1.0", {"tinydev/__init__.py": ""})
    (tmp_path / "requirements.txt").write_text("tinypkg>=1\n")
    (tmp_path / "requirements-dev.txt").write_text("-r requirements.txt\ntinydev\n")
    (tmp_path / "constraints.txt").write_text("tinypkg==1.0\n")
    (tmp_path / "use.sh").write_text(
        "set -euo pipefail\nsource scripts/environment.sh\n"
        'use_environment "$@"\n"$PYTHON" -c "import tinypkg, sys; print(\'has\', tinypkg.version, sys.prefix)"\n'
    )
    return tmp_path


def give_uv(project):
    write_wheel(project / "wheels", "uv", "1.0", {"uv-1.0.data/scripts/uv": STAND_IN_FOR_UV})


def start(project, *what, **variables):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    environment |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "wheels"}
    environment |= {"PYTHON": sys.executable, **variables}
    environment.pop("LATEST", None) if "LATEST" not in variables else None
    return subprocess.Popen(
        ["bash", "use.sh", *(what or ("requirements.txt", "tinypkg"))], cwd=project, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def use(project, *what, **variables):
    """Status, and all that was said."""
    process = start(project, *what, **variables)
    out, err = process.communicate(timeout=300)
    return process.returncode, out + err


def wait_for(path, what=""):
    deadline = time.monotonic() + 120
    while not (path.exists() and what in path.read_text()):
        assert time.monotonic() < deadline, path
        time.sleep(0.05)


def test_what_is_installed_is_remembered_and_tests_bring_what_the_toolkit_needs(project):
    dev = ("requirements-dev.txt", "tinypkg", "tinydev")
    status, said = use(project, *dev)
    assert status == 0 and f"has 1.0 {project}/.venv" in said, said
    assert "uv cannot be had" in said and "installed in" in said
    has = f"has 1.0 {project}/.venv\n"
    assert use(project, *dev) == (0, has)
    assert use(project) == (0, has)
    # Every file that decides what is installed counts.
    (project / "constraints.txt").write_text("tinypkg==2.0\n")
    status, said = use(project)
    assert status == 0 and "installing requirements.txt" in said and "has 2.0" in said
    assert use(project) == (0, has.replace("1.0", "2.0"))
    # A .venv whose Python was removed from the machine is made again.
    for link in (project / ".venv" / "bin").glob("python*"):
        link.unlink()
        link.symlink_to("/nowhere/python3")
    status, said = use(project)
    assert status == 0 and "made again" in said and "has 2.0" in said


def test_latest_takes_the_newest_and_without_it_the_constraints_hold_again(project):
    assert "has 1.0" in use(project)[1]
    status, said = use(project, LATEST="1")
    assert status == 0 and "installing requirements.txt in the newest versions" in said and "has 2.0" in said
    assert use(project, LATEST="1") == (0, f"has 2.0 {project}/.venv\n")
    status, said = use(project, LATEST="0")
    assert status == 0 and "in the versions of constraints.txt" in said and "has 1.0" in said
    status, said = use(project, LATEST="yes")
    assert status == 1 and "LATEST is 'yes'" in said and "Traceback" not in said


def test_a_version_that_cannot_be_had_is_told_with_the_way_out(project):
    (project / "constraints.txt").write_text("tinypkg==9.0\n")
    status, said = use(project)
    assert status == 1 and "tinypkg" in said and "LATEST=1" in said and "has" not in said.split()
    assert "Traceback" not in said and len(said.splitlines()) < 30
    status, said = use(project, LATEST="1")
    assert status == 0 and "has 2.0" in said
    assert use(project)[0] == 1  # and nothing of the failed try is taken for an environment


def test_uv_is_told_where_pip_takes_packages_from(project):
    give_uv(project)
    config = project / "pip.conf"
    config.write_text(
        "[global]\nindex-url = file:///nowhere/simple\nfind-links = wheels elsewhere\n[install]\ntimeout = 7\n"
    )
    status, said = use(project, PIP_CONFIG_FILE=str(config), PIP_EXTRA_INDEX_URL="file:///a file:///b", UV_INDEX="mine")
    assert status == 0 and "has 1.0" in said and "taking pip" not in said, said
    told = json.loads((project / "uv_said.txt").read_text())
    assert told["args"] == [
        "pip", "install", "--python", ".venv/bin/python", "-r", "requirements.txt", "-c", "constraints.txt",
    ]  # fmt: skip
    wanted = {
        "UV_DEFAULT_INDEX": "file:///nowhere/simple",
        "UV_INDEX": "mine",  # what is said to uv itself counts
        "UV_FIND_LINKS": "wheels",  # the variable counts more than the file
        "UV_NO_INDEX": "1",
        "UV_HTTP_TIMEOUT": "7",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
    }
    assert {name: told["env"].get(name) for name in wanted} == wanted


def test_where_uv_fails_pip_installs(project):
    give_uv(project)
    status, said = use(project, FAKE_UV="fails")
    assert status == 0 and "uv failed (no space for uv); trying pip" in said and "has 1.0" in said
    # Also where it was made for another machine and cannot even be started.
    (project / "constraints.txt").write_text("tinypkg==2.0\n")
    (project / ".venv" / "bin" / "uv").chmod(0o644)
    status, said = use(project)
    assert status == 0 and "Permission denied" in said and "trying pip" in said and "has 2.0" in said


def test_an_install_that_was_killed_is_not_taken_for_a_whole_one(project):
    give_uv(project)
    process = start(project, FAKE_UV="hangs")
    wait_for(project / "uv_said.txt")
    (package,) = wait_for_glob(project, "tinypkg/__init__.py")
    wait_for_text(package, "version = ")
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    # Also where the half .venv is active, and has every module by name.
    status, said = use(project, PYTHON=str(project / ".venv" / "bin" / "python"))
    assert status == 0 and "was cut off" in said and "another command" not in said, said
    assert f"has 1.0 {project}/.venv" in said
    assert not list(project.glob(".venv.aside*"))
    assert use(project) == (0, f"has 1.0 {project}/.venv\n")


def wait_for_glob(project, pattern):
    deadline = time.monotonic() + 120
    while not (found := list(project.glob(f".venv/lib/python*/site-packages/{pattern}"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def wait_for_text(path, text):
    deadline = time.monotonic() + 120
    while path.read_text() != text:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_persons_own_venv_is_never_deleted(bare_project):
    project = bare_project
    venv = project / ".venv"
    venv.mkdir()
    (venv / "pyvenv.cfg").write_text("home = /nowhere\n")
    (venv / "mine").write_text("work of years")
    status, said = use(project)
    assert status == 0 and "not made by this script" in said and "has 1.0" in said
    (aside,) = project.glob(".venv.aside-*")
    assert (aside / "mine").read_text() == "work of years"


def test_two_at_once_install_once(project):
    give_uv(project)
    first = start(project, FAKE_UV="hangs")
    wait_for(project / "uv_said.txt")
    with (project / "second.txt").open("w") as said:
        environment = {**os.environ, "PYTHON": sys.executable}
        second = subprocess.Popen(
            ["bash", "use.sh", "requirements.txt", "tinypkg"], cwd=project, env=environment, stdout=said, stderr=said
        )
        wait_for(project / "second.txt", "another command is installing into .venv")
        assert second.poll() is None
        (project / "go_on").touch()
        assert second.wait(timeout=120) == 0
    assert first.communicate(timeout=120)[0].endswith(f"has 1.0 {project}/.venv\n")
    assert (project / "second.txt").read_text().endswith(f"has 1.0 {project}/.venv\n")
    assert len((project / "uv_said.txt").read_text().splitlines()) == 1


def test_a_package_file_that_a_power_cut_emptied_is_seen(project):
    give_uv(project)
    status, said = use(project, FAKE_UV="damages")
    assert status == 0 and "tinypkg/__init__.py was not written as it should be" in said and "has 1.0" in said, said
    assert len((project / "uv_said.txt").read_text().splitlines()) == 2


def test_a_python_that_does_not_suit_is_named(bare_project):
    project = bare_project
    old = project / "old_python"
    old.write_text(
        f'#!/bin/sh\nexec {sys.executable} -c \'import sys\nsys.version_info = (3, 9, 1)\nsys.version = "3.9.1 (old)"\n'
        'exec(sys.stdin.read())\' "$@"\n'
    )
    old.chmod(0o755)
    status, said = use(project, PYTHON=str(old))
    assert status == 1 and "Python 3.10 or newer is needed, this is 3.9.1" in said and "PYTHON=" in said
    status, said = use(project, PYTHON="no_such_python")
    assert status == 1 and "no_such_python not found" in said
    assert not (project / ".venv").exists()


def test_an_active_environment_that_has_everything_is_used_as_it_is(bare_project):
    project = bare_project
    (project / "tinypkg.py").write_text("version = 'active'\n")
    assert use(project, PYTHONPATH=str(project)) == (0, f"has active {sys.prefix}\n")
    assert not (project / ".venv").exists()


def test_constraints_pin_every_requirement_for_every_python():
    def name(text):
        return re.sub(r"[-_.]+", "-", Requirement(text).name).lower()

    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pins.setdefault(name(line), []).append(Requirement(line))
    assert all(str(pin.specifier).startswith("==") for several in pins.values() for pin in several)
    for file in ("requirements.txt", "requirements-dev.txt", "requirements-web.txt"):
        for line in (ROOT / file).read_text().splitlines():
            if not line or line.startswith(("#", "-r")):
                continue
            for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
                where = {"python_version": python, "python_full_version": f"{python}.0"}
                (pin,) = [pin for pin in pins[name(line)] if pin.marker is None or pin.marker.evaluate(where)]
                version = str(pin.specifier).removeprefix("==")
                assert Requirement(line).specifier.contains(version), (line, python)
