"""Run folders that were copied, damaged, moved or made by somebody else: gone on with, or refused,
each by a line; and nothing is lost.
"""

import json
import os
import shutil
from pathlib import Path

import pytest

import agent_r1
from agent_r1 import api
from agent_r1.analysis.explain import explain
from agent_r1.errors import ConfigError
from agent_r1.model.checkpoint_folder import model_folder
from agent_r1.run.checkpoint import Checkpoints
from agent_r1.run.folder import RunFolder
from agent_r1.run.trust import allow, code_of, must_be_allowed
from agent_r1.utils.durable import append, seal, why_damaged, write_atomically
from tests.commands import Command
from torture.common import RECIPE, numbers, project


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three iterations, and the numbers of the same one of four."""
    folder = tmp_path_factory.mktemp("made")
    recipe = project(folder / "p")
    every = {"evaluation.every": 1}
    agent_r1.train(recipe, run=folder / "run", overrides=every)
    shutil.copytree(folder / "run", folder / "longer", symlinks=True)
    api.resume(folder / "longer", iterations=4)
    return folder / "run", numbers(folder / "longer")


def copied(run, folder, **options):
    return shutil.copytree(run, folder / "copy", **{"symlinks": True} | options)


def without_links(run):
    for name in ("last", "best"):
        (run / "checkpoints" / name).unlink()


def links_as_texts(run):
    """As a checkout or an archive without links has them."""
    for name in ("last", "best"):
        path = run / "checkpoints" / name
        target = os.readlink(path)
        path.unlink()
        path.write_text(target)


def dangling(run):
    path = run / "checkpoints" / "last"
    path.unlink()
    path.symlink_to("000099")


@pytest.mark.parametrize("change", [without_links, links_as_texts, dangling])
def test_links_are_for_people_alone(made, tmp_path, change):
    run, expected = made
    copy = copied(run, tmp_path)
    change(copy)
    best = model_folder(copy, "best")
    assert best.name == model_folder(run, "best").name
    assert agent_r1.load(copy).policy.model is not None
    api.resume(copy, iterations=4)
    assert numbers(copy) == expected


def test_a_copy_that_followed_the_links_goes_on(made, tmp_path):
    run, expected = made
    copy = copied(run, tmp_path, symlinks=False)
    shutil.rmtree(copy / "checkpoints" / "000003")  # only "last" holds it now
    api.resume(copy, iterations=4)
    assert numbers(copy) == expected
    assert (copy / "checkpoints" / "last").is_symlink()


def damage(run, name, number):
    path = run / "checkpoints" / number / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.pt", "state.json"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(made, tmp_path, name, caplog):
    run, expected = made
    copy = copied(run, tmp_path)
    damage(copy, name, "000003")
    api.resume(copy, iterations=4)
    assert f"checkpoint 000003 is damaged ({name} is not as it was written)" in caplog.messages[0]
    assert numbers(copy) == expected
    kept = copy / "set-aside-2"
    assert f"kept in {kept}" in caplog.messages[0]
    assert {p.name for p in kept.iterdir()} == {"000003", "metrics.jsonl", "000003.jsonl.gz"}
    for number in ("000003", "000004"):
        damage(copy, name, number)
    with pytest.raises(ConfigError, match="Nothing was changed"):
        api.resume(copy)  # keep = 2: there is none before these


def test_a_copy_in_place_of_a_link_stands_for_a_damaged_folder(made, tmp_path, caplog):
    run, expected = made
    copy = copied(run, tmp_path, symlinks=False)
    damage(copy, "model.safetensors", "000003")
    api.resume(copy, iterations=4)
    assert "000003 is damaged" in caplog.messages[0]
    assert numbers(copy) == expected
    assert (copy / "checkpoints" / "last").resolve().name == "000004"


def test_a_kill_while_things_are_set_aside_loses_nothing(made, tmp_path, monkeypatch):
    run, expected = made
    copy = copied(run, tmp_path)
    damage(copy, "trainer.pt", "000003")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(Checkpoints, "put_aside", lambda self, folder: 1 / 0)
        api.resume(copy, iterations=4)
    api.resume(copy, iterations=4)
    assert numbers(copy) == expected
    kept = {path.name for folder in copy.glob("set-aside-2*") for path in folder.iterdir()}
    assert kept == {"000003", "metrics.jsonl", "000003.jsonl.gz"}


def test_a_folder_without_its_recipe_is_not_taken_for_a_free_one(made, tmp_path):
    copy = copied(made[0], tmp_path)
    (copy / "recipe.json").unlink()
    with pytest.raises(ConfigError, match="holds a run already"):
        agent_r1.train(project(tmp_path / "p"), run=copy)


def test_nothing_is_written_over_where_no_checkpoint_is_whole(made, tmp_path):
    copy = copied(made[0], tmp_path)
    for number in ("000002", "000003"):
        damage(copy, "model.safetensors", number)
    (copy / "checkpoints" / "000002" / "trainer.pt").unlink()
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match=r"done 3 iterations.*000002.*Nothing was changed"):
        api.resume(copy)
    shutil.rmtree(copy / "checkpoints" / "000002")
    with pytest.raises(ConfigError, match="Nothing was changed"):
        api.resume(copy)
    after = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert after.items() <= before.items()
    with pytest.raises(ConfigError, match=r"000003 is damaged: model\.safetensors is not as it"):
        agent_r1.load(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(ConfigError, match="checkpoints/ has none"):
        api.resume(copy)


def test_missing_checkpoints_and_rows_are_said(made, tmp_path, caplog):
    copy = copied(made[0], tmp_path)
    shutil.rmtree(copy / "checkpoints" / "000003")
    (copy / "trajectories" / "000001.jsonl.gz").unlink()
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text(lines[0] + "".join(lines[2:]))
    api.resume(copy, iterations=4)
    told = "\n".join(caplog.messages)
    assert "metrics.jsonl is not as it was written" in told
    assert "trajectories of 1 iterations are missing" in told


def test_two_cannot_work_on_one_run(made, tmp_path):
    copy = copied(made[0], tmp_path)
    with RunFolder(copy).locked():
        other = Command("train", "--resume", copy, "--train.iterations", 4)
        assert other.wait() == 2
        assert f"another process is at work in {copy}" in other.printed[1]
    api.resume(copy, iterations=4)


def test_settings_changed_by_hand_are_said_by_name(made, tmp_path, caplog):
    copy = copied(made[0], tmp_path)
    recipe = json.loads((copy / "recipe.json").read_text())
    recipe["seed"], recipe["learner"]["lr"] = 5, 0.5
    recipe["algorithm"]["entropy_coef"] = 0.25
    (copy / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ConfigError, match="its recipe was changed since"):
        api.resume(copy, iterations=4)
    api.resume(copy, iterations=4, trust=True)
    told = "\n".join(caplog.messages)
    assert "recipe.json: seed = 5 was 0" in told
    assert "recipe.json: learner.lr = 0.5 was " in told
    assert "recipe.json: algorithm.entropy_coef = 0.25 was 0.0" in told


def test_a_moved_environment_is_named_with_the_file_to_mend(made, tmp_path):
    copy = copied(made[0], tmp_path)
    recipe = json.loads((copy / "recipe.json").read_text())
    recipe["env"]["name"] = "/gone/tiny.py:Tiny"
    (copy / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(ConfigError, match=r"copy/recipe\.json: env: .*no file /gone/tiny\.py"):
        api.resume(copy, trust=True)


# Runs of strangers


@pytest.fixture
def strangers(tmp_path, made):
    """A run whose environment and algorithm leave a mark when they are imported."""
    folder = tmp_path / "stranger"
    mark = tmp_path / "mark"
    own = (
        "from agent_r1 import advantage\n"
        "@advantage\n"
        "def own(group):\n"
        "    return [float(n) - 0.5 for n, _ in enumerate(group)]\n"
    )
    recipe = project(folder / "p")
    (folder / "p" / "own.py").write_text(own)
    text = RECIPE.replace("{model}", str(folder / "p" / "model"))
    text = text.replace("threads = 1", 'threads = 1\nalgorithm = "own.py:own"')
    recipe.write_text(text)
    agent_r1.train(recipe, run=folder / "run")
    for name in ("tiny.py", "own.py"):
        source = folder / "p" / name
        source.write_text(source.read_text() + f"\nopen({str(mark)!r}, 'a').write({name!r})\n")
    return folder / "run", mark


def elsewhere(monkeypatch, tmp_path):
    """Another user's account."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "other"))


