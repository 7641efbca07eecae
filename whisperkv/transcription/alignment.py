"""When each word was said: the cross-attention of a window's whole text, by dynamic time warping, as openai-whisper."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers.models.whisper.generation_whisper import _median_filter
from transformers.models.whisper.tokenization_whisper import LANGUAGES, _combine_tokens_into_words

from .decoding import Attempt, Decoder
from .phrases import STEP, Phrase
from .results import Word

SENTENCE_ENDS = ".。!！?？"
LONGEST_TYPICAL = 0.7  # seconds that the middle one of a window's words may take


class Aligner:
    def __init__(self, decoder: Decoder) -> None:
        self.decoder, config = decoder, decoder.config
        heads = getattr(config, "alignment_heads", None)
        if not heads:
            raise ValueError(
                "word_timestamps=True: the generation config has no alignment_heads; take it from the original model"
            )
        self.heads: dict[int, list[int]] = {}
        for layer, head in heads:
            self.heads.setdefault(layer, []).append(head)

    def words(
        self, states: torch.Tensor, attempt: Attempt, seconds: float
    ) -> Callable[[list[Phrase]], list[list[Word]]]:
        """A function that gives phrases of the attempt their words. states [frames, width]"""
        return lambda found: self._words(states, attempt, seconds, found)

    def _words(self, states, attempt, seconds, found):
        end = self.decoder.config.eos_token_id
        texts = [[token for token in phrase.tokens if token < end] for phrase in found]
        tokens = [token for text in texts for token in text]
        if not tokens:
            return [[] for _ in found]
        start = [*self.decoder.start(attempt.language), self.decoder.config.no_timestamps_token_id]
        frames = max(int(seconds / STEP), 1)
        weights, chances = self._weights(states, start, tokens, frames)
        spans = token_times(weights, self.decoder.model.config.median_filter_width)
        words = [word for number, text in enumerate(texts) for word in self._of(text, attempt.language, number)]
        timed, at = [], 0
        for text, count, number in words:
            pieces = spans[at : at + count]
            chance = float(np.mean(chances[at : at + count]))
            timed.append((number, Word(float(pieces[0][0]), float(pieces[-1][1]), text, chance)))
            at += count
        shorten([word for _, word in timed])
        return [[word for number, word in timed if number == phrase] for phrase in range(len(found))]

    def _of(self, tokens, language, number):
        """(text, how many tokens, phrase) of each word."""
        words, pieces, _ = _combine_tokens_into_words(self.decoder.tokenizer, tokens, LANGUAGES.get(language))
        return [(word, len(piece), number) for word, piece in zip(words, pieces) if piece]

    @torch.no_grad()
    def _weights(self, states, start, tokens, frames):
        """The attention of the alignment heads, [heads, tokens + 1, frames], and the tokens' probabilities.

        Where a token is said is looked at when it is foretold, at the one before it; the last is the end token's.
        """
        model, device = self.decoder.model, states.device
        heard = states[None, :frames]
        ids = torch.tensor([[*start, *tokens, self.decoder.config.eos_token_id]], device=device)
        seen: list[torch.Tensor] = []
        hooks = [
            model.model.decoder.layers[layer].encoder_attn.register_forward_pre_hook(
                lambda attention, args, given, heads=heads: seen.append(
                    _attention(attention, args[0] if args else given["hidden_states"], heard, heads)
                ),
                with_kwargs=True,
            )
            for layer, heads in self.heads.items()
        ]
        try:
            output = model.model.decoder(input_ids=ids, encoder_hidden_states=states[None], use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        first = len(start)
        weights = torch.cat(seen)[:, : ids.shape[1]]
        std, mean = torch.std_mean(weights, dim=-2, keepdim=True, unbiased=False)
        weights = ((weights - mean) / std.clamp(min=1e-8))[:, first - 1 : -1]
        hidden = output.last_hidden_state[0, first - 1 : -2]
        logits = model.proj_out(hidden)[:, : self.decoder.config.eos_token_id].float()
        chances = logits.softmax(-1).gather(-1, ids[0, first:-1, None])[:, 0]
        return weights, chances.cpu().numpy()


def _attention(attention: Any, hidden: torch.Tensor, heard: torch.Tensor, heads: list[int]) -> torch.Tensor:
    """float32 [heads, tokens, frames] of a cross-attention."""
    split = lambda x: x[0].unflatten(-1, (attention.num_heads, -1)).transpose(0, 1)[heads].float()  # noqa: E731
    query, key = split(attention.q_proj(hidden)), split(attention.k_proj(heard))
    return (attention.scaling * (query @ key.transpose(1, 2))).softmax(-1)


def token_times(weights: torch.Tensor, width: int) -> list[tuple[float, float]]:
    """(begin, end) in seconds of each token. weights [heads, tokens + 1, frames]; width: of the median filter."""
    matrix = _median_filter(weights, width).mean(0)
    tokens, frames = warping_path(-matrix.double().cpu().numpy())
    jumps = np.pad(np.diff(tokens), (1, 0), constant_values=1).astype(bool)
    begins = frames[jumps] * STEP
    return list(zip(begins, begins[1:]))


def warping_path(costs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cheapest way through costs [tokens, frames], steps right, down or both: (tokens, frames) along it.

    The same as transformers' _dynamic_time_warping, a diagonal at once.
    """
    rows, columns = costs.shape
    total = np.full((rows + 1, columns + 1), np.inf, np.float32)
    moves = np.full((rows + 1, columns + 1), 2, np.int8)  # 0 both, 1 down, 2 right
    total[0, 0] = 0
    for diagonal in range(2, rows + columns + 1):
        i = np.arange(max(1, diagonal - columns), min(rows, diagonal - 1) + 1)
        j = diagonal - i
        both, down, right = total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]
        move = np.where((both < down) & (both < right), 0, np.where((down < both) & (down < right), 1, 2))
        total[i, j] = costs[i - 1, j - 1] + np.choose(move, (both, down, right))
        moves[i, j] = move
    moves[:, 0], moves[0, :] = 1, 2
    i, j, path = rows, columns, []
    while i > 0 or j > 0:
        path.append((i - 1, j - 1))
        move = moves[i, j]
        i, j = i - (move != 2), j - (move != 1)
    tokens, frames = np.array(path[::-1]).T
    return tokens, frames


def shorten(words: list[Word]) -> None:
    """Attention stays with a word through the pause before or after it: at the ends of sentences, no word lasts longer
    than twice the middle one."""
    durations = [word.end - word.start for word in words if word.end > word.start]
    if not durations:
        return
    longest = 2 * min(LONGEST_TYPICAL, float(np.median(durations)))
    for number, word in enumerate(words):
        if word.end - word.start <= longest:
            continue
        if word.word.strip()[-1:] in SENTENCE_ENDS:
            word.end = word.start + longest
        elif number == 0 or words[number - 1].word.strip()[-1:] in SENTENCE_ENDS:
            word.start = word.end - longest
