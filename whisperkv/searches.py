"""Greedy search, sampling and beam search as generate() of transformers does them, token for token, with less between
two passes of the decoder: the logits processors overwrite one copy of the scores (logits.py), beams are picked by one
look at the scores instead of a sort, and what beams have said is kept as places in a table and put together at the end.
"""

import inspect
import weakref

import torch
from transformers.generation import EosTokenCriteria, GenerationMode, MaxLengthCriteria
from transformers.generation.utils import (
    GENERATION_MODES_MAPPING,
    GenerateBeamEncoderDecoderOutput,
    GenerateEncoderDecoderOutput,
    GenerationMixin,
)

from . import ops
from .compat import BEAM_HELPERS, CACHE, KNOWS_BEAM_SEARCH, SORTS_DRAWN_BEAMS
from .logits import Processors

_BEAMS = (GenerationMode.BEAM_SEARCH, GenerationMode.BEAM_SAMPLE)
_IDS = "decoder_input_ids"
_SINGLE = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def search(
    model, input_ids, logits_processor, stopping_criteria, generation_config, inputs_tensor=None, **model_kwargs
):
    """What generate() calls as its custom_generate: a search of ours, or the one it would have called."""
    mode = generation_config.get_generation_mode()
    name = GENERATION_MODES_MAPPING[mode]
    if "/" in name:
        model._get_deprecated_gen_repo(mode, trust_remote_code=None)  # says what is wrong
    ours = _search_for(mode, model, input_ids, generation_config, model_kwargs)
    if ours is None:
        ours = getattr(type(model), name)
        if mode == GenerationMode.ASSISTED_GENERATION:
            model_kwargs["inputs_tensor"] = inputs_tensor
    return ours(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        **model_kwargs,
    )


def _search_for(mode, model, input_ids, config, model_kwargs):
    """Ours, or None if it is left to transformers."""
    known = input_ids.device.type in ("cpu", "cuda") and model.device.type == input_ids.device.type
    if not known or model._valid_auto_compile_criteria(model_kwargs, config):
        return None
    if mode in _SINGLE:
        return _sample
    return _beam_search if mode in _BEAMS and not config.low_memory and KNOWS_BEAM_SEARCH else None


class Passes:
    """The passes of the model in one search, and what is to be returned of each."""

    def __init__(self, model, input_ids, config, model_kwargs):
        self.model, self.config, self.model_kwargs = model, config, model_kwargs
        wanted = config.return_dict_in_generate
        self.wants_scores, self.wants_logits = wanted and config.output_scores, wanted and config.output_logits
        self.wants_attentions = wanted and config.output_attentions
        self.wants_states = wanted and config.output_hidden_states
        self.scores = () if self.wants_scores else None
        self.logits = () if self.wants_logits else None
        self.attentions = self.cross_attentions = () if self.wants_attentions else None
        self.states = () if self.wants_states else None
        self._names = None  # of what every step is given, once it is known to be the same
        self._outputs = model._prefill(input_ids, config, model_kwargs, is_first_iteration=not config.is_assistant)

    def next_logits(self, ids, copy=True):
        """float32 [rows, vocabulary] of the tokens so far; copies may be overwritten."""
        if self._outputs is None:
            self._outputs = self.model(**self._inputs(ids), return_dict=True)
        outputs, self._outputs = self._outputs, None
        self.model_kwargs = self.model._update_model_kwargs_for_generation(
            outputs, self.model_kwargs, is_encoder_decoder=True
        )
        logits = outputs.logits[:, -1].to(copy=copy, dtype=torch.float32, device=ids.device)
        if self.wants_logits:
            self.logits += (logits.clone(),)
        if self.wants_attentions:
            self.attentions += (outputs.decoder_attentions,)
            self.cross_attentions += (outputs.cross_attentions,)
        if self.wants_states:
            self.states += (outputs.decoder_hidden_states,)
        return logits

    def _inputs(self, ids):
        """Of one step. What transformers once prepares of plain arguments is those arguments and the last tokens, in
        every step; a mask, or a method of somebody else's, is another matter."""
        arguments = self.model_kwargs
        if self._names is not None:
            inputs = {name: arguments[name] for name in self._names}
            return {**inputs, _IDS: ids[:, -1:].clone(memory_format=torch.contiguous_format)}
        length = 1 if arguments["use_cache"] else None
        inputs = self.model.prepare_inputs_for_generation(ids, next_sequence_length=length, **arguments)
        names = [name for name in inputs if name != _IDS]
        is_theirs = self.model.prepare_inputs_for_generation.__module__.startswith("transformers.")
        if is_theirs and length == 1 and all(inputs[name] is arguments.get(name) for name in names):
            self._names = names
        return inputs

    @property
    def cache(self):
        return self.model_kwargs.get(CACHE)

    def output(self, kind, **fields):
        if not self.config.return_dict_in_generate:
            return fields["sequences"]
        encoder = self.model_kwargs["encoder_outputs"]
        return kind(
            scores=self.scores,
            logits=self.logits,
            encoder_attentions=encoder.get("attentions") if self.wants_attentions else None,
            encoder_hidden_states=encoder.get("hidden_states") if self.wants_states else None,
            decoder_attentions=self.attentions,
            cross_attentions=self.cross_attentions,
            decoder_hidden_states=self.states,
            **{CACHE: self.cache},
            **fields,
        )


