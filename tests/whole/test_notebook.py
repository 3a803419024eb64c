"""The notebook of the docs runs top to bottom (make test-integrations installs what runs it)."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = pytest.mark.integration


def test_the_notebook_runs_top_to_bottom(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="make test-integrations installs it")
    import nbformat

    folder = Path(sys.executable).parent
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")  # agent-r1 is there
    notebook = nbformat.read(ROOT / "docs" / "first_agent.ipynb", as_version=4)
    assert all(not cell.get("outputs") for cell in notebook.cells)  # stored without results
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}
    )
    client.execute()
    said = json.dumps(notebook.cells)
    assert "no findings" in said or "seen:" in said
    assert "ok: deterministic" in said and "image/png" in said
