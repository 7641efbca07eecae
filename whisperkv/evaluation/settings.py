"""Settings as they are written in a command: `fastest`, or `weights=int8,cross=latent_int8,trim=padding`."""

from dataclasses import dataclass, fields
from typing import Any

from ..config import CrossConfig, EvictionConfig

EVICTION = tuple(field.name for field in fields(EvictionConfig))
CROSS = {"cross": "format", **{field.name: field.name for field in fields(CrossConfig) if field.name != "format"}}
WEIGHTS = ("model", "bfloat16", "int8")
FIELDS = (*EVICTION, *CROSS, "weights")
OPTIONS = ("policy", "recent", "heavy")  # of EVICTION, those that `whisperkv transcribe` has
UNPATCHED = "unpatched"
NAMED = {  # with the changes that each makes to patch(model)
    "lossless": "",
    "fastest": "weights=int8,cross=latent_int8,trim=padding",
    "smallest": "recent=32,heavy=16,cross=latent_int4,trim=padding",
}
_ALLOWED = (
    f"a setting is one of {', '.join((UNPATCHED, *NAMED))}, or FIELD=VALUE,... with the fields {', '.join(FIELDS)}"
)


@dataclass(frozen=True)
class Setting:
    """What patch() is given; nothing is patched where `is_patched` is False."""

    name: str
    eviction: EvictionConfig | None = None
    cross: CrossConfig = CrossConfig()
    weights: str = "model"
    is_patched: bool = True

    def apply(self, model: Any) -> Any:
        """The model with this setting and no other."""
        from ..patching import patch, unpatch

        if not self.is_patched:
            return unpatch(model)
        return patch(model, self.eviction, self.cross, self.weights)

    @property
    def python(self) -> str:
        """The line that sets it."""
        if not self.is_patched:
            return "unpatch(model)"
        given = ["model"]
        if self.eviction is not None:
            given.append(_call(self.eviction, EvictionConfig()))
        if self.cross != CrossConfig():
            given.append(f"cross={_call(self.cross, CrossConfig())}")
        if self.weights != "model":
            given.append(f"weights={self.weights!r}")
        return f"patch({', '.join(given)})"

    @property
    def changes(self) -> dict[str, Any]:
        """{field: value} of what is not as patch(model) has it; recent and heavy together."""
        found: dict[str, Any] = {}
        if self.eviction is not None:
            found |= _changed(self.eviction, EvictionConfig(), always=("policy", "recent", "heavy"))
        changed = _changed(self.cross, CrossConfig())
        found |= {name: changed[field] for name, field in CROSS.items() if field in changed}
        return found | ({"weights": self.weights} if self.weights != "model" else {})

    @property
    def text(self) -> str:
        """As parsed() reads it."""
        return ",".join(f"{name}={value}" for name, value in self.changes.items()) or self.name

    @property
    def options(self) -> str | None:
        """Of `whisperkv transcribe`, or None if it has none for some of this."""
        eviction = {name: self.changes[name] for name in OPTIONS if name in self.changes}
        if not self.is_patched or self.changes.keys() - {*OPTIONS, "cross", "trim", "weights"}:
            return None
        given = {"weights": self.weights, "cross": self.cross.format, "trim": self.cross.trim, **eviction}
        return " ".join(f"--{name} {value}" for name, value in given.items())


def parsed(text: str) -> Setting:
    """The Setting that a text describes: a name, FIELD=VALUE,... or a name with changes to it."""
    name, _, rest = text.strip().partition(",")
    if name == UNPATCHED:
        if rest:
            raise ValueError(f"setting {text!r}: {UNPATCHED} takes no changes; {_ALLOWED}")
        return Setting(UNPATCHED, is_patched=False)
    changes = ",".join(part for part in (NAMED[name], rest) if part) if name in NAMED else text
    given: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in changes.split(","))):
        field, equals, value = (each.strip() for each in part.partition("="))
        if not equals or field not in FIELDS:
            raise ValueError(f"setting {text!r}: {field!r} is no {'field' if equals else 'setting'}; {_ALLOWED}")
        given[field] = _value(text, field, value)
    if not text.strip():
        raise ValueError(f"setting {text!r} is empty; {_ALLOWED}")
    return made(text.strip(), **given)


def made(name: str, weights: str = "model", **given: Any) -> Setting:
    """A Setting of the fields by name."""
    if weights not in WEIGHTS:
        raise ValueError(f"setting {name!r}: weights must be one of {', '.join(WEIGHTS)}; got {weights!r}")
    eviction = {field: given[field] for field in EVICTION if field in given}
    cross = {field: given[field_] for field_, field in CROSS.items() if field_ in given}
    try:
        return Setting(name, EvictionConfig(**eviction) if eviction else None, CrossConfig(**cross), weights)
    except ValueError as error:
        raise ValueError(f"setting {name!r}: {error}") from error


def _value(text, field, value):
    kinds = {"recent": int, "heavy": int, "group": int, "decay": float, "merge": float}
    if field in ("pin_prompt", "share_beams"):
        words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if value.lower() not in words:
            raise ValueError(f"setting {text!r}: {field} must be true or false; got {value!r}")
        return words[value.lower()]
    try:
        return kinds.get(field, str)(value)
    except ValueError:
        kind = "a whole number" if kinds[field] is int else "a number"
        raise ValueError(f"setting {text!r}: {field} must be {kind}; got {value!r}") from None


def _changed(config, default, always=()):
    names = [field.name for field in fields(config)]
    values = {name: getattr(config, name) for name in names}
    return {name: value for name, value in values.items() if name in always or value != getattr(default, name)}


def _call(config, default):
    changed = _changed(config, default, always=("recent", "heavy") if isinstance(config, EvictionConfig) else ())
    return f"{type(config).__name__}({', '.join(f'{name}={value!r}' for name, value in changed.items())})"
