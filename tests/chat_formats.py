"""Chat formats of real models: their templates, tokenizers with their control tokens, small ones
trained here and the models' own where they are at hand, and conversations rendered turn by turn.

The models' own tokenizers are read from the folder that ``AGENT_R1_TOKENIZERS`` names;
``tests/data/templates/README.md`` says what to put there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from agent_r1.model.load import load_tokenizer
from agent_r1.model.settings import ModelSettings
from agent_r1.render.chatml import ChatML
from agent_r1.render.gemma3 import Gemma3
from agent_r1.render.hermes import tool_section
from agent_r1.render.llama3 import Llama3
from agent_r1.types import Action, Message

TEMPLATES = Path(__file__).parent / "data" / "templates"
QWEN2_5 = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM2 = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML_CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<tool_call>", "</tool_call>")
QWEN3_CONTROL = (*CHATML_CONTROL, "<tool_response>", "</tool_response>", "<think>", "</think>")
LLAMA3_CONTROL = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
GEMMA3_CONTROL = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<unused6>", "<mask>")
GEMMA3_WORDS = ("\n", "\n\n", "\n\n\n", "\t", "\t\t", "▁▁", "<code>", "</code>")


@dataclass(frozen=True)
class Family:
    """``invented`` is the system message that the template adds where there is none; ``options``
    are the template's; ``num_calls`` is how many an answer may have.
    """

    name: str
    renderer: type
    control: tuple[str, ...]
    stops: tuple[str, ...]
    num_calls: int = 2
    invented: str = ""
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def make(self, tokenizer: Any) -> Any:
        return self.renderer(self.renderer.Settings(**self.settings), tokenizer)

    def expected(
        self,
        tokenizer: Any,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]],
        opening: bool = True,
    ) -> list[int]:
        """The ids of the conversation as the template renders it whole."""
        rows = as_rows(messages)
        if self.renderer is Gemma3:
            rows, tools = gemma3_rows(messages, tools), []
        text = tokenizer.apply_chat_template(
            rows,
            tools=list(tools) or None,
            add_generation_prompt=opening,
            tokenize=False,
            **self.options,
        )
        return tokenizer(text, add_special_tokens=False)["input_ids"]


_CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")
_LLAMA3_STOPS = ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>")
FAMILIES = [
    Family("smollm2", ChatML, CHATML_CONTROL[:3], _CHATML_STOPS, num_calls=0, invented=SMOLLM2),
    Family("qwen2_5", ChatML, CHATML_CONTROL, _CHATML_STOPS, invented=QWEN2_5),
    Family("qwen3", ChatML, QWEN3_CONTROL, _CHATML_STOPS),
    Family("qwen3_instruct_2507", ChatML, QWEN3_CONTROL, _CHATML_STOPS),
    Family("llama3_1", Llama3, LLAMA3_CONTROL, _LLAMA3_STOPS, num_calls=1),
    Family(
        "llama3_2",
        Llama3,
        LLAMA3_CONTROL,
        _LLAMA3_STOPS,
        num_calls=1,
        settings={"date": "01 Feb 2025"},
        options={"date_string": "01 Feb 2025"},
    ),
    Family("gemma3", Gemma3, GEMMA3_CONTROL, ("<end_of_turn>", "<eos>")),
]


def template(name: str) -> str:
    return (TEMPLATES / f"{name}.jinja").read_text()


def small_tokenizer(control: Sequence[str], template: str, text: str = "") -> Any:
    """A small byte-level BPE tokenizer with real merges."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=list(control),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([template, text] * 3, trainer)
    return _wrapped(tokenizer, control[0], control[-2], template)