class Ends:
    """Stopping criteria: those of length and end of text are seen in the last token alone."""

    def __init__(self, criteria):
        self._criteria = criteria
        self.are_plain = all(map(_is_plain, criteria))
        self._ends = [each.eos_token_id for each in criteria if type(each) is EosTokenCriteria]
        self._longest = min([each.max_length for each in criteria if type(each) is MaxLengthCriteria], default=None)

    def __call__(self, tokens, length, ids, scores):
        """bool, of the last tokens of sequences of so many; ids() gives the sequences whole, [rows, length]."""
        if not self.are_plain:
            return self._criteria(ids(), scores).view(tokens.shape)
        if self._longest is not None and length >= self._longest:
            return torch.ones_like(tokens, dtype=torch.bool)
        done = torch.zeros_like(tokens, dtype=torch.bool)
        for ends in self._ends:
            done |= (tokens[..., None] == ends.to(tokens.device)).any(-1)
        return done


def _is_plain(criterion):
    if type(criterion) is MaxLengthCriteria:
        return criterion.max_position_embeddings is None  # else it may have a warning to give
    return type(criterion) is EosTokenCriteria


def _sample(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Greedy search, or a token drawn at random."""
    passes = Passes(model, input_ids, generation_config, model_kwargs)
    processors, ends = Processors(logits_processor), Ends(stopping_criteria)
    pads = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    padding = generation_config._pad_token_tensor
    padding = None if padding is None else padding.to(input_ids.device)
    ids, unfinished = input_ids, torch.ones(len(input_ids), dtype=torch.long, device=input_ids.device)
    while True:
        scores = processors(ids, passes.next_logits(ids))
        if passes.wants_scores:
            passes.scores += (scores,)
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = best_tokens(scores)
        if pads:
            tokens = tokens * unfinished + padding * (1 - unfinished)
        ids = torch.cat([ids, tokens[:, None]], dim=-1)
        done = ends(tokens, ids.shape[1], lambda: ids, passes.scores)  # noqa: B023
        unfinished = unfinished & ~done
        if not unfinished.any():
            return passes.output(GenerateEncoderDecoderOutput, sequences=ids)


def _beam_search(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs):
    """Beams, the likeliest or drawn at random. A candidate is named by its place: step * candidates + which."""
    config, device, beams = generation_config, input_ids.device, generation_config.num_beams
    audios, prompt = len(input_ids) // beams, input_ids.shape[1]
    count = max(2, 1 + (0 if config._eos_token_tensor is None else len(config._eos_token_tensor))) * beams
    passes = Passes(model, input_ids, config, model_kwargs)
    processors, ends = Processors(logits_processor), Ends(stopping_criteria)
    is_top = torch.arange(count, device=device) < beams
    offsets = torch.arange(audios, device=device)[:, None] * beams

    ids, history = input_ids, History(audios, beams, count, device)
    running = torch.full((audios, beams), -1e9, device=device)  # scores: the beams of an audio begin as one
    running[:, 0] = 0
    best = torch.full((audios, beams), -1e9, device=device)
    places = torch.full((audios, beams), -1, device=device)  # of what is finished
    is_finished = torch.zeros((audios, beams), dtype=torch.bool, device=device)
    may_improve = torch.ones((audios, 1), dtype=torch.bool, device=device)
    likelihoods = None  # written into again where nobody else has them

    while True:
        length = ids.shape[1]
        likelihoods = torch.log_softmax(passes.next_logits(ids, copy=False), -1, out=likelihoods)
        scores = processors(ids, likelihoods)
        if not processors.keep_nothing:
            likelihoods = None
        if passes.wants_scores:
            passes.scores += (scores.clone(),)
        vocabulary = scores.shape[-1]
        if config.do_sample:
            totals = (scores.view(audios, beams, -1) + running[:, :, None]).view(audios, -1)
            chosen = torch.multinomial(totals.softmax(-1), num_samples=count)
            totals = totals.gather(1, chosen)
            if SORTS_DRAWN_BEAMS:
                totals, order = totals.sort(-1, descending=True)
                chosen = chosen.gather(1, order)
        else:
            totals, chosen = best_continuations(scores, running, count)
        tokens, parents = chosen % vocabulary, chosen // vocabulary + offsets
        new = history.add(tokens, parents)
        whole = lambda: torch.cat([ids[parents.flatten()], tokens.view(-1, 1)], -1)  # noqa: B023, E731
        done = ends(tokens, length + 1, whole, passes.scores)
        picked, running, _ = model._get_running_beams_for_next_iteration(
            topk_log_probs=totals,
            topk_running_sequences=new,
            topk_running_beam_indices=parents,
            next_token_hits_stopping_criteria=done,
            num_beams=beams,
        )
        places, best, _, is_finished = model._update_finished_beams(
            sequences=places,
            topk_running_sequences=new,
            beam_scores=best,
            topk_log_probs=totals,
            beam_indices=places,
            topk_running_beam_indices=new,
            is_early_stop_heuristic_unsatisfied=may_improve,
            is_sent_finished=is_finished,
            next_token_hits_stopping_criteria=done,
            top_num_beam_mask=is_top,
            num_beams=beams,
            cur_len=length,
            decoder_prompt_len=prompt,
            length_penalty=config.length_penalty,
            early_stopping=config.early_stopping,
        )
        rows, tokens = history.go_on(picked)
        ids = torch.cat([ids.index_select(0, rows), tokens[:, None]], -1)
        if passes.cache is not None:
            passes.cache.reorder_cache(rows)
        may_improve = model._check_early_stop_heuristic(
            is_early_stop_heuristic_unsatisfied=may_improve,
            running_beam_scores=running,
            beam_scores=best,
            is_sent_finished=is_finished,
            cur_len=length + 1,
            max_length=config.max_length,
            decoder_prompt_len=prompt,
            early_stopping=config.early_stopping,
            length_penalty=config.length_penalty,
        )
        if not model._beam_search_has_unfinished_sequences(may_improve, is_finished, done, config.early_stopping):
            break

    returned = config.num_return_sequences
    tokens, rows = history.told(places[:, :returned])
    said = (rows >= 0).sum(1).max()
    start = input_ids.view(audios, beams, -1)[:, :returned].flatten(0, 1)
    filler = config._eos_token_tensor
    filler = -1 if filler is None else config._pad_token_tensor or filler[0]
    sequences = torch.cat([start, torch.where(rows >= 0, tokens, filler)[:, :said]], 1)
    scores = best[:, :returned].flatten() if config.output_scores else None
    return passes.output(
        GenerateBeamEncoderDecoderOutput, sequences=sequences, sequences_scores=scores, beam_indices=rows[:, :said]
    )


def best_tokens(scores):
    """argmax of [rows, vocabulary], NaN before all numbers, the first of equal ones."""
    if not ops.chooses(scores):
        return scores.argmax(-1)
    scores = scores.contiguous()
    return ops.choose_tokens(scores[:, None], scores.new_zeros((len(scores), 1)), 1)[1][:, 0]


def best_continuations(scores, running, count):
    """topk of each audio's [beams * vocabulary] scores, those of its beams added. Which of equal scores come first is
    torch's own affair: it is asked where there are any."""
    scores = scores.view(*running.shape, -1)
    if ops.chooses(scores) and count < scores[0].numel():
        totals, places = ops.choose_tokens(scores.contiguous(), running, count + 1)
        if bool((totals[:, :-1] > totals[:, 1:]).all()):  # never of NaN
            return totals[:, :-1], places[:, :-1]
    return (scores + running[:, :, None]).flatten(1).topk(count)


class History:
    """The candidates of each step: their tokens, and the rows that they went on from."""

    def __init__(self, audios, beams, count, device):
        self._tokens, self._rows, self._picked = [], [], []
        self._count = count
        self._which = torch.arange(count, device=device).repeat(audios, 1)

    def add(self, tokens, rows):
        """int64 [audios, count] each; returns the places of the candidates."""
        self._tokens.append(tokens)
        self._rows.append(rows)
        return self._which + (len(self._tokens) - 1) * self._count

    def go_on(self, places):
        """[audios, beams], of this step's candidates: the rows that the beams go on from, and their new tokens."""
        which = places - (len(self._tokens) - 1) * self._count
        self._picked.append(which)
        return (all_of[-1].gather(1, which).flatten() for all_of in (self._rows, self._tokens))

    def told(self, places):
        """The tokens that lead to candidates [audios, some], and the rows of each: [audios * some, steps], the rows
        int32, -1 after the end."""
        beams = self._picked[0].shape[1]
        steps, own = places.div(self._count, rounding_mode="floor"), places % self._count
        which, row, tokens, rows = own, None, [], []
        for step in reversed(range(len(self._tokens))):
            is_said = steps >= step
            if step + 1 < len(self._tokens):  # which of this step's candidates it came from
                came_from = self._picked[step].gather(1, row % beams)
                which = torch.where(steps == step, own, came_from)
            row = self._rows[step].gather(1, which)
            tokens.append(self._tokens[step].gather(1, which))
            rows.append(row.where(is_said, -1))
        tokens, rows = (torch.stack(each[::-1], -1).flatten(0, 1) for each in (tokens, rows))
        return tokens, rows.int()


# Where generate() finds them


class Method:
    """A method of a patched model, an attribute of the instance."""

    def __init__(self, model):
        self.model = weakref.ref(model)  # which has this as an attribute

    def __reduce__(self):
        return type(self), (self.model(),)

    @classmethod
    def of_class(cls, model):
        """What it stands before."""
        return inspect.getattr_static(type(model), cls.NAME).__get__(model, type(model))


class Fallback(Method):
    """Names our searches to generate() where nothing is asked that they do not know."""

    NAME = "generate_with_fallback"

    def __call__(self, *args, **given):
        model, options = self.model(), given.get("kwargs")
        if options is not None and not given.get("synced_gpus") and _is_plain_call(options) and _is_own(model):
            given["kwargs"] = {**options, "custom_generate": search}
        return self.of_class(model)(*args, **given)


class Expansion(Method):
    """Leaves the encoder's output as it is, once for each audio: what the decoder carries (adoption.py) finds out which
    rows decode it."""

    NAME = "_expand_inputs_for_generation"

    def __call__(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        expand, outputs = self.of_class(self.model()), model_kwargs.get("encoder_outputs")
        states = outputs.get("last_hidden_state") if isinstance(outputs, dict) else None
        if states is not None:
            outputs["last_hidden_state"] = states[:, :0]
        try:
            return expand(
                expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
            )
        finally:
            if states is not None:
                outputs["last_hidden_state"] = states


_THEIRS = {
    name: getattr(GenerationMixin, name, None)
    for name in ("_sample", "_beam_search", "_get_top_k_continuations", *BEAM_HELPERS)
}
_UNKNOWN = ("custom_generate", "streamer", "assistant_model", "tokenizer", "assistant_tokenizer", "trust_remote_code")


def _is_plain_call(options):
    is_distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not is_distributed and all(options.get(name) is None for name in _UNKNOWN)


def _is_own(model):
    """Whether the methods that our searches stand for, and those they borrow, are transformers' and nobody else's."""
    return all(getattr(type(model), name, None) is method for name, method in _THEIRS.items())


def install(model, share_beams):
    """Into a model whose generate() calls these methods, where nobody else has put one in their place."""
    for method in (Fallback, Expansion) if share_beams else (Fallback,):
        if hasattr(type(model), Fallback.NAME) and method.NAME not in vars(model):
            setattr(model, method.NAME, method(model))


def uninstall(model):
    for method in (Fallback, Expansion):
        if type(vars(model).get(method.NAME)) is method:
            delattr(model, method.NAME)
