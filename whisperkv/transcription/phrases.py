"""From the tokens of a window to segments: the timestamps part them."""

from typing import NamedTuple

STEP = 0.02  # seconds of a timestamp


class Phrase(NamedTuple):
    begin: float  # seconds from the beginning of the window
    end: float
    tokens: list[int]


def phrases(tokens: list[int], first_time: int, seconds: float) -> tuple[list[Phrase], float, bool]:
    """(the phrases, where in the window the next one begins, whether the last phrase was cut off).

    tokens      of a window, timestamps included
    first_time  the token of 0.00; those that follow are later
    seconds     of audio in the window

    As openai-whisper: two timestamps in a row part phrases. A window that ends with one has nothing after it; what
    comes after the last pair is unfinished, and the next window begins with it.
    """
    is_time = [token >= first_time for token in tokens]
    ends = is_time[-2:] == [False, True]
    parts = [at for at in range(1, len(tokens)) if is_time[at - 1] and is_time[at]]
    if not parts:
        times = [token for token in tokens if token >= first_time]
        begin = _seconds(times[0], first_time, seconds) if times and is_time[0] else 0.0
        end = seconds
        if len(times) > is_time[:1].count(True):
            end = _seconds(times[-1], first_time, seconds)
        return ([Phrase(min(begin, end), end, tokens)] if tokens else []), seconds, False
    if ends:
        parts.append(len(tokens))
    found, last = [], 0
    for part in parts:
        piece, last = tokens[last:part], part
        begin, end = (_seconds(token, first_time, seconds) for token in (piece[0], piece[-1]))
        found.append(Phrase(begin, max(begin, end), piece))
    if ends:
        return found, seconds, False
    rest = tokens[last:]
    begin = _seconds(rest[0], first_time, seconds)
    if not any(token < first_time for token in rest):
        return found, begin, False
    found.append(Phrase(begin, max(begin, seconds), rest))
    return found, begin, True


def _seconds(token, first_time, longest):
    return min((token - first_time) * STEP, longest) if token >= first_time else 0.0
