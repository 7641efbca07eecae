"""What the encoder hears is noted here, since the decoder is given its output alone."""

import hashlib
import threading
from collections import OrderedDict

import torch

from .trim import Kept, kept_frames


class EncoderListener:
    """A forward hook of the encoder: it notes which frames of each audio are kept, for the decoder to find them by the
    encoder's output."""

    MOST = 4096  # audios remembered

    def __init__(self, trim, merge=0):
        self.trim, self.merge = trim, merge
        self._kept = OrderedDict()  # of a digest of the audio's states: bool [frames]
        self._now = threading.local()  # what the encoder is just listening to

    def listen(self, features, mask, share=0):
        """The Kept frames of what the encoder is given, before it hears it; None if it should hear all, and there is no
        share of their pairs to merge."""
        keep = kept_frames(features, mask, self.trim)
        self._now.features, self._now.keep = features, keep
        return None if bool(keep.all()) and not share else Kept.of(keep)

    def note(self, keep):
        """Which are kept in the end: bool [audios, frames]."""
        self._now.keep = keep

    def __call__(self, encoder, args, kwargs, output):
        features = args[0] if args else kwargs.get("input_features")
        mask = args[1] if len(args) > 1 else kwargs.get("attention_mask")
        now = vars(self._now)
        is_known = now.get("features") is features
        kept = now["keep"] if is_known else kept_frames(features, mask, self.trim)
        now.clear()
        kept = kept.cpu()  # where the decoder will be is not known
        self._kept.update(zip(self._digests(output[0]), kept))
        while len(self._kept) > self.MOST:
            self._kept.popitem(last=False)

    def kept(self, states):
        """bool [audios, frames], or None if one of these audios has not been heard."""
        found = [self._kept.get(digest) for digest in self._digests(states)]
        return None if any(each is None for each in found) else torch.stack(found).to(states.device)

    @staticmethod
    def _digests(states):
        samples = states.detach()[:, :: max(states.shape[1] // 16, 1)].contiguous().cpu()
        return [hashlib.blake2b(each.view(torch.uint8).numpy(), digest_size=16).digest() for each in samples]

    def __reduce__(self):
        return EncoderListener, (self.trim, self.merge)
