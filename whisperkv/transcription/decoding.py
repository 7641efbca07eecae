"""Windows of audio to attempts at a transcript, in batches: the temperature fallback, and what it is decided by."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationMixin, LogitsProcessor, LogitsProcessorList, WhisperTimeStampLogitsProcessor
from transformers.modeling_outputs import BaseModelOutput

from ..features import log_mel
from ..searches import search
from .audio import Samples
from .results import REPEATED, compression_ratio
from .settings import Settings

MOST = 224  # tokens of a window, as in openai-whisper
LOOP = re.compile(rf"{REPEATED}|(?:^| )((?:\S+ ){{1,3}}?)\2{{5}}")  # 4 words three times, or 1 six times


@dataclass
class Attempt:
    """What was heard in a window."""

    tokens: list[int]  # without the start tokens and the end token
    text: str
    temperature: float
    avg_logprob: float
    compression_ratio: float
    no_speech_prob: float
    language: str
    language_probability: float

    @property
    def is_whole(self) -> bool:
        """Whether it ended by itself."""
        return len(self.tokens) < MOST

    @property
    def loops(self) -> bool:
        """Whether it says the same over and over."""
        return bool(LOOP.search(" ".join(re.findall(r"[\w']+", self.text.lower())) + " "))


@dataclass
class Heard:
    """A batch of windows in the encoder's words, with one attempt each."""

    states: torch.Tensor  # [windows, frames, width]
    attempts: list[Attempt]


class Decoder:
    """A patched Whisper and its processor."""

    def __init__(self, model: Any, processor: Any, settings: Settings) -> None:
        self.model, self.extractor, self.tokenizer = model, processor.feature_extractor, processor.tokenizer
        self.settings, self.config = settings, model.generation_config
        self.languages = {
            id: text.strip("<|>") for text, id in (getattr(self.config, "lang_to_id", None) or {}).items()
        }
        settings.check_model(bool(self.languages))
        self.first_time = self.config.no_timestamps_token_id + 1
        self.no_speech = self.config.no_timestamps_token_id - 1
        self.most_prompt = model.config.max_target_positions // 2 - 1

    def prompt_of(self, text: str) -> list[int]:
        return self.tokenizer.encode(" " + text.strip(), add_special_tokens=False)

    def text_of(self, tokens: list[int]) -> str:
        """Without timestamps and other special tokens."""
        return self.tokenizer.decode([one for one in tokens if one < self.config.eos_token_id])

    @torch.no_grad()
    def hear(self, audios: Sequence[Samples], prompts: Sequence[list[int]], languages: Sequence[str | None]) -> Heard:
        """The best attempt at each audio of up to 30 s that the temperatures yield. languages: None is to be heard."""
        features = log_mel(list(audios), self.extractor).to(self.model.device, self.model.dtype)
        states = self.model.get_encoder()(features, return_dict=True).last_hidden_state
        silence, spoken = self._beginnings(states, languages)
        rows = list(range(len(audios)))
        best: list[Any] = [None] * len(audios)
        for temperature in self.settings.temperatures:
            found = self._attempts(
                states[rows], [prompts[row] for row in rows], [spoken[row] for row in rows], temperature
            )
            for row, (tokens, logprob) in zip(rows, found):
                text = self.text_of(tokens)
                attempt = Attempt(
                    tokens, text, temperature, logprob, compression_ratio(text), silence[row], *spoken[row]
                )
                best[row] = self._better(best[row], attempt)
            rows = [row for row in rows if self._is_wanting(best[row])]
            if not rows:
                break
        return Heard(states, best)

    def is_silence(self, attempt: Attempt) -> bool:
        """Whether nobody speaks, and the text is made up."""
        limits = self.settings
        if limits.no_speech_threshold is None or attempt.no_speech_prob <= limits.no_speech_threshold:
            return False
        return limits.logprob_threshold is None or attempt.avg_logprob < limits.logprob_threshold

    def _is_wanting(self, attempt):
        if self.is_silence(attempt):
            return False
        return self._repeats(attempt) or self._is_unsure(attempt)

    def _repeats(self, attempt):
        limit = self.settings.compression_ratio_threshold
        return limit is not None and (attempt.compression_ratio > limit or attempt.loops)

    def _is_unsure(self, attempt):
        limit = self.settings.logprob_threshold
        return limit is not None and attempt.avg_logprob < limit

    def _better(self, old, new):
        """Of two attempts, that which does not repeat itself, then the likelier."""
        if old is None:
            return new
        rank = lambda one: (not self._repeats(one), one.avg_logprob)  # noqa: E731
        return max(old, new, key=rank)

    def _beginnings(self, states, given):
        """([probability that nobody speaks], [(language, probability)]) by the first token of each transcript."""
        wanted = torch.full((len(states), 1), self.config.decoder_start_token_id, device=states.device)
        output = self.model(encoder_outputs=BaseModelOutput(last_hidden_state=states), decoder_input_ids=wanted)
        logits = output.logits[:, 0].float()
        silence = logits.softmax(-1)[:, self.no_speech].tolist()
        if not self.languages:
            return silence, [("en", 1.0)] * len(states)
        ids = list(self.languages)
        chances, which = logits[:, ids].softmax(-1).max(-1)
        heard = [(self.languages[ids[at]], chance) for at, chance in zip(which.tolist(), chances.tolist())]
        return silence, [(one, 1.0) if one else found for one, found in zip(given, heard)]

    def start(self, language: str) -> list[int]:
        """The start tokens, without a prompt."""
        start = [self.config.decoder_start_token_id]
        if self.languages:
            start += [self.config.lang_to_id[f"<|{language}|>"], self.config.task_to_id[self.settings.task]]
        return start

    def _attempts(self, states, prompts, spoken, temperature):
        """[(tokens, avg_logprob)] of one search."""
        starts = [self.start(language) for language, _ in spoken]
        begun = [
            ([self.config.prev_sot_token_id, *prompt[-self.most_prompt :]] if prompt else []) + start
            for prompt, start in zip(prompts, starts)
        ]
        length, pad = max(map(len, begun)), self.config.pad_token_id
        ids = torch.tensor([[pad] * (length - len(row)) + row for row in begun], device=states.device)
        options: dict[str, Any] = {}
        if any(len(row) < length for row in begun):
            mask = [[0] * (length - len(row)) + [1] * len(row) for row in begun]
            options["decoder_attention_mask"] = torch.tensor(mask, device=states.device)
        if temperature > 0:
            options |= {"do_sample": True, "temperature": temperature, "top_k": 0}
        else:
            options |= {"do_sample": False, "num_beams": self.settings.beam_size}
        likelihoods = Likelihoods(self.config.eos_token_id, len(begun))
        times = WhisperTimeStampLogitsProcessor(self.config, begin_index=length)
        with torch.random.fork_rng(devices=[states.device] if states.is_cuda else []):
            torch.manual_seed(self.settings.seed)
            found = GenerationMixin.generate(
                self.model,
                encoder_outputs=BaseModelOutput(last_hidden_state=states),
                attention_mask=torch.ones(states.shape[:2], dtype=torch.long, device=states.device),  # all of it
                decoder_input_ids=ids,
                max_length=min(length + MOST, self.model.config.max_target_positions),
                logits_processor=LogitsProcessorList([times, likelihoods]),
                custom_generate=search,
                **options,
            )
        end = self.config.eos_token_id
        for number, row in enumerate(found[:, length:].tolist()):
            tokens = row[: row.index(end)] if end in row else row
            yield tokens, likelihoods.of(number, tokens, end in row) / (len(tokens) + 1)


