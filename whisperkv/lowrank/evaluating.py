"""What a conversion costs and what it saves."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache

from ..compat import CACHE
from . import record, whisper_converting
from .architectures import architecture_of
from .calibration import token_rows

ALL = 1 << 20  # rows: more than a text has


@dataclass(frozen=True)
class CacheMemory:
    """Bytes of a cache.

    full       as the model's keys and values would take
    latent     as it takes now, by the shapes
    measured   as it took after a pass; None if none was made
    """

    full: int
    latent: int
    measured: int | None

    @property
    def ratio(self) -> float:
        return self.full / self.latent


def measure_cache_memory(
    model: Any, sequence_length: int | None = None, batch_size: int = 1, measure: bool = True
) -> CacheMemory:
    """Bytes of the cache after so many tokens, computed and, by a pass over them, measured. A language model that was
    not converted is measured too: then `latent` is what its keys and values take.

    sequence_length  None: 1024, of a Whisper all that it decodes. Of a Whisper batch_size audios are counted too
    """
    if sequence_length is None:
        sequence_length = getattr(model.config, "max_target_positions", 1024)
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
    of = getattr(model, "lowrank", None)
    if isinstance(of, whisper_converting.WhisperLowRank):
        full, latent = whisper_converting.memory(model, sequence_length, batch_size)
        held = whisper_converting.measured(model, sequence_length, batch_size) if measure else None
        return CacheMemory(full, latent, held)
    layers = of.layers if isinstance(of, record.LowRank) else {}
    kind = architecture_of(model)
    rotary = kind.rotary(model)
    full = latent = 0
    for number, attention in enumerate(kind.attentions(model)):
        _, kv_heads, dim = kind.heads(attention)
        window = kind.window(attention)
        tokens = batch_size * (sequence_length if window is None else min(sequence_length, window - 1))
        size = kind.output(attention).element_size()
        plain = tokens * 2 * kv_heads * dim * size
        full += plain
        held = layers.get(number)
        if held is None:
            latent += plain
            continue
        if not held.is_shared or number == held.group[0]:
            codes = attention.factors.codes
            latent += tokens * (held.width * size if codes is None else codes.bytes)
        if rotary is not None and held.positions_in == number:
            latent += 4 * tokens
    return CacheMemory(full, latent, _measured(model, sequence_length, batch_size) if measure else None)


@torch.no_grad()
def _measured(model, sequence_length, batch_size):
    cache = DynamicCache(config=model.config)
    tokens = torch.zeros(batch_size, sequence_length, dtype=torch.int64, device=model.device)
    model(input_ids=tokens, use_cache=True, logits_to_keep=1, **{CACHE: cache})
    held = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


def compute_perplexity(
    model: Any, tokenizer: Any, texts: Iterable[Any] | str, max_length: int = 512, batch_size: int = 8,
    stepwise: bool | None = None,
) -> float:  # fmt: skip
    """The perplexity of a token, over rows of at most max_length tokens.

    texts      as calibration: texts, lists of token ids, a `datasets` object, a file
    stepwise   read token by token, through the cache, as generate() does; by default where layers share latents, for a
               pass over a whole row attends to its own tokens by their own keys
    """
    of = getattr(model, "lowrank", None)
    if whisper_converting.is_whisper(model):
        raise ValueError(
            "compute_perplexity is for language models; a Whisper says what it hears: "
            "whisperkv.evaluation.compare() tries settings on recordings, by errors and likelihood"
        )
    if stepwise is None:
        stepwise = isinstance(of, record.LowRank) and any(each.is_shared for each in of.layers.values())
    rows = sorted(token_rows(texts, tokenizer, ALL, max_length, "texts"), key=len, reverse=True)
    return _perplexity(model, rows, batch_size, stepwise)


@torch.no_grad()
def _perplexity(model, rows, batch_size, stepwise):
    total, count = 0.0, 0
    for begin in range(0, len(rows), batch_size):
        batch = rows[begin : begin + batch_size]
        tokens = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True, padding_value=-100).to(model.device)
        given = tokens.clamp(min=0)  # what is behind a row's end is seen by none of its tokens
        if stepwise:
            cache = DynamicCache(config=model.config)
            logits = torch.cat([
                model(input_ids=given[:, place : place + 1], use_cache=True, **{CACHE: cache}).logits
                for place in range(given.shape[1] - 1)
            ], 1)  # fmt: skip
        else:
            logits = model(input_ids=given, use_cache=False).logits[:, :-1]
        labels = tokens[:, 1:]
        total += float(functional.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum"))
        count += int((labels >= 0).sum())
    return float(torch.tensor(total / count, dtype=torch.float64).exp())


def generate_samples(
    model: Any, tokenizer: Any, prompts: Sequence[Any], max_new_tokens: int = 64, **settings: Any
) -> list[str]:
    """What the model writes after each prompt; a Whisper, what it hears in each recording. Settings are those of
    generate().

    prompts  texts; of a Whisper recordings, samples at 16 kHz or files' names
    """
    if whisper_converting.is_whisper(model):
        return whisper_converting.transcripts(model, tokenizer, prompts, max_new_tokens, settings)
    written = []
    for prompt in prompts:
        given = tokenizer(prompt, return_tensors="pt").to(model.device)
        given = {name: given[name] for name in ("input_ids", "attention_mask")}
        tokens = model.generate(**given, max_new_tokens=max_new_tokens, **settings)
        written.append(tokenizer.decode(tokens[0, given["input_ids"].shape[1] :], skip_special_tokens=True))
    return written
