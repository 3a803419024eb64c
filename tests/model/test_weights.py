"""Weights and adapters are whole, finite and what they were; exports are read elsewhere."""

import json
import os
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, Qwen2Config

import agent_r1
from agent_r1 import api
from agent_r1.errors import ConfigError, RunError
from agent_r1.model.load import check_sizes, load_config, load_policy, load_tokenizer
from agent_r1.model.portable import fingerprint, make_portable
from agent_r1.model.settings import LoraSettings, ModelSettings
from agent_r1.rollout.engine import Sampling
from agent_r1.rollout.sampling import draw

BASE = Path(str(files("agent_r1"))) / "assets" / "hopworld-base"
TINY = {
    "env": "hopworld",
    "threads": 1,
    "limits": {"turns": 2, "tokens_per_turn": 24, "tokens": 500},
    "train": {"iterations": 1, "tasks": 2, "attempts": 2},
    "evaluation": {"every": 0},
}


def copied(folder, change=None, **config):
    """The tiny base with its weights or its configuration changed."""
    shutil.copytree(BASE, folder)
    if config:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | config))
    if change is not None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def prefixed(weights):
    for name in list(weights):
        weights[f"_orig_mod.{name}"] = weights.pop(name)


def damaged(weights):
    weights["model.layers.2.mlp.up_proj.weight"][3, 5] = float("nan")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (prefixed, r"weights of Qwen3ForCausalLM are missing .* as '_orig_mod\."),
        (
            lambda w: w.pop("model.layers.1.mlp.up_proj.weight"),
            r"1 weights .*layers\.1\.mlp",
        ),
        (damaged, "not finite, first in 'model.layers.2.mlp.up_proj.weight'"),
    ],
)
def test_weights_that_are_missing_or_damaged_are_refused(tmp_path, change, words):
    folder = copied(tmp_path / "m", change)
    with pytest.raises(ConfigError, match=words):
        load_policy(ModelSettings(path=str(folder)))


def test_files_that_are_no_weights_are_one_line_and_leave_no_run_behind(tmp_path):
    folder = copied(tmp_path / "m")
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(pointer)
    with pytest.raises(ConfigError, match=r"m'.*no model can be loaded.*pointer of Git LFS"):
        agent_r1.train(TINY | {"model": {"path": str(folder)}}, run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def cut_off(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4096])


def without_a_shard(folder):
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_off, r"model\.safetensors: .*is it cut off"),
        (without_a_shard, r"model-00002-of-00002\.safetensors, which .* names, is not there"),
    ],
)
def test_weights_that_are_not_whole_are_seen_before_they_are_read(tmp_path, damage, words):
    """``check`` reads no more than this of them."""
    folder = copied(tmp_path / "m")
    damage(folder)
    with pytest.raises(ConfigError, match=words):
        load_config(ModelSettings(path=str(folder)))


def test_a_vocabulary_with_tokens_that_cannot_come_has_an_entropy():
    logits = torch.tensor([[1.0, -float("inf"), 1.0], [0.0, -float("inf"), -float("inf")]])
    _, logprobs, entropies = draw(logits, [0.3, 0.9], [Sampling(1, ())] * 2)
    assert entropies == pytest.approx([0.6931, 0.0], abs=1e-4)
    assert logprobs == pytest.approx([-0.6931, 0.0], abs=1e-4)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder and a decoder"),
        ({"model_type": "gemma3", "text_config": {}}, "wrapped for images"),
    ],
)
def test_models_that_cannot_be_trained_say_why(tmp_path, config, words):
    folder = copied(tmp_path / "m", **config)
    with pytest.raises(ConfigError, match=words):
        load_config(ModelSettings(path=str(folder)))


