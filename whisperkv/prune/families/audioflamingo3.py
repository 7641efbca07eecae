from .family import Family

AUDIO_FLAMINGO_3 = Family(names=("audioflamingo3",), rate=25)
