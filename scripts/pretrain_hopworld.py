"""Makes the tiny base model of HopWorld from nothing: tokenizer, weights, card.

    python scripts/pretrain_hopworld.py --out agent_r1/assets/hopworld-base

Supervised only, in five stages, because copying does not emerge from dialogues alone:
1. loop: short random sequences over and over, until matching emerges;
2. match: the same over gaps and between pairs;
3. skills: copying names, recalling facts, restating questions, some dialogues;
4. dialogues: whole ones of one to three hops;
5. habits: dialogues of a poor agent, which guesses, breaks its calls, asks for the wrong relation
   and above all answers before it has followed every hop. These scripted habits are what
   reinforcement has to overcome; the card says so.

A start where success is rarer, for the experiment on process rewards, is more of the last stage:

    python scripts/pretrain_hopworld.py --base agent_r1/assets/hopworld-base \
        --habits 0.01 0.2 0.01 0.93 --threads 1 --out runs/starts/hopworld-hard
"""

from __future__ import annotations

import argparse
import math
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jinja2 import Environment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from agent_r1.envs.gold import as_message
from agent_r1.render.calls import parse_hermes
from agent_r1.render.chatml import ChatML
from agent_r1.render.encoding import Markup
from agent_r1.render.hermes import said
from agent_r1.tasks.hopworld import world as hw
from agent_r1.tasks.hopworld.env import HopWorld, gold_actions
from agent_r1.types import Action, Message, derive_seed

Example = tuple[list[int], list[float]]
"""Token ids, and for each the weight of its prediction in the loss."""

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TEMPLATE = Path(__file__).parent / "hermes_template.jinja"
CARD = Path(__file__).parent / "hopworld_base_card.md"


class Habits(NamedTuple):
    """How often the poor agent of the last stage does what: a dialogue, a search, a search, a
    hop.
    """

    guesses: float = 0.1
    breaks_calls: float = 0.2
    wrong_relation: float = 0.1
    stops_early: float = 0.55


HABITS = Habits()


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE on scripted dialogues, with the added tokens that Qwen 3 has."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_texts(), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=TEMPLATE.read_text(),
        clean_up_tokenization_spaces=False,
    )


def tokenizer_texts(num_worlds: int = 3000) -> Iterator[str]:
    """Scripted dialogues under their full prompt, without the control tokens."""
    template = Environment().from_string(TEMPLATE.read_text())
    env = HopWorld()
    system = {"role": "system", "content": env.system}
    prompt = template.render(messages=[system], tools=env.schemas)
    prompt = re.sub("|".join(map(re.escape, SPECIAL + TAGS)), " ", prompt)
    for index in range(num_worlds):
        world = hw.build_world(derive_seed("tokenizer", index), 1 + index % 3)
        results = [fact.text for fact in world.facts[:6]]
        actions = [re.sub("|".join(TAGS), "", text) for text in gold_texts(world)]
        roles = ["user", "assistant", "system"]
        yield "\n".join([prompt, *roles, world.question, *actions, *results])


def gold_texts(world: hw.World) -> list[str]:
    """The gold actions as the chat format writes them."""
    pieces = (said(as_message(action)) for action in gold_actions(world))
    return ["".join(p.text if isinstance(p, Markup) else p for p in turn) for turn in pieces]