def test_names_and_folders_have_a_hint(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="did you mean 'smollm2-135m'"):
        load_config(ModelSettings(path="smollm-135m"))
    with pytest.raises(ConfigError, match="nothing of that name in the hub's cache, and the hub"):
        load_config(ModelSettings(path="somebody/something"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"holds an adapter, which goes into model\.lora\.start"):
        load_config(ModelSettings(path=str(tmp_path)))


def test_a_tokenizer_of_another_model_and_positions_that_are_not_there(tmp_path):
    tokenizer = load_tokenizer(ModelSettings())
    with pytest.raises(ConfigError, match="the tokenizer has the id 724, the model 700 rows"):
        check_sizes(LlamaConfig(vocab_size=700), tokenizer, longest=10)
    from transformers import GPT2Config

    with pytest.raises(ConfigError, match=r"limits\.tokens = 2000: the model has 1024 positions"):
        check_sizes(GPT2Config(), tokenizer, longest=2000)


def test_output_that_is_not_finite_is_named():
    logits = torch.zeros(2, 300)
    logits[1, 7] = float("nan")
    with pytest.raises(RunError, match="not finite"):
        draw(logits, [0.5, 0.5], [Sampling(1, ())] * 2)


# Adapters ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapter_run(tmp_path_factory):
    recipe = TINY | {"model": {"lora": {"rank": 4, "alpha": 8}}, "learner": {"lr": 1e-2}}
    return agent_r1.train(recipe, run=tmp_path_factory.mktemp("adapter") / "run").run.path


@pytest.mark.parametrize("kind", ["prefix", "half", "nan", "shape", "pointer", "gone"])
def test_an_adapter_that_does_not_fit_is_refused(tmp_path, adapter_run, kind):
    folder = tmp_path / "a"
    shutil.copytree(adapter_run / "checkpoints" / "best", folder)
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    if kind == "prefix":
        weights = {k.replace("model.layers", "model.text.layers"): v for k, v in weights.items()}
    if kind == "half":
        weights = {k: v for k, v in weights.items() if "layers.0" in k}
    if kind == "nan":
        next(iter(weights.values()))[0, 0] = float("inf")
    if kind == "shape":
        weights = {k: v[:, :-1].contiguous() for k, v in weights.items()}
    save_file(weights, file)
    if kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\n")
    if kind == "gone":
        file.unlink()
    lora = LoraSettings(rank=4, alpha=8, start=str(folder))
    with pytest.raises(ConfigError, match=r"the adapter in .*/a ") as error:
        load_policy(ModelSettings(lora=lora))
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_base_is_refused_and_a_changed_base_noticed(tmp_path, adapter_run):
    other = copied(tmp_path / "other", lambda w: w["lm_head.weight"].mul_(1.5))
    lora = {"rank": 4, "alpha": 8, "start": str(adapter_run)}
    with pytest.raises(ConfigError, match="its adapter was trained on a model with other weights"):
        agent_r1.train(TINY | {"model": {"path": str(other), "lora": lora}}, run=tmp_path / "again")
    base = copied(tmp_path / "base")
    recipe = TINY | {"model": {"path": str(base)}, "algorithm": {"name": "grpo", "kl": {"coef": 1}}}
    agent_r1.train(recipe, run=tmp_path / "run")
    shutil.copy(other / "model.safetensors", base)
    with pytest.raises(ConfigError, match="does not hold the weights any more that this run began"):
        api.resume(tmp_path / "run", iterations=2)


def test_an_adapter_is_not_evaluated_on_another_base_than_its_own(tmp_path):
    base = copied(tmp_path / "base")
    recipe = TINY | {"model": {"path": str(base), "lora": {"rank": 4, "alpha": 8}}}
    run = agent_r1.train(recipe, run=tmp_path / "run").run.path
    agent_r1.load(run)
    other = copied(tmp_path / "other", lambda w: w["lm_head.weight"].mul_(1.5))
    shutil.copy(other / "model.safetensors", base)
    for use in (agent_r1.load, lambda run: agent_r1.export(run, tmp_path / "out")):
        with pytest.raises(ConfigError, match="does not hold the weights any more that this run"):
            use(run)


def test_a_run_is_pinned_to_the_checkpoint_behind_a_link(tmp_path):
    first = agent_r1.train(TINY, run=tmp_path / "a").run.path
    second = agent_r1.train(
        TINY | {"model": {"path": str(first / "checkpoints" / "best")}}, run=tmp_path / "b"
    )
    path = json.loads((second.run.path / "recipe.json").read_text())["model"]["path"]
    assert path == str((first / "checkpoints" / "000001").resolve())
    assert second.run.contents().model == fingerprint(path)


# Exports -------------------------------------------------------------------------------------


def logprobs(model):
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits.log_softmax(-1)


@pytest.mark.parametrize("targets", [("embed_tokens", "q_proj"), ("lm_head", "v_proj")])
def test_an_export_of_tied_weights_computes_what_the_run_computes(tmp_path, targets):
    def tie(weights):
        del weights["lm_head.weight"]

    folder = copied(tmp_path / "tied", tie, tie_word_embeddings=True)
    model = {"path": str(folder), "lora": {"rank": 4, "alpha": 8, "targets": targets}}
    more = {"algorithm": "sft", "engine": "padded", "learner": {"lr": 0.02}}
    more |= {"limits": {"turns": 6, "tokens_per_turn": 96, "tokens": 768}}
    recipe = TINY | more | {"model": model, "train": {"iterations": 1, "tasks": 2, "attempts": 1}}
    agent_r1.train(recipe, run=tmp_path / "run")
    agent_r1.export(tmp_path / "run", tmp_path / "out", "last")
    ours = logprobs(api.load(tmp_path / "run", "last").policy.model)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (ours - logprobs(exported)).abs().max() < 1e-3
    assert (ours - logprobs(AutoModelForCausalLM.from_pretrained(folder))).abs().max() > 0.01


def test_an_export_says_where_a_turn_ends_and_how_tools_are_shown(tmp_path):
    """A base whose own settings know nothing of the chat format that it was trained in."""
    folder = copied(tmp_path / "base", eos_token_id=0)
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"eos_token_id": 0}))
    (folder / "chat_template.jinja").unlink()
    agent_r1.train(TINY | {"model": {"path": str(folder)}}, run=tmp_path / "run")
    out = agent_r1.export(tmp_path / "run", tmp_path / "out")
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [2, 0]
    agent = api.load(tmp_path / "run")
    task = agent.tasks()[0]
    played = agent.play(task)
    tools = agent.rollout.make_env().schemas
    messages = [{"role": m.role, "content": m.content} for m in played.prompt]
    shown = AutoTokenizer.from_pretrained(out).apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=False
    )
    assert tuple(shown) == played.prompt_ids


