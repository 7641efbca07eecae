from .family import Family


class GraniteSpeech(Family):
    """Its features are two columns side by side."""

    def columns(self, features, config):
        return features.unflatten(-1, (2, -1)).flatten(1, 2).mT


GRANITE_SPEECH = GraniteSpeech(names=("granite_speech",), rate=10)
