"""What the logits processors of Whisper do to a step's scores, written into the scores and not into copies of them.

Those of transformers find the suppressed tokens by comparing the whole vocabulary with them, token after token. Here
their numbers are looked up once for a generate().
"""

from transformers.generation import logits_process as theirs

NEVER = float("-inf")


class Processors:
    """A list of logits processors; `scores` may be overwritten. Those that we do not know are called as they are, and
    may keep what they are given."""

    def __init__(self, processors):
        self._processors = processors
        self._steps = None  # made for the first scores

    def __call__(self, ids, scores):
        """ids [rows, tokens], scores [rows, vocabulary]."""
        if self._steps is None:
            self._steps = self._made(scores)
        is_ours = True
        for known, step in self._steps:
            scores = step(ids, scores if is_ours or not known else scores.clone())
            is_ours = known
        return scores

    @property
    def keep_nothing(self):
        """Whether the scores that they were given are nobody else's after a call."""
        return all(known for known, _ in self._steps)

    def _made(self, scores):
        if type(self._processors) is not theirs.LogitsProcessorList:
            return [(False, self._processors)]
        steps = []
        for processor in self._processors:
            make = _KNOWN.get(type(processor))
            if make is not None:
                steps.append((True, make(processor, scores)))
            else:
                steps.append((False, theirs.LogitsProcessorList([processor])))
        return steps


def _tokens(numbers, scores):
    """Those of a list that are in the vocabulary, as an index of its scores."""
    numbers = numbers.to(scores.device)
    return numbers[(numbers >= 0) & (numbers < scores.shape[-1])]


def _suppress(processor, scores):
    tokens = _tokens(processor.suppress_tokens, scores)
    return lambda ids, scores: scores.index_fill_(1, tokens, NEVER)


def _suppress_at_begin(processor, scores):
    tokens = _tokens(processor.begin_suppress_tokens, scores)
    return lambda ids, scores: scores.index_fill_(1, tokens, NEVER) if ids.shape[1] == processor.begin_index else scores


def _min_length(processor, scores):
    ends = _tokens(processor.eos_token_id, scores)
    return lambda ids, scores: scores.index_fill_(1, ends, NEVER) if ids.shape[1] < processor.min_length else scores


def _min_new_tokens(processor, scores):
    ends, least = _tokens(processor.eos_token_id, scores), processor.prompt_length_to_skip + processor.min_new_tokens
    return lambda ids, scores: scores.index_fill_(1, ends, NEVER) if ids.shape[1] < least else scores


def _temperature(processor, scores):
    return lambda ids, scores: scores.div_(processor.temperature)


def _as_it_is(processor, scores):
    """One that keeps nothing of the scores; what it returns is new, or what it was given."""
    return processor


def _timestamps(processor, scores):
    first, end = processor.timestamp_begin, processor.eos_token_id

    def step(ids, scores):
        begin = processor.begin_index
        scores[:, processor.no_timestamps_token_id] = NEVER
        for row, tokens in enumerate(ids[:, begin:].tolist()):
            last_is_time = bool(tokens) and tokens[-1] >= first
            is_closed = len(tokens) < 2 or tokens[-2] >= first  # or nothing has been opened yet
            if last_is_time:  # times come in pairs, but for the last one
                scores[row, slice(first, None) if is_closed else slice(end)] = NEVER
            time = next((token for token in reversed(tokens) if token >= first), None)
            if time is not None:  # they do not go back, and none is said twice but to open where another one closed
                scores[row, first : time if last_is_time and not is_closed else time + 1] = NEVER
        if ids.shape[1] == begin:
            scores[:, :first] = NEVER
            if processor.max_initial_timestamp_index is not None:
                scores[:, first + processor.max_initial_timestamp_index + 1 :] = NEVER
        if processor._detect_timestamp_from_logprob:  # all times together may be likelier than any text
            likelihoods = scores.log_softmax(-1)
            wins = likelihoods[:, first:].logsumexp(-1) > likelihoods[:, :first].amax(-1)
            scores[:, :first].masked_fill_(wins[:, None], NEVER)
        return scores

    return step


_KNOWN = {
    theirs.SuppressTokensLogitsProcessor: _suppress,
    theirs.SuppressTokensAtBeginLogitsProcessor: _suppress_at_begin,
    theirs.WhisperTimeStampLogitsProcessor: _timestamps,
    theirs.MinLengthLogitsProcessor: _min_length,
    theirs.MinNewTokensLengthLogitsProcessor: _min_new_tokens,
    theirs.TemperatureLogitsWarper: _temperature,
    theirs.WhisperNoSpeechDetection: _as_it_is,
    theirs.RepetitionPenaltyLogitsProcessor: _as_it_is,
    theirs.NoRepeatNGramLogitsProcessor: _as_it_is,
    theirs.TopKLogitsWarper: _as_it_is,
    theirs.TopPLogitsWarper: _as_it_is,
}