def test_reading_a_run_runs_nothing(strangers, monkeypatch, tmp_path):
    run, mark = strangers
    process = Command("explain", run)
    assert process.wait() == 0, process.printed
    assert "own.py:own' is code that the run names and was not run" in process.printed[0]
    assert "-0.500" in process.printed[0]
    assert not mark.exists()
    process = Command("explain", run, "--trust")
    assert process.wait() == 0, process.printed
    assert mark.read_text() == "own.py"


@pytest.mark.parametrize("command", [("eval",), ("train", "--resume"), ("export",)])
def test_what_was_not_made_here_wants_a_word(strangers, monkeypatch, tmp_path, command):
    run, mark = strangers
    elsewhere(monkeypatch, tmp_path)
    out = [tmp_path / "out"] if command == ("export",) else []
    process = Command(*command, run, *out)
    assert process.wait() == 2
    told = process.printed[1]
    assert "was not made by this account" in told
    assert "tiny.py:Tiny" in told
    assert "own.py:own" in told
    assert not mark.exists()
    process = Command(*command, run, *out, "--trust")
    assert process.wait() == 0, process.printed
    assert "tiny.py" in mark.read_text()
    assert RunFolder(run).recipe().seed == 0  # now it is known


def test_what_of_a_recipe_is_shown():
    recipe = {
        "env": {
            "name": "a:b\n/b.py:C",
            "mcp": {
                "x": {
                    "command": ["sh", "-c", "x"],
                    "headers": {"K": "$V"},
                    "env": {"LD_PRELOAD": "x.so"},
                }
            },
            "text": "a: b", "taskset": "installed", "cassette": {"path": "~/.profile"},
        },
        "algorithm": {"name": "grpo"},
        "search": {"url": "http://x:80/y"},
        "credit": "package.module:Credit",
    }  # fmt: skip
    assert dict(code_of(recipe)) == {
        "env.name": "a:b\n/b.py:C",
        "env.mcp.x.command": ["sh", "-c", "x"],
        "env.mcp.x.env": {"LD_PRELOAD": "x.so"},
        "env.mcp.x.headers": {"K": "$V"},
        "env.taskset": "installed",
        "env.cassette": {"path": "~/.profile"},
        "search.url": "http://x:80/y",
        "credit": "package.module:Credit",
    }


