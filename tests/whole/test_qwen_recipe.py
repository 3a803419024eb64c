"""The GPU recipe's every code path, on the CPU with a small random model of its architecture."""

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from agent_r1 import api
from agent_r1.learner.memory_plan import plan_memory
from agent_r1.run.recipe import load_recipe
from tests import DATA_FOLDER

DATA = DATA_FOLDER / "multihop"
QWEN = Qwen2Config(
    vocab_size=151_936,
    hidden_size=2048,
    intermediate_size=11_008,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
"""Qwen2.5-3B-Instruct."""


@pytest.fixture(scope="module")
def small_qwen(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("qwen")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [False, True])
def test_it_runs_with_its_own_settings(tmp_path, small_qwen, lora):
    """All but sizes and rate: bfloat16, KL to a reference, two mini-batches, checkpointing."""
    overrides = {
        "model.path": str(small_qwen),
        "model.device": "cpu",
        "env.path": str(DATA),
        "env.datasets": ["invented"],
        "env.holdout": 0.2,
        "limits": {"turns": 2, "tokens_per_turn": 24, "tokens": 1500},
        "train.iterations": 2,
        "train.tasks": 2,
        "train.attempts": 3,
        "evaluation": {"every": 2, "tasks": 2},
        "checkpoint.every": 1,
        "learner.lr": 1e-2,  # so that two updates take it away from the reference
        **({"model.lora": {"rank": 4}} if lora else {}),
    }
    result = api.train("multihop-qwen2.5-3b", run=tmp_path / "run", overrides=overrides)
    recipe = result.run.recipe_data()
    assert recipe["model"]["dtype"] == "bfloat16"
    assert recipe["learner"]["checkpointing"]
    assert recipe["learner"]["minibatches"] == 2
    rows = result.metrics
    assert [row["figures"]["updates_skipped"] for row in rows[1:]] == [0, 0]
    assert rows[-1]["figures"]["updates"] == 2
    assert rows[1]["figures"]["kl"] < rows[2]["figures"]["kl"]
    assert rows[2]["figures"]["kl"] > 1e-4
    assert rows[-1]["figures"]["logprob_error"] < 0.1, "bfloat16"
    assert api.load(tmp_path / "run", "last").tasks("test")


def test_the_memory_plan_that_it_states(monkeypatch):
    recipe, _ = load_recipe("multihop-qwen2.5-3b")
    monkeypatch.setattr("agent_r1.learner.memory_plan.free_memory", lambda device: int(79e9))
    plan = plan_memory(
        QWEN,
        recipe.model,
        recipe.learner,
        device=torch.device("cuda"),
        longest=recipe.limits.tokens,
        reference=True,
    )
    assert plan.micro_batch_tokens == 10_574
    assert plan.weights / 1e9 == pytest.approx(62, abs=0.5)
    assert plan.cache == 36 * 1024
