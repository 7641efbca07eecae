from .family import Family

QWEN3_ASR = Family(names=("qwen3_asr",), rate=13)