def hub_model(folder, rope):
    """A random model with a long-range or a scaled position encoding, as we save it."""
    shape = {
        "vocab_size": 725, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096,
    }  # fmt: skip
    kind = LlamaConfig if rope["rope_type"] == "llama3" else Qwen2Config
    torch.manual_seed(0)
    config = kind(**shape, rope_parameters=rope, initializer_range=0.3, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(folder)
    return folder


ROPES = [
    {"rope_type": "default", "rope_theta": 1e6},
    {
        "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 128,
    },
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=["qwen2", "llama3"])
def test_old_names_stand_beside_the_new_and_change_nothing(tmp_path, rope):
    folder = hub_model(tmp_path / "m", rope)
    before = logprobs(AutoModelForCausalLM.from_pretrained(folder))
    make_portable(folder)
    config = json.loads((folder / "config.json").read_text())
    assert config["rope_theta"] == rope["rope_theta"]
    assert (config["rope_scaling"] or {}).get("factor") == rope.get("factor")
    assert config["torch_dtype"] == "float32"
    assert torch.equal(before, logprobs(AutoModelForCausalLM.from_pretrained(folder)))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert len(AutoTokenizer.from_pretrained(folder)) == len(AutoTokenizer.from_pretrained(BASE))


READ = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
assert __version__.startswith("4."), __version__
folder, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(folder)
with torch.no_grad():
    logits = model(torch.arange(3, 203)[None]).logits
stop = model.generation_config.eos_token_id
torch.save((logits, tokenizer("Who is it?")["input_ids"], stop), out)
"""


@pytest.mark.integration
@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8}], ids=["full", "adapter"])
@pytest.mark.parametrize("rope", ROPES, ids=["qwen2", "llama3"])
def test_transformers_4_reads_exports_as_we_do(tmp_path, rope, lora):
    base = hub_model(tmp_path / "base", rope)
    model = {"path": str(base), "lora": lora}
    agent_r1.train(TINY | {"model": model, "renderer": "chatml"}, run=tmp_path / "run")
    out = agent_r1.export(tmp_path / "run", tmp_path / "out", "last")
    read = [os.environ["AGENT_R1_TRANSFORMERS4"], "-c", READ, str(out), str(tmp_path / "o.pt")]
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(read, check=True, env=clean)
    theirs, ids, stop = torch.load(tmp_path / "o.pt")
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(out)(torch.arange(3, 203)[None]).logits
    assert (ours - theirs).abs().max() < 1e-3
    assert ids == AutoTokenizer.from_pretrained(out)("Who is it?")["input_ids"]
    assert 2 in (stop if isinstance(stop, list) else [stop])
