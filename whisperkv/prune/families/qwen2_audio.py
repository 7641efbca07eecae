from .family import Family

QWEN2_AUDIO = Family(names=("qwen2_audio",), rate=25)
