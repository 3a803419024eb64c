"""Recipes: good ones load, bad ones say where, what and how to mend it; overrides; names."""

import subprocess
import sys

import pytest

from agent_r1.config.overrides import parse_overrides
from agent_r1.errors import ConfigError
from agent_r1.run.recipe import load_recipe, shipped_recipes


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes_load_and_fit_one_screen(name):
    recipe, notes = load_recipe(name)
    assert recipe.env.name
    assert notes == []
    from agent_r1.run.recipe import _recipe_path

    assert len(_recipe_path(name).read_text().splitlines()) < 50


def test_a_resolved_recipe_loads_to_itself():
    recipe, _ = load_recipe("hopworld", [("credit", "step"), ("credit.gamma", 0.9)])
    assert load_recipe(recipe.model_dump(mode="json"))[0] == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("train.iteration", 3), "train.iteration: no such key; did you mean 'iterations'?"),
        (("algorithm.clip_lo", 1), "algorithm.clip_lo: no such key; did you mean 'clip_low'?"),
        (("train.tasks", "x"), "train.tasks = 'x': Input should be a valid integer"),
        (("learner.lr", -1), "learner.lr = -1: Input should be greater than 0"),
        (("algorithm", "grop"), "unknown algorithm 'grop'; did you mean 'grpo'?"),
        (("env.name", "hopword"), "unknown env 'hopword'; did you mean 'hopworld'?"),
        (("trian.tasks", 1), "trian: no such key; did you mean 'train'?"),
        (("train.attempts", 1), "'grpo' compares attempts"),
        (("env", "no_file.py:X"), "there is no file"),
        (("env", "agent_r1.tasks.hopworld.env:Hopworld"), "did you mean 'HopWorld'?"),
        (("credit.gamma", 0.5), "credit.gamma: no such key"),
        (("seed.x", 1), "'seed' is not a section"),
        (("env", "agent_r1.tools.function_tool:FunctionTool"), "it has no Settings"),
        (("env.train_hops", [0]), "greater than or equal to 1"),
    ],
)
def test_what_is_wrong_is_named(override, message):
    with pytest.raises(ConfigError) as error:
        load_recipe("hopworld", [override])
    assert message in str(error.value)


def test_the_file_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('env = "hopworld"\n[train]\nitertions = 3\n')
    with pytest.raises(ConfigError, match=r"mine\.toml: train\.itertions: no such key"):
        load_recipe(path)
    path.write_text("env = [")
    with pytest.raises(ConfigError, match=r"mine\.toml: not valid TOML"):
        load_recipe(path)
    with pytest.raises(ConfigError, match="there is no file"):
        load_recipe(tmp_path / "other.toml")
    with pytest.raises(ConfigError, match="did you mean 'hopworld'"):
        load_recipe("hopwrld")


def test_a_part_that_the_environment_does_not_give_cannot_be_weighted():
    with pytest.raises(ConfigError, match="did you mean 'reached'"):
        load_recipe("hopworld", [("credit", "step"), ("credit.weights.reach", 0.5)])


def test_a_new_name_drops_the_keys_it_does_not_have_and_says_so(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text(
        'env = "hopworld"\n[credit]\nname = "step"\ngamma = 0.9\nweights = {format = 0.1}\n'
    )
    recipe, notes = load_recipe(path, [("credit.name", "trajectory")])
    assert recipe.credit.weights == {"format": 0.1}
    assert notes == ["dropped credit.gamma = 0.9: 'trajectory' has no such key"]
    recipe, notes = load_recipe(path, [("credit", "outcome")])
    assert len(notes) == 2


def test_overrides_are_toml_values():
    arguments = ["--a.b", "1", "--c=x", "--d", "[1, 2]", "--e", "true", "--f", "1e-3"]
    assert parse_overrides(arguments) == [
        ("a.b", 1),
        ("c", "x"),
        ("d", [1, 2]),
        ("e", True),
        ("f", 1e-3),
    ]
    for bad in (["a"], ["--a"], ["--a", "1", "b"]):
        with pytest.raises(ConfigError):
            parse_overrides(bad)


def test_ones_own_environment_is_named_in_place(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from agent_r1 import ToolEnv\n"
        "from agent_r1.config.registry import NamedSection\n"
        "class Mine(ToolEnv):\n"
        "    class Settings(NamedSection):\n"
        "        level: int = 1\n"
    )
    (tmp_path / "mine.toml").write_text('[env]\nname = "mine.py:Mine"\nlevel = 3\n')
    recipe, _ = load_recipe(tmp_path / "mine.toml")
    assert recipe.env.level == 3
    assert recipe.env.name == f"{tmp_path / 'mine.py'}:Mine"
    again, _ = load_recipe(recipe.model_dump(mode="json"))
    assert again == recipe
    with pytest.raises(ConfigError, match=r"env\.lvl: no such key; did you mean 'level'"):
        load_recipe(tmp_path / "mine.toml", [("env.lvl", 2)])


def test_checking_a_recipe_needs_no_torch():
    code = (
        "import sys\n"
        "from agent_r1.run.recipe import load_recipe\n"
        "load_recipe('hopworld'); load_recipe('multihop-smollm2')\n"
        "assert not {'torch', 'transformers'} & set(sys.modules), 'heavy import'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            {"algorithm": "ppo", "credit": {"name": "step", "compare": "index"}},
            "credit.compare has",
        ),
        ({"algorithm": "gigpo", "credit": {"name": "step", "gamma": 0.9}}, "credit.gamma has no"),
        (
            {
                "algorithm": "ppo",
                "credit": {"name": "step", "gate": True},
                "train": {"attempts": 1},
            },
            "no process reward would count",
        ),
        ({"algorithm": {"name": "ppo", "loss_mask": False}}, "needs advantage_mask = false"),
        ({"algorithm": {"name": "grpo", "loss_mask": False, "importance_cap": 2}}, "no effect"),
        ({"algorithm": {"name": "grpo", "kl": {"estimator": "k1"}}}, "kl.coef"),
        ({"algorithm": {"name": "dapo", "overlong": {"length": 5, "buffer": 9}}}, "is more than"),
    ],
)
def test_settings_that_would_have_no_effect_are_errors(overrides, message):
    with pytest.raises(ConfigError) as error:
        load_recipe({"env": "hopworld", **overrides})
    assert message in str(error.value)


