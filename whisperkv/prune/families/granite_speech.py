from .family import Family

GRANITE_SPEECH = Family(names=("granite_speech",), rate=10)
