"""Latents come into a model's attention, and leave it again."""

import contextlib

from .. import compat
from .architectures import architecture
from .calibrating import turns_of
from .factors import Factors


def factors_of(kind, attentions, layers):
    """Empty matrices of each layer; layers of a group hold the very same where they share them."""
    made = {}
    for number, latents in layers.items():
        attention = attentions[number]
        (weight, _), _ = kind.projections(attention)
        made[number] = new = Factors(latents, number, weight.shape[1], weight.shape[0])
        new.to(weight.device, weight.dtype)
        first = made.get(latents.group[0])
        if first is not None and first is not new:
            for name in new.ups():
                setattr(new, name, getattr(first, name))
            if latents.is_shared:
                new.codes = first.codes
    return made


def install(model, record, made):
    """Let the attention of each layer be one over latents. What it no longer needs is returned: {layer: modules}"""
    kind = architecture(record.architecture)
    attentions, rotary = kind.attentions(model), kind.rotary(model)
    taken = {}
    for number, latents in record.layers.items():
        attention = attentions[number]
        _, kv_heads, dim = kind.heads(attention)
        before = dict(attention._modules)
        if not latents.is_shared:
            kind.take_out(attention)
        taken[number] = {name: each for name, each in before.items() if attention._modules.get(name) is not each}
        attention.order_before = list(before)
        attention.kv_heads, attention.latents = kv_heads, latents
        attention.rotary, attention.factors = rotary, made[number]
        turns = None if latents.turned is None else turns_of(latents.turned, dim).to(made[number].down.device)
        attention.register_buffer("turns", turns, persistent=False)
        compat.become(attention, kind.attention)
    model.lowrank = record
    return taken


def uninstall(model, record, originals):
    kind = architecture(record.architecture)
    attentions = kind.attentions(model)
    for number in record.layers:
        attention = attentions[number]
        factors = attention.factors
        for name in ("rotary", "factors", "turns", "kv_heads", "latents"):
            delattr(attention, name)
        for name, module in originals[number].items():
            attention._modules[name] = module.to(factors.down.device, factors.down.dtype)
        for name in vars(attention).pop("order_before"):  # in the order that they had
            attention._modules[name] = attention._modules.pop(name)
        compat.become(attention, kind.attention.original)
    del model.lowrank


@contextlib.contextmanager
def as_before(model, record):
    """The model as it was before its conversion, inside a `with`."""
    kind = architecture(record.architecture)
    attentions = kind.attentions(model)
    held = {}
    for number in record.layers:
        attention = attentions[number]
        held[number] = dict(attention._modules)
        for name, module in ((record.originals or {}).get(number) or {}).items():
            attention._modules[name] = module.to(attention.factors.down.device, attention.factors.down.dtype)
        compat.become(attention, kind.attention.original)
    try:
        yield model
    finally:
        for number, modules in held.items():
            attentions[number]._modules.clear()
            attentions[number]._modules.update(modules)
            compat.become(attentions[number], kind.attention)


def knows_before(record):
    """Whether as_before() can be had: where latents are shared, the projections are still there."""
    return record.originals is not None or all(each.is_shared for each in record.layers.values())