class Likelihoods(LogitsProcessor):
    """Notes the log probabilities of the tokens as they are chosen, of every row that goes on. Nothing is changed.

    generate() would return the scores of all steps, hundreds of megabytes; here it is one number a row and step. A row
    is known by its tokens, as beams trade places.
    """

    def __init__(self, end: int, audios: int) -> None:
        self._end, self._audios, self._begin = end, audios, 0
        self._sums: list[dict[bytes, float]] = [{} for _ in range(audios)]  # of the tokens so far, without the end
        self._ends: list[dict[bytes, float]] = [{} for _ in range(audios)]  # of the same and the end
        self._last: tuple[list[bytes], torch.Tensor, torch.Tensor] | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self._last is None:
            self._begin = input_ids.shape[1]
        rows = [row.tobytes() for row in input_ids[:, self._begin :].cpu().numpy()]
        self._note(rows, input_ids[:, -1])
        likelihoods = scores.float()
        totals = likelihoods.logsumexp(-1)
        for number, (row, chance) in enumerate(zip(rows, (likelihoods[:, self._end] - totals).tolist())):
            audio = number * self._audios // len(rows)
            self._ends[audio][row] = self._sums[audio].get(row, 0.0) + chance
        self._last = rows, likelihoods, totals
        return scores

    def of(self, audio: int, tokens: list[int], is_ended: bool) -> float:
        """The sum of the tokens' log probabilities, the end token's with them."""
        if is_ended or self._last is None:
            return self._ends[audio].get(self._key(tokens), float("-inf"))
        before, (rows, likelihoods, totals) = self._key(tokens[:-1]), self._last
        share = len(rows) // self._audios
        row = rows.index(before, audio * share, (audio + 1) * share)
        return self._sums[audio][before] + float(likelihoods[row, tokens[-1]] - totals[row])

    def _note(self, rows, tokens):
        """What the last step has added to these rows."""
        if self._last is None:
            for sums in self._sums:
                sums[b""] = 0.0
            return
        before, likelihoods, totals = self._last
        share = len(rows) // self._audios
        parents = []
        for number, row in enumerate(rows):
            first = number // share * share
            try:
                parents.append(before.index(row[:-8], first, first + share))
            except ValueError:  # of an audio that has ended, whose rows say anything
                parents.append(number)
        origins = torch.tensor(parents, device=tokens.device)
        chances = (likelihoods[origins, tokens] - totals[origins]).tolist()
        for number, (row, chance) in enumerate(zip(rows, chances)):
            sums = self._sums[number // share]
            sums[row] = sums.get(row[:-8], 0.0) + chance

    @staticmethod
    def _key(tokens):
        return torch.tensor(tokens, dtype=torch.int64).numpy().tobytes()
