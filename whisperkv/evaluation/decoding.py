"""Decoding as figures need it: what generate() is told, and a given text through the cache."""

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch

from ..compat import CACHE

Item = TypeVar("Item")


def batches(items: Sequence[Item], size: int) -> list[Sequence[Item]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def language_options(model: Any, language: str = "en") -> dict[str, str]:
    """What generate() must be told: a multilingual model would spend a pass on finding the language."""
    return {"language": language, "task": "transcribe"} if model.generation_config.is_multilingual else {}


def start_tokens(model: Any, processor: Any, language: str = "en") -> list[int]:
    """What every transcript without timestamps begins with."""
    if model.generation_config.is_multilingual:
        processor.tokenizer.set_prefix_tokens(language=language, task="transcribe", predict_timestamps=False)
    return processor.tokenizer.prefix_tokens  # type: ignore[no-any-return]


def transcript_tokens(model: Any, sequence: torch.Tensor) -> list[int]:
    """What generate() returned for one window, to its end token."""
    end = model.generation_config.eos_token_id
    return [token for token in sequence.tolist() if token != end] + [end]


@torch.no_grad()
def forced(
    model: Any, features: torch.Tensor, prompts: Sequence[list[int]], transcripts: Sequence[list[int]]
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Teacher forcing through the cache, as in generate(): the prompts in one pass, then token by token.

    prompts, transcripts  a list of tokens a window
    Yields, for each step, the logits [rows, vocabulary], the tokens [rows] that stand there in the transcripts, and
    which rows are not over yet [rows].
    """
    rows, start, device = len(prompts), max(map(len, prompts)), features.device
    end = model.generation_config.eos_token_id
    tokens = torch.full((rows, start + max(map(len, transcripts))), end, device=device)
    mask = torch.ones_like(tokens)
    for row, (prompt, transcript) in enumerate(zip(prompts, transcripts)):
        tokens[row, start - len(prompt) : start + len(transcript)] = torch.tensor(prompt + transcript, device=device)
        mask[row, : start - len(prompt)] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    lengths = torch.tensor([start + len(transcript) for transcript in transcripts], device=device)
    padded = bool((mask == 0).any())

    states, cache, done = model.get_encoder()(features), None, 0
    for column in range(start, tokens.shape[1]):
        output = model(
            encoder_outputs=states,
            decoder_input_ids=tokens[:, done:column],
            decoder_attention_mask=mask[:, :column] if padded else None,
            decoder_position_ids=positions[:, done:column] if padded else None,
            use_cache=True,
            **{CACHE: cache},
        )
        cache, done = output[CACHE], column
        yield output.logits[:, -1], tokens[:, column], column < lengths


def nats_of_each(
    model: Any, features: torch.Tensor, prompts: Sequence[list[int]], transcripts: Sequence[list[int]]
) -> torch.Tensor:
    """Negative log-likelihood of each transcript, token by token through the cache: float64 [rows]."""
    total = torch.zeros(len(prompts), dtype=torch.float64)
    for logits, tokens, alive in forced(model, features, prompts, transcripts):
        losses = torch.nn.functional.cross_entropy(logits.float(), tokens, reduction="none")
        total += losses.double().where(alive, 0).cpu()
    return total


@torch.no_grad()
def nats_of_each_at_once(
    model: Any,
    features: torch.Tensor,
    prompts: Sequence[list[int]],
    transcripts: Sequence[list[int]],
    states: Any = None,
) -> torch.Tensor:
    """The same in one pass of the decoder, for prompts of one length and caches that keep every token.

    states  what the encoder says of the features, where it is known already
    """
    start, lengths = len(prompts[0]), [len(transcript) for transcript in transcripts]
    assert all(len(prompt) == start for prompt in prompts)
    tokens = torch.full((len(prompts), start + max(lengths)), model.generation_config.eos_token_id)
    for row, (prompt, transcript) in enumerate(zip(prompts, transcripts)):
        tokens[row, : start + len(transcript)] = torch.tensor(prompt + transcript)
    tokens = tokens.to(features.device)
    states = model.get_encoder()(features) if states is None else states
    output = model(encoder_outputs=states, decoder_input_ids=tokens[:, :-1], use_cache=True)
    alive = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    logits = output.logits[:, start - 1 :][alive].float()  # [tokens, vocabulary]: summed exactly along the last only
    losses = torch.nn.functional.cross_entropy(logits, tokens[:, start:][alive], reduction="none")
    return torch.stack([each.sum(dtype=torch.float64).cpu() for each in losses.split(lengths)])