def test_what_is_loaded_cannot_hide_behind_what_is_not(tmp_path):
    recipe = {f"x{n}": {"path": "a"} for n in range(20)} | {"env": "evil.py:Mine", "\x1b[2K": "b:c"}
    with pytest.raises(ConfigError, match=r"would use: env = \"evil.py:Mine\"; .* and 10 more\. "):
        must_be_allowed(recipe, tmp_path)
    with pytest.raises(ConfigError) as error:
        must_be_allowed(recipe, tmp_path)
    assert "\x1b" not in str(error.value)


def test_a_file_of_the_current_folder_is_another_in_another_folder(tmp_path, monkeypatch):
    recipe = {"env": {"mcp": {"x": {"command": ["python", "server.py"]}}}}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "server.py").write_text("")
    monkeypatch.chdir(tmp_path / "a")
    allow(recipe)
    must_be_allowed(recipe, tmp_path)
    monkeypatch.chdir(tmp_path / "b")
    with pytest.raises(ConfigError, match="--trust"):
        must_be_allowed(recipe, tmp_path)
    recorded = {"env": {"name": "hopworld", "cassette": {"path": "api.jsonl", "mode": "record"}}}
    allow(recorded)
    (tmp_path / "b" / "api.jsonl").touch()  # the run itself has made it
    must_be_allowed(recorded, tmp_path)
    monkeypatch.chdir(tmp_path / "a")
    monkeypatch.setenv("XDG_STATE_HOME", "st")  # a folder of a stranger's could hold one
    with pytest.raises(ConfigError, match="--trust"):
        must_be_allowed({"env": "x.py:Y"}, tmp_path)
    assert not (tmp_path / "a" / "st").exists()


