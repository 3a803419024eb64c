"""What would be uploaded: the sdist and the wheel made from it, with metadata that an index takes,
installed by pipx with nothing of the repository in reach (make test-integrations installs pipx).
"""

import os
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

import pytest

import agent_r1
from tests import ROOT

pytestmark = pytest.mark.integration


def run(*command, cwd, **environment):
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist, and the wheel that is made from it and not from the working tree."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT)
    (sdist,) = folder.glob("*.tar.gz")
    run(
        *(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"),
        *("-w", folder, sdist),
        cwd=folder,
    )
    (wheel,) = folder.glob("*.whl")
    return sdist, wheel


def test_the_metadata_are_taken(built):
    said = run(sys.executable, "-m", "twine", "check", "--strict", *built, cwd=built[0].parent)
    assert said.count("PASSED") == 2


def test_the_sdist_holds_what_is_tracked_and_the_wheel_the_package(built):
    sdist, wheel = built
    tracked = set(run("git", "ls-files", cwd=ROOT).split("\n")) - {""}
    left_out = {n for n in tracked if n.startswith((".ci/", ".pre-commit"))} | {"recipes"}  # a link
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert tracked - left_out - held == set()
    names = zipfile.ZipFile(wheel).namelist()
    package = {n for n in names if ".dist-info/" not in n}
    assert package == {n for n in tracked if n.startswith("agent_r1/")}
    assert wheel.stat().st_size < 8 * 2**20


def test_pipx_installs_it_and_all_of_it_works_away_from_the_repository(built, tmp_path):
    home = {
        "HOME": str(tmp_path / "home"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "PIPX_HOME": str(tmp_path / "pipx"),
        "PIPX_BIN_DIR": str(tmp_path / "bin"),
        "PIP_CONSTRAINT": str(ROOT / "constraints.txt"),
        "PYTHONPATH": "",
    }
    run(sys.executable, "-m", "pipx", "install", "--quiet", built[1], cwd=tmp_path, **home)
    python = tmp_path / "pipx" / "venvs" / "agent-r1" / "bin" / "python"
    where = run(python, "-c", "import agent_r1; print(agent_r1.__file__)", cwd=tmp_path, **home)
    assert tmp_path in Path(where.strip()).parents

    def command(*words, cwd=tmp_path):
        return run(tmp_path / "bin" / "agent-r1", *words, cwd=cwd, **home)

    assert agent_r1.__version__ in command("--version")
    assert "ok: deterministic" in command("check", "hopworld")
    small = ("--train.iterations", "1", "--train.tasks", "2", "--evaluation.every", "0")
    command("train", "hopworld", "--run", "runs/one", *small)
    assert "1/1/1" in command("episodes", "runs/one")
    command("diagnose", "runs/one")
    command("new", "shop")
    assert "ok: the scorer accepts" in command("check", "recipe.toml", cwd=tmp_path / "shop")
    assert "learner.lr" in command("keys", "learner")

    view = [tmp_path / "bin" / "agent-r1", "view", "--no-browser", "--port", "0"]
    with subprocess.Popen(
        view, cwd=tmp_path, env=os.environ | home, stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            address = next(line for line in server.stdout if "http://" in line)
            address = "http://" + address.partition("http://")[2].split()[0]
            with urllib.request.urlopen(address) as page:
                assert "view.js" in page.read().decode()
        finally:
            server.terminate()