def small_gemma_tokenizer(control: Sequence[str], template: str, text: str) -> Any:
    """The same in the style of sentencepiece: ``▁`` for spaces, bytes for characters unknown, no
    words to merge within, and added tokens that are words of its vocabulary.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    own = ["<unk>", *control, *GEMMA3_WORDS]
    reserved = [*own, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=reserved, limit_alphabet=150, show_progress=False
    )
    words = [word + " " for word in f"{template} {text}".split(" ")] * 3
    tokenizer.train_from_iterator(words, trainer)
    spec = json.loads(tokenizer.to_str())
    plain = (*GEMMA3_WORDS, "<unused6>", "<mask>")
    spec["added_tokens"] = [
        {**token, "special": token["content"] not in plain}
        for token in spec["added_tokens"]
        if token["content"] in own
    ]
    return _wrapped(Tokenizer.from_str(json.dumps(spec)), control[0], control[1], template)


def real_tokenizer(family: Family) -> Any:
    """The model's own. Qwen 2.5's is Qwen 3's but for four added tokens, Llama 3.1's is Llama 3's
    but for the names of three.
    """
    if family.name == "smollm2":
        return load_tokenizer(ModelSettings(path="smollm2-135m"))
    home = {"qwen": "qwen3", "llam": "llama3_1", "gemm": "gemma3"}[family.name[:4]]
    folder = Path(os.environ["AGENT_R1_TOKENIZERS"]) / home
    if family.renderer is Gemma3 or family.name.startswith("qwen3"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        tokenizer.chat_template = template(family.name)
        return tokenizer
    spec = json.loads((folder / "tokenizer.json").read_text())
    if family.name == "qwen2_5":
        spec["added_tokens"] = spec["added_tokens"][:22]  # without QWEN3_CONTROL's last four
        return _wrapped(
            Tokenizer.from_str(json.dumps(spec)), None, "<|im_end|>", template("qwen2_5")
        )
    names = {128004: "<|finetune_right_pad_id|>", 128008: "<|eom_id|>", 128010: "<|python_tag|>"}
    for token in spec["added_tokens"]:
        token["content"] = names.get(token["id"], token["content"])
    renamed = Tokenizer.from_str(json.dumps(spec))
    return _wrapped(renamed, "<|begin_of_text|>", "<|eot_id|>", template(family.name))


def _wrapped(tokenizer: Tokenizer, bos: str | None, eos: str, template: str) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)
    fast.chat_template = template
    return fast


def as_rows(messages: Sequence[Message]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for message in messages:
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            calls = [{"name": c.name, "arguments": c.arguments} for c in message.tool_calls]
            row["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        rows.append(row)
    return rows


def gemma3_rows(
    messages: Sequence[Message], tools: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What our format says in a template without tools: all of it in system, user and assistant."""
    section = "".join(p if isinstance(p, str) else p.text for p in tool_section(tools))
    rows: list[dict[str, Any]] = []
    for message in messages:
        role, text = message.role, message.content
        if role == "tool":
            role, text = "user", f"<tool_response>\n{text}\n</tool_response>"
        for call in message.tool_calls:
            body = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False)
            text += f"\n<tool_call>\n{body}\n</tool_call>"
        if rows and rows[-1]["role"] == role:
            rows[-1]["content"] += "\n" + text
        else:
            rows.append({"role": role, "content": text})
    system = [rows.pop(0)["content"]] if rows[0]["role"] == "system" else []
    if system or section:
        before = "\n\n".join([*system, section] if section else system)
        rows.insert(0, {"role": "system", "content": before})
    return rows


def sampled(ids: Sequence[int], stop: str = "stop") -> Action:
    zeros = (0.0,) * len(ids)
    return Action(tuple(ids), zeros, zeros, (), stop)


def turn_by_turn(
    renderer: Any,
    messages: Sequence[Message],
    tools: Sequence[dict[str, Any]],
    say: Callable[[Message], tuple[int, ...]] | None = None,
) -> tuple[int, ...]:
    """The ids of the whole conversation, prompt first, then action by action; ``say`` gives an
    action's.
    """
    say = say or renderer.encode_message
    starts = [i for i, message in enumerate(messages) if message.role == "assistant"]
    ids: tuple[int, ...] = renderer.prompt(messages[: starts[0]], tools)
    for start, after in zip(starts, [*starts[1:], len(messages)], strict=True):
        action = say(messages[start])
        ids += action + renderer.observation(messages[start + 1 : after], sampled(action))
    return ids
