"""What ``pip install`` brings: recipes, the tiny base, its card, in a small wheel."""

import subprocess
import sys
import zipfile

from tests import ROOT


def test_the_wheel_holds_recipes_and_the_tiny_base(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", str(ROOT), "--no-deps", "-q"]
    subprocess.run([*command, "--no-build-isolation", "-w", tmp_path], check=True)
    (wheel,) = tmp_path.glob("agent_r1-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    base = "agent_r1/assets/hopworld-base"
    files = ("config.json", "model.safetensors", "tokenizer.json", "README.md")
    assert {f"{base}/{name}" for name in files} <= names
    assert {"agent_r1/recipes/hopworld.toml", "agent_r1/py.typed"} <= names
    page = {
        f"agent_r1/analysis/viewer/static/{name}" for name in ("index.html", "view.js", "view.css")
    }
    begin = {f"agent_r1/assets/new/{name}.txt" for name in ("env.py", "recipe.toml", "test_env.py")}
    assert page | begin | {"agent_r1/assets/metrics.toml"} <= names
    assert wheel.stat().st_size < 8 * 2**20