def build_model(vocab_size: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=4096,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # large embeddings: a token's identity must survive the first block
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                continue
            std = parameter.shape[1] ** -0.5
            if "embed_tokens" in name:
                std = 0.5
            elif "lm_head" in name:
                std = 0.02
            elif "o_proj" in name or "down_proj" in name:
                std /= math.sqrt(2 * config.num_hidden_layers)
            parameter.normal_(0, std)
    return model


class Examples:
    """Generators of supervised examples. Weights: names 5 (the rest is mostly boilerplate), given
    text 0.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, seed: int, habits: Habits = HABITS
    ) -> None:
        self.habits = habits
        self.renderer = ChatML(ChatML.Settings(), tokenizer)
        self.rng = random.Random(seed)
        env = HopWorld(HopWorld.Settings())
        self.system, self.schemas = Message("system", env.system), env.schemas
        vocabulary = tokenizer.backend_tokenizer.get_vocab()
        names = {"Ġ" + name for name in hw.FIRST_NAMES + hw.LAST_NAMES}
        self.name_ids = {index for token, index in vocabulary.items() if token in names}
        print(f"names that are one token: {len(self.name_ids)} of {len(names)}")

    def weigh(self, ids: tuple[int, ...] | list[int]) -> list[float]:
        return [5.0 if i in self.name_ids else 1.0 for i in ids]

    def text(self, given: str, wanted: str) -> Example:
        a, b = self.renderer._encoder.encode([given]), self.renderer._encoder.encode([wanted])
        return [*a, *b], [0.0] * len(a) + self.weigh(b)

    def person(self) -> str:
        return f"{self.rng.choice(hw.FIRST_NAMES)} {self.rng.choice(hw.LAST_NAMES)}"

    def names(self, count: int) -> list[int]:
        return self.rng.choices(sorted(self.name_ids), k=count)

    def loop(self) -> Example:
        """A short random sequence over and over. The period varies: a fixed one would teach an
        offset, not a match.
        """
        period = self.rng.randint(4, 12)
        ids = (self.names(period) * 15)[:56]
        return ids, [0.0] * (period + 1) + [1.0] * (55 - period)

    def repeat(self) -> Example:
        """A random sequence, a gap, the sequence again."""
        ids, gap = self.names(self.rng.randint(8, 28)), self.names(self.rng.randint(0, 8))
        return ids + gap + ids, [0.0] * (len(ids) + len(gap) + 1) + [1.0] * (len(ids) - 1)

    def pairs(self) -> Example:
        """Eight pairs of names in random order, each several times."""
        pairs = list(zip(self.rng.sample(sorted(self.name_ids), 8), self.names(8), strict=True))
        seen, ids, weights = set(), [], []
        for key, value in self.rng.choices(pairs, k=28):
            ids += [key, value]
            weights += [0.0, 1.0 if key in seen else 0.0]
            seen.add(key)
        return ids, weights

    def copy(self) -> Example:
        """Pairs of names, then the second of each asked for by the first."""
        pairs = [(self.person(), self.person()) for _ in range(10)]
        asked = self.rng.choices(pairs, k=10)
        ids, weights = self.text("".join(f" {a} is {b}." for a, b in pairs), "")
        for a, b in asked:
            more, w = self.text(f" {a} is", f" {b}.")
            ids, weights = ids + more, weights + w
        return ids, weights

    def recall(self) -> Example:
        """Facts as a search shows them, then six of them asked for."""
        world = hw.build_world(self.rng.getrandbits(62), 1)
        subjects = self.rng.sample(sorted({f.subject for f in world.facts}), 2)
        facts = [f for f in world.facts if f.subject in subjects]
        ids, weights = self.text("\n".join(f.text for f in facts), "")
        for fact in self.rng.choices(facts, k=6):
            more, w = self.text(f"\n{fact.relation} of {fact.subject}", f"\n{fact.text}")
            ids, weights = ids + more, weights + w
        return ids, weights

    def restate(self) -> Example:
        """Questions and their first action."""
        ids, weights = self.text("", "")
        for _ in range(3):
            world = hw.build_world(self.rng.getrandbits(62), self.rng.randint(1, 3))
            more, w = self.text(f"{world.question}\n", gold_texts(world)[0].split("\n")[0])
            ids, weights = ids + more, weights + w
        return ids, weights

    def dialogue(self, num_hops: int, num_actions: int = 99) -> Example:
        """A perfect agent's dialogue, or its first actions."""
        world = hw.build_world(self.rng.getrandbits(62), num_hops)
        texts = gold_texts(world)[:num_actions]
        facts = zip(texts, world.chain, strict=False)  # the answer has no fact of its own
        turns = [(text, self.results(world, fact)) for text, fact in facts]
        return self.render(world, [*turns, *((text, "") for text in texts[num_hops:])])

    def poor_dialogue(self, num_hops: int) -> Example:
        """A poor agent's: guesses, broken calls, wrong relations, answers before the last hop."""
        world = hw.build_world(self.rng.getrandbits(62), num_hops)
        if self.rng.random() < self.habits.guesses:
            guess = self.rng.choice(world.facts).subject
            return self.render(world, [(f"<answer> {guess} </answer>", "")])
        turns = []
        *searches, answer = gold_texts(world)
        for hop, (text, fact) in enumerate(zip(searches, world.chain, strict=True)):
            if hop and self.rng.random() < self.habits.stops_early:
                found = world.chain[hop - 1]
                answer = f"{found.text} <answer> {found.object} </answer>"
                break
            if self.rng.random() < self.habits.breaks_calls:
                broken = text.replace('"}}', self.rng.choice(['"}', "}}", '"']))
                (call,) = parse_hermes(broken).tool_calls
                turns.append((broken, f"Error: {call.reason}"))
            if self.rng.random() < self.habits.wrong_relation:
                other = self.rng.choice([f for f in world.facts if f.subject == fact.subject])
                turns.append(
                    (
                        text.replace(f'"{fact.relation} of', f'"{other.relation} of'),
                        self.results(world, other),
                    )
                )
                answer = f"{other.text} <answer> {other.object} </answer>"
                break
            turns.append((text, self.results(world, fact)))
        return self.render(world, [*turns, (answer, "")])

    def results(self, world: hw.World, fact: hw.Fact) -> str:
        found = hw.search_facts(world.facts, f"{fact.relation} of {fact.subject}")
        return "\n".join(f.text for f in found)

    def render(self, world: hw.World, turns: list[tuple[str, str]]) -> Example:
        """Actions and what they led to, through the very renderer that reinforcement uses."""
        prompt = self.renderer.prompt([self.system, Message("user", world.question)], self.schemas)
        ids, weights = list(prompt), [0.0] * len(prompt)
        for index, (text, result) in enumerate(turns):
            action = self.renderer.encode_action(text)
            ids += action
            weights += self.weigh(action)
            if index + 1 < len(turns):
                sampled = Action(action, (), (), (), "stop")
                observation = self.renderer.observation([Message("tool", result)], sampled)
                ids += observation
                weights += [0.0] * len(observation)
        return ids, weights


def fit(
    model: Qwen3ForCausalLM,
    draw: Callable[[], Example],
    *,
    steps: int,
    decay_from: float,
    lr: float = 3e-3,
    batch: int = 32,
    warmup: int = 50,
    label: str = "",
) -> None:
    """AdamW on weighted cross-entropy; warm-up, constant, then linear decay from ``decay_from`` of
    the steps on.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        rate = min(1.0, (step + 1) / warmup, (1 - step / steps) / (1 - decay_from + 1e-9))
        for group in optimizer.param_groups:
            group["lr"] = lr * rate
        examples = sorted((draw() for _ in range(batch)), key=lambda example: len(example[0]))
        total = sum(sum(weights[1:]) for _, weights in examples)
        optimizer.zero_grad(set_to_none=True)
        loss, hits = 0.0, []
        for first in range(0, batch, 8):  # rows of like length, so that little is padding
            part_loss, part_hits = _forward(model, examples[first : first + 8])
            (part_loss / total).backward()
            loss += part_loss.item() / total
            hits += part_hits
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 49 or step == steps - 1:
            print(
                f"{label} {step + 1}/{steps}  loss {loss:.3f}  accuracy of names "
                f"{sum(hits) / len(hits):.3f}  {time.perf_counter() - start:.0f}s",
                flush=True,
            )


def _forward(model: Qwen3ForCausalLM, examples: list[Example]) -> tuple[torch.Tensor, list[bool]]:
    """Summed weighted loss, and for each name whether it was predicted. Logits only where there is
    a weight.
    """
    length = max(len(ids) for ids, _ in examples)
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    weights = torch.zeros(len(examples), length)
    for row, (tokens, w) in enumerate(examples):
        ids[row, : len(tokens)] = torch.tensor(tokens)
        weights[row, : len(w)] = torch.tensor(w)
    target, weights = ids[:, 1:], weights[:, 1:]
    chosen = weights > 0
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    logits = model.lm_head(hidden[chosen])
    losses = torch.nn.functional.cross_entropy(logits, target[chosen], reduction="none")
    names = weights[chosen] >= weights.max()
    hits = (logits.argmax(-1) == target[chosen])[names]
    return (losses * weights[chosen]).sum(), hits.tolist()


def mixture(rng: random.Random, parts: dict[Callable[[], Example], float]) -> Callable[[], Example]:
    return lambda: rng.choices(list(parts), weights=list(parts.values()))[0]()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--base", type=Path, help="start from this model and do the last stage")
    parser.add_argument(
        "--habits", type=float, nargs=4, default=HABITS, metavar=tuple(Habits._fields)
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    if arguments.base:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(arguments.base)
        model = Qwen3ForCausalLM.from_pretrained(arguments.base)
    else:
        tokenizer = train_tokenizer()
        model = build_model(len(tokenizer))
    make = Examples(tokenizer, arguments.seed, Habits(*arguments.habits))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    if not arguments.base:
        learn_the_skills(model, make, arguments.seed)
    habits = {lambda hops=hops: make.poor_dialogue(hops): 1 for hops in (1, 2, 3)}
    make.rng.seed(arguments.seed + 1)
    fit(
        model,
        mixture(make.rng, habits),
        steps=50,
        lr=1e-3,
        decay_from=1.0,
        warmup=5,
        label="habits",
    )
    model.eval()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    if not arguments.base:
        shutil.copy(CARD, arguments.out / "README.md")


def learn_the_skills(model: Qwen3ForCausalLM, make: Examples, seed: int) -> None:
    """The first four stages."""
    fit(model, make.loop, steps=350, decay_from=1.0, label="loop")
    match = {make.loop: 1, make.repeat: 1, make.pairs: 2}
    fit(model, mixture(make.rng, match), steps=200, decay_from=1.0, label="match")
    skills = {
        make.pairs: 1,
        make.copy: 3,
        make.recall: 2,
        make.restate: 1,
        lambda: make.dialogue(1): 2,
        lambda: make.dialogue(make.rng.randint(2, 3), num_actions=1): 0.5,
    }
    fit(model, mixture(make.rng, skills), steps=220, decay_from=1.0, label="skills")
    dialogues = {
        make.copy: 1,
        make.recall: 0.5,
        lambda: make.dialogue(1): 1.5,
        lambda: make.dialogue(2): 2.5,
        lambda: make.dialogue(3): 1.5,
    }
    rng = make.rng
    rng.seed(seed)  # so that the last two stages can be repeated on their own
    fit(model, mixture(rng, dialogues), steps=300, decay_from=0.4, warmup=10, label="dialogues")


if __name__ == "__main__":
    main()
