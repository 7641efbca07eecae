"""Where the audio of a prompt is silent, token by token, from the features that the model is given."""

import torch

from ..trim import silent_frames

PAUSE = 11  # frames of 20 ms: a shorter one is part of the speech


def begins_of(audio):
    """bool [rows, tokens]: the first token of each clip; what stands together is one."""
    begins = audio.clone()
    begins[:, 1:] &= ~audio[:, :-1]
    return begins


def silent_tokens(features, audio):
    """bool [rows, tokens]: tokens of silence alone; None where features cannot be told apart token by token.

    features  [clips, mels, columns], of all clips in the order of the rows
    audio     bool [rows, tokens]: which tokens stand for audio; what stands together is one clip
    """
    if features is None or features.dim() != 3:
        return None
    clip = (begins_of(audio).flatten().cumsum(0) - 1)[audio.flatten()]
    counts = clip.bincount().tolist()
    clips = len(features)
    if clips != len(counts):  # a clip came as several windows, as Voxtral's do
        if clips == 0 or sum(counts) % clips:
            return None
        counts = [sum(counts) // clips] * clips
    silent = silent_frames(features, PAUSE)
    heard = (features.amin(1) != features.amax(1)).int()
    full = max(counts)
    quiet = []
    for number, count in enumerate(counts):
        # Clips of one prompt are padded to one length in the features, and their tokens are not.
        columns = (
            int(heard[number].nonzero().max()) + 1 if count < full and bool(heard[number].any()) else features.shape[-1]
        )
        frames = max(1, min(columns // 2, silent.shape[1]))
        edges = torch.linspace(0, frames, count + 1, device=silent.device).long()
        sums = torch.nn.functional.pad(silent[number, :frames].cumsum(0), (1, 0))
        width = (edges[1:] - edges[:-1]).clamp(min=1)
        quiet.append(sums[edges[1:]] - sums[edges[:-1]] >= width)
    result = torch.zeros_like(audio)
    result[audio] = torch.cat(quiet).to(result.device)
    return result
