from .family import Family

GLM_ASR = Family(names=("glmasr",), rate=12.5)