def test_links_are_not_written_through(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.write_text("precious")
    (tmp_path / ".a.partial").symlink_to(theirs)
    write_atomically(tmp_path / "a", "mine")
    (tmp_path / "b").symlink_to(theirs)
    with pytest.raises(OSError, match="symbolic link"):
        append(tmp_path / "b", "mine")
    assert theirs.read_text() == "precious"
    assert (tmp_path / "a").read_text() == "mine"


def test_own_recipes_want_no_word_and_all_others_do(made, monkeypatch, tmp_path):
    """Whether or not something in it looks like code."""
    assert explain(RunFolder(made[0])).own.weights
    copy = copied(made[0], tmp_path)
    assert RunFolder(copy).recipe().seed == 0  # the same recipe elsewhere
    data = json.loads((copy / "recipe.json").read_text())
    (copy / "recipe.json").write_text(json.dumps(data | {"seed": 3}))
    with pytest.raises(ConfigError, match="--trust"):
        RunFolder(copy).recipe()
    elsewhere(monkeypatch, tmp_path)
    with pytest.raises(ConfigError, match="--trust"):
        RunFolder(made[0]).recipe()


def test_the_same_words_in_another_folder_name_other_code(tmp_path, monkeypatch):
    recipe = {"env": {"name": "tools", "tools": ["mine.py:look"]}}
    monkeypatch.chdir(tmp_path)
    allow(recipe)
    must_be_allowed(recipe, tmp_path)
    (tmp_path / "theirs").mkdir()
    monkeypatch.chdir(tmp_path / "theirs")
    with pytest.raises(ConfigError, match=r"mine\.py:look"):
        must_be_allowed(recipe, tmp_path)


# On the disk


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Contents and the folder's names are synced, then it is renamed, then its parent is."""
    log = []
    real_sync, real_replace, real_rename = os.fsync, os.replace, os.rename

    def sync(descriptor):
        log.append(("sync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        real_sync(descriptor)

    def rename(source, target, real):
        log.append(("name", Path(target).name))
        real(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", lambda s, t: rename(s, t, real_replace))
    monkeypatch.setattr(os, "rename", lambda s, t: rename(s, t, real_rename))
    write_atomically(tmp_path / "a.json", "{}")
    assert log == [("sync", ".a.json.partial"), ("name", "a.json"), ("sync", tmp_path.name)]
    log.clear()
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("one", "two"):
        (folder / name).write_text(name)
    seal(folder)
    names = [name for kind, name in log if kind == "sync"]
    assert {"one", "two", ".checksums.json.partial"} <= set(names)
    assert names[-1] == "folder"
    assert why_damaged(folder) is None
    (folder / "one").write_text("oNe")
    assert why_damaged(folder) == "one is not as it was written"
    assert why_damaged(folder, thorough=False) is None


def test_a_file_system_without_links_is_one(tmp_path, made, monkeypatch):
    copy = copied(made[0], tmp_path)
    without_links(copy)

    def refused(self, target, target_is_directory=False):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refused)
    api.resume(copy, iterations=4)
    assert numbers(copy) == made[1]
    names = {path.name for path in (copy / "checkpoints").iterdir()}
    assert names == {"000003", "000004"} | {model_folder(copy, "best").name}
    assert Checkpoints(copy / "checkpoints", keep=2).last.name == "000004"


def test_a_run_goes_by_its_own_place(tmp_path):
    """A tool that changes the directory does not move the run."""
    here = Path.cwd()
    recipe = project(tmp_path / "p")
    env = tmp_path / "p" / "tiny.py"
    env.write_text(env.read_text().replace('self.said = ""', 'self.said = ""; os.chdir("/")'))
    env.write_text("import os\n" + env.read_text())
    os.chdir(tmp_path)
    try:
        result = agent_r1.train(recipe, run="run", overrides={"train.iterations": 1})
    finally:
        os.chdir(here)
    assert result.run.path == tmp_path / "run"
    assert (tmp_path / "run" / "checkpoints" / "000001").is_dir()
