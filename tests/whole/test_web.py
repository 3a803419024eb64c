"""The built files of the window are those of its source (make test-integrations; needs npm)."""

import shutil
import subprocess

import pytest

from agent_r1.analysis.viewer.server import STATIC
from tests import ROOT

pytestmark = pytest.mark.integration


def test_the_built_files_are_those_of_the_source(tmp_path):
    web, static = tmp_path / "web", tmp_path / "agent_r1" / "analysis" / "viewer" / "static"
    shutil.copytree(ROOT / "web", web, ignore=shutil.ignore_patterns("node_modules"))
    static.mkdir(parents=True)
    for words in (["npm", "ci", "--no-audit", "--no-fund"], ["npm", "run", "build"]):
        subprocess.run(words, cwd=web, check=True, capture_output=True)
    built = {file.name: file.read_bytes() for file in static.iterdir()}
    assert built == {file.name: file.read_bytes() for file in STATIC.iterdir()}
    # Nothing is loaded from elsewhere, and no tool says where it came from.
    assert "resolved" not in (web / "package-lock.json").read_text()