def test_a_function_without_the_decorator_is_told_about_it(tmp_path):
    (tmp_path / "mine.py").write_text("def mine(returns):\n    return returns\n")
    with pytest.raises(ConfigError, match="decorate the function with @advantage"):
        load_recipe({"env": "hopworld", "algorithm": f"{tmp_path}/mine.py:mine"})


def test_every_algorithm_can_be_written_down_and_read_again():
    from agent_r1.algorithms import ALGORITHMS

    for name in ALGORITHMS.table:
        recipe, _ = load_recipe({"env": "hopworld", "algorithm": name})
        again, _ = load_recipe(recipe.model_dump(mode="json"))
        assert again == recipe


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"evaluation": {"every": 0}, "checkpoint": {"metric": "f1"}}, "checkpoint.metric = 'f1'"),
        ({"algorithm": {"name": "ppo", "value_clip": 0.2}}, "value_clip has no effect"),
        (
            {"algorithm": {"name": "dapo", "overlong": {"length": 9000, "buffer": 10}}},
            "none would be punished",
        ),
        ({"model": {"lora": {"start": "x", "targets": ["q_proj"]}}}, "targets has no effect"),
        ({"learner": {"lr": float("inf")}}, "learner.lr"),
        ({"learner": {"betas": [0.9, 1.0]}}, "learner.betas"),
        ({"credit": {"name": "step", "weights": {"format": float("nan")}}}, "finite"),
        ({"train": {"temperature": float("inf")}}, "train.temperature"),
        ({"algorithm": {"name": "grpo", "kl": {"coef": float("inf")}}}, "kl.coef"),
    ],
)
def test_a_setting_without_effect_or_sense_is_refused(settings, words):
    with pytest.raises(ConfigError, match=words.replace(".", r"\.")):
        load_recipe({"env": "hopworld", "train": {"iterations": 3}} | settings)


def test_process_rewards_that_are_not_declared_say_how(tmp_path):
    (tmp_path / "e.py").write_text("from agent_r1 import ToolEnv\nclass E(ToolEnv):\n    pass\n")
    credit = {"name": "step", "weights": {"found": 1.0}}
    with pytest.raises(
        ConfigError, match=r"declare them in its class: reward_parts = \('found',\)"
    ):
        load_recipe({"env": f"{tmp_path / 'e.py'}:E", "credit": credit})


@pytest.mark.parametrize(
    ("section", "base"),
    [
        ("memory", "agent_r1.envs.history:Recent"),
        ("user", "agent_r1.envs.user:Scripted"),
        ("search", "agent_r1.search.http:Http"),
    ],
)
def test_own_classes_of_every_kind_are_found_beside_the_recipe(tmp_path, section, base):
    """Not in the current folder, and from any folder afterwards."""
    module, _, name = base.partition(":")
    (tmp_path / "mine.py").write_text(
        f"from {module} import {name}\nclass Mine({name}):\n    pass\n"
    )
    env = {"memory": "hopworld", "user": "hopworld-user", "search": "multihop"}[section]
    keys = 'url = "http://localhost:1"\n' if section == "search" else ""
    path = tmp_path / "recipe.toml"
    if section == "search":
        env += '"\nenv.path = "x'
    path.write_text(f'env.name = "{env}"\n[env.{section}]\nname = "mine.py:Mine"\n{keys}')
    recipe, _ = load_recipe(path)
    assert getattr(recipe.env, section).name == f"{tmp_path}/mine.py:Mine"
    again, _ = load_recipe(recipe.model_dump(mode="json"))
    assert again == recipe


def test_an_error_says_whether_the_file_or_a_key_given_beside_it_is_wrong(tmp_path):
    file = tmp_path / "r.toml"
    file.write_text('env = "hopworld"\n[algorithm]\nname = "grpo"\nclip_low = -1\n')
    with pytest.raises(ConfigError, match=r"^keys given beside .*r.toml: learner.lr = 'x'"):
        load_recipe({"env": "hopworld"}, [("learner.lr", "x")], label="r.toml")
    with pytest.raises(ConfigError, match=r"^/.*r.toml: algorithm.clip_low = -1"):
        load_recipe(file, [("algorithm", "dapo")])
