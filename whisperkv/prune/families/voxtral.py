from .family import Family

VOXTRAL = Family(names=("voxtral",), rate=12.5)
