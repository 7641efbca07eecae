"""Which frames of the encoder are kept: speech, and a few of the silence around it, each of which counts for those that
it stands for."""

from typing import NamedTuple

import torch

from . import voice

# Frames of 20 ms, held to real recordings.
EVERY = 4  # Whisper looks at the padding after the speech and gets lost without any: this many-th frame stays
WITHIN = 4  # and so it is with silence inside the audio
MARGIN = 25  # around speech, which fades in and out below any threshold; likelihood drops with less
STRETCH = 51  # a shorter pause inside speech is left alone; an odd number
# Energies are means over log-mel bands, where 0.25 is 10 dB.
QUIET = 0.25  # silence lies below this part of the way from the noise floor to loud speech
CONTRAST = 0.2  # if those two are closer, the one cannot be told from the other, and everything is kept
GAP = 8  # columns that voice.listen() may have forgotten


class Kept(NamedTuple):
    """The frames that are kept of each audio, and how many each stands for: itself, and those that follow it and are
    not kept. Audios keep different numbers of frames; what comes after an audio's own is to be ignored.

    places   int64 [audios, most]: where they stand, in order
    counts   int64 [audios, most]; 1 after the audio's own
    lengths  int32 [audios]: how many are kept
    of_all   int64 [audios, frames]: the number of the one that stands for each frame
    """

    places: torch.Tensor
    counts: torch.Tensor
    lengths: torch.Tensor
    of_all: torch.Tensor

    @classmethod
    def of(cls, keep):
        """keep: bool [audios, frames], of which the first frame is kept."""
        lengths = keep.sum(-1).int()
        places = (~keep).int().argsort(dim=-1, stable=True)[:, : int(lengths.max())]
        is_own = torch.arange(places.shape[1], device=keep.device) < lengths[:, None]
        ends = places.masked_fill(~is_own, keep.shape[1])  # where those of the next one begin
        ends = torch.nn.functional.pad(ends[:, 1:], (0, 1), value=keep.shape[1])
        return cls(places, torch.where(is_own, ends - places, 1), lengths, keep.cumsum(-1) - 1)

    def audio(self, number):
        """Of one audio alone."""
        one, length = slice(number, number + 1), int(self.lengths[number])
        return Kept(self.places[one, :length], self.counts[one, :length], self.lengths[one], self.of_all[one])

    @property
    def keep(self):
        """bool [audios, frames]: what it was made of."""
        return torch.nn.functional.pad(self.of_all.diff(dim=-1), (1, 0), value=1).bool()

    @property
    def bias(self):
        """float32 [audios, most]: what attention adds to the logit of a frame that counts so often."""
        return self.counts.float().log()


def kept_frames(features, attention_mask, trim):
    """bool [audios, frames]: the frames to keep.

    features        the encoder's input_features [audios, mels, columns], of any float dtype; two columns make a frame
    attention_mask  of the columns, or None; one of another shape, as in long-form generate(), is not looked at
    trim            "off": all; "padding": of the padding after the speech, every 4th frame is kept;
                    "silence": and of silent stretches in the audio, found by voice.listen() or energy, every 4th

    Without a mask, padding is what is flat over all mels: digital silence and the zeros that generate() appends. Audio
    that is dithered has none. An audio that holds anything but numbers is kept whole.
    """
    columns, frames = features.shape[-1], features.shape[-1] // 2
    if trim == "off":
        return features.new_ones(len(features), frames, dtype=torch.bool)
    values = features.float()  # four times as fast to search as bfloat16
    low, high = values.amin(1), values.amax(1)  # [audios, columns]
    flat = low == high
    heard = ~flat
    if attention_mask is not None and attention_mask.shape == flat.shape:
        heard = attention_mask.to(flat.device).bool()
    after = torch.arange(1, columns + 1, device=flat.device)
    ends = (heard * after).amax(-1, keepdim=True)
    padding = silent = _frames(after > ends, frames)
    if trim == "silence":
        silent = _stretches(padding | _quiet(values, flat, flat | (after > ends)))
    kept = _widened(~(silent | padding), 2 * MARGIN + 1)
    kept[:, ::EVERY] = True
    kept[:, ::WITHIN] |= ~padding[:, ::WITHIN]
    return kept | ~(low.isfinite() & high.isfinite()).all(-1, keepdim=True)


def silent_frames(features, stretch=STRETCH):
    """bool [audios, frames]: where no speech is for so many frames (an odd number), by voice.listen() or energy,
    padding included. As kept_frames."""
    values = features.float()
    flat = values.amin(1) == values.amax(1)
    return _stretches(_quiet(values, flat, flat), stretch)


def _quiet(features, flat, empty):
    """bool [audios, frames]: by Silero where it was heard, elsewhere by energy. Flat columns are quiet in any case, and
    those that are empty say nothing of the noise floor."""
    energy = features.mean(1).masked_fill(empty, float("nan"))
    floor, loud = torch.nanquantile(energy, energy.new_tensor([0.1, 0.95]), dim=-1, keepdim=True)
    quiet = (energy < floor + QUIET * (loud - floor)) & (loud - floor >= CONTRAST)
    heard = voice.silent_columns(features)
    if heard is not None:
        known, silent = heard
        at = torch.arange(known.shape[-1], device=known.device)
        last = (known * at).cummax(-1).values  # the memory has gaps: the last known column speaks for a few more
        quiet = torch.where(known.gather(-1, last) & (at - last < GAP), silent.gather(-1, last), quiet)
    return _frames(quiet | flat, features.shape[-1] // 2)


def _frames(columns, frames):
    """What holds for both columns of a frame."""
    return columns[:, : 2 * frames].unflatten(-1, (frames, 2)).all(-1)


def _stretches(silent, stretch=STRETCH):
    """Without shorter ones. Before the audio and after it there is silence."""
    cores = ~_widened(~silent, stretch)
    return _widened(cores, stretch)


def _widened(marked, width):
    """True wherever a mark is within width // 2 frames."""
    pooled = torch.nn.functional.max_pool1d(marked[:, None].float(), width, stride=1, padding=width // 2)
    return pooled[:, 0] > 0
