"""convert_to_mla() and restore()."""

import inspect
import sys
from collections.abc import Iterable
from typing import Any

import torch

from . import calibrating, factorize, installing, whisper_converting
from .architectures import architecture_of
from .calibration import collect, token_rows
from .codes import check_bits
from .record import METHODS, SHARES, Latents, LowRank, record_of

LARGEST = torch.finfo(torch.float16).max / 4  # a latent may grow beyond what was seen


def convert_to_mla(
    model_or_path: Any,
    compression_ratio: float = 4.0,
    compression_method: str = "auto",
    d_latent: int | None = None,
    use_calibration: bool = True,
    calibration: Iterable[Any] | str | None = None,
    num_calibration_samples: int = 128,
    max_calibration_length: int = 512,
    store_original_weights: bool = False,
    cross_layer_group_size: int = 4,
    xkv_skip_early_layers: int = 0,
    keep_early_layers_original: bool = False,
    device: Any = None,
    dtype: torch.dtype | None = None,
    verbose: bool = True,
    *,
    tokenizer: Any = None,
    cache_bits: int | None = None,
    xkv_share: str = "latents",
    rope_pairs: int | None = None,
) -> tuple[Any, Any]:
    """Let a model's cache hold small latents in place of keys and values. Returns (model, tokenizer), of a Whisper
    (model, processor).

    The model is changed in place; generate() and pipelines work as before. `model.lowrank` says what it has become, and
    restore(model) makes it what it was if store_original_weights was set.

    model_or_path            a causal language model of transformers, or its folder; or a Whisper, its folder or its
                             size, as "tiny.en"
    compression_ratio        how many times fewer numbers a token takes; 1 keeps everything
    compression_method       "separate": a latent for keys and one for values; "joint": one for both; "decoupled_rope":
                             the same, and only the pairs that need it are rotated; "xkv": across the layers of a
                             group; "auto": "joint" where each query head has its own keys, "xkv" where heads share them
    d_latent                 numbers of a token in a layer, keys and values together, in place of a ratio
    use_calibration          whether to read a text: what layers are given, ask and write decides what stays
    calibration              that text: a list of texts or of token ids, a `datasets` object, a file; a little ships
    num_calibration_samples  rows of it that are read, of max_calibration_length tokens at most
    store_original_weights   keep the projections that are taken out, for restore() and for training
    cross_layer_group_size   layers in a group of "xkv"
    xkv_skip_early_layers    so many of the first layers stay out of the groups, each with latents of its own
    keep_early_layers_original   or with no latents at all
    cache_bits               8, 4, 3 or 2: hold codes of so many bits a number, on average
    xkv_share                "latents": the layers of a group share each token's latent; "bases": only the matrices
    rope_pairs               of "decoupled_rope": rotary pairs of a head that stay rotated; half of them by default

    Of a Whisper both caches become small, as docs/lowrank-whisper.md says: that of its tokens by compression_ratio, and
    that of the audio to cache_bits (4, 3 or 2; 3 by default). `calibration` are recordings then, samples at 16 kHz or
    files' names, or the file that calibrate() wrote, and `tokenizer` is the processor.
    """
    given = dict(locals())
    _check(given)
    if whisper_converting.is_whisper(model_or_path):
        defaults = {name: each.default for name, each in inspect.signature(convert_to_mla).parameters.items()}
        return whisper_converting.convert(model_or_path, tokenizer, given, defaults)
    model, tokenizer = _load(model_or_path, tokenizer, dtype, device)
    if isinstance(getattr(model, "lowrank", None), LowRank):
        raise ValueError(f"the model is converted already: {model.lowrank!r}. Load it anew, or restore() it first")
    kind = architecture_of(model)
    attentions, rotary = kind.attentions(model), kind.rotary(model)
    heads, kv_heads, dim = kind.heads(attentions[0])
    hidden = kind.projections(attentions[0])[0][0].shape[1]
    for attention in attentions:  # those that are not plain raise
        kind.projections(attention)
        kind.output(attention)
    method = compression_method if compression_method != "auto" else "joint" if heads == kv_heads else "xkv"
    turned = _turned(kind, method, rotary, attentions[0], rope_pairs, dim)
    full = 2 * kv_heads * dim
    width = _width(full, compression_ratio, d_latent)
    settings = (cross_layer_group_size, xkv_skip_early_layers, keep_early_layers_original, xkv_share)
    layers = _plan(kind, attentions, method, width, hidden, *settings)
    say = _say if verbose else lambda text: None

    seen = {}
    if use_calibration:
        tokenizer = tokenizer or _tokenizer_of(model)
        rows = token_rows(calibration, tokenizer, num_calibration_samples, max_calibration_length)
        say(f"reading {sum(map(len, rows))} tokens of calibration text")
        seen = collect(model, kind, rows, calibrating.groups_of(layers))
    say(f"{len(layers)} layers: {method}, {width} numbers a token in place of {full}")
    record = LowRank(kind.model_type, method, 1.0, layers, xkv_share if method == "xkv" else "", use_calibration)
    with torch.no_grad():
        made = _fill(kind, attentions, rotary, seen, layers, turned, width)
    _check_float16(made, seen, layers)

    taken = installing.install(model, record, made)
    if store_original_weights:
        record.originals = taken
    numbers = sum(each.width for number, each in layers.items() if not each.is_shared or number == each.group[0])
    record.ratio = full * len(layers) / numbers
    if cache_bits is not None:
        calibrating.set_codes(
            model, record, cache_bits, calibration, tokenizer, num_calibration_samples, max_calibration_length
        )
    if device is not None:
        model.to(device)
    say(repr(record))
    return model, tokenizer


def restore(model: Any) -> Any:
    """Make a converted model what it was; one that was not converted is left alone."""
    record = getattr(model, "lowrank", None)
    if isinstance(record, whisper_converting.WhisperLowRank):
        return whisper_converting.restore(model)
    if not isinstance(record, LowRank):
        return model
    if record.originals is None:
        raise ValueError("the projections of before are gone: convert with store_original_weights=True to restore them")
    installing.uninstall(model, record_of(model), record.originals)
    return model


def _check(given):
    method, ratio, latent = given["compression_method"], given["compression_ratio"], given["d_latent"]
    if method not in METHODS:
        raise ValueError(f"compression_method must be one of {', '.join(METHODS)}; got {method!r}")
    if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not ratio >= 1 or ratio == float("inf"):
        raise ValueError(f"compression_ratio must be a number of at least 1, which keeps everything; got {ratio!r}")
    if latent is not None and (isinstance(latent, bool) or not isinstance(latent, int) or latent < 2):
        raise ValueError(f"d_latent must be a whole number of at least 2, or None; got {latent!r}")
    early, keep = given["xkv_skip_early_layers"], given["keep_early_layers_original"]
    for name in ("cross_layer_group_size", "num_calibration_samples", "max_calibration_length"):
        if isinstance(given[name], bool) or not isinstance(given[name], int) or given[name] < 1:
            raise ValueError(f"{name} must be a whole number of at least 1; got {given[name]!r}")
    if isinstance(early, bool) or not isinstance(early, int) or early < 0:
        raise ValueError(f"xkv_skip_early_layers must be a whole number of at least 0; got {early!r}")
    if method != "xkv" and (early or keep):
        name = "xkv_skip_early_layers" if early else "keep_early_layers_original"
        raise ValueError(f"{name} is for compression_method='xkv'; got {method!r}")
    if keep and not early:
        raise ValueError("keep_early_layers_original needs xkv_skip_early_layers, the number of those layers; got 0")
    if given["xkv_share"] not in SHARES:
        raise ValueError(f"xkv_share must be 'latents' or 'bases'; got {given['xkv_share']!r}")
    if given["cache_bits"] is not None:
        check_bits(given["cache_bits"])
        if not given["use_calibration"]:
            raise ValueError("cache_bits needs the steps that calibration finds: leave use_calibration=True")
    if given["rope_pairs"] is not None and method != "decoupled_rope":
        raise ValueError(f"rope_pairs is for compression_method='decoupled_rope'; got {method!r}")
    if not given["use_calibration"] and given["calibration"] is not None:
        raise ValueError("calibration is given and use_calibration=False: leave out one of them")


def _load(model, tokenizer, dtype, device):
    if not isinstance(model, torch.nn.Module):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.from_pretrained(model)
        architecture_of(_Unloaded(config))
        path, model = model, AutoModelForCausalLM.from_pretrained(model, dtype=dtype or "auto")
        tokenizer = tokenizer or tokenizer_at(path)
        return model.to(device).eval() if device is not None else model.eval(), tokenizer
    if dtype is not None:
        architecture_of(model)
        model.to(dtype)
    return model, tokenizer


class _Unloaded:
    """A model of which only the config is there yet."""

    def __init__(self, config):
        self.config = config

    def can_generate(self):
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        return self.config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def tokenizer_at(path):
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError):
        return None


def _tokenizer_of(model):
    return tokenizer_at(model.name_or_path) if getattr(model, "name_or_path", "") else None


def _turned(kind, method, rotary, attention, pairs, dim):
    if method != "decoupled_rope":
        return None
    if rotary is None:
        raise ValueError(
            f"compression_method='decoupled_rope' is for rotary positions; {kind.model_type} has none: take 'joint'"
        )
    if kind.key_norm(attention) is not None:
        raise ValueError(
            f"compression_method='decoupled_rope' cannot be: {kind.model_type} normalizes keys, so all of a key must "
            "be rebuilt: take 'joint', 'separate' or 'xkv'"
        )
    pairs = dim // 4 if pairs is None else pairs
    if isinstance(pairs, bool) or not isinstance(pairs, int) or not 1 <= pairs <= dim // 2:
        raise ValueError(f"rope_pairs must be a whole number from 1 to {dim // 2}, all pairs of a head; got {pairs!r}")
    return pairs


def _width(full, ratio, latent):
    if latent is not None and latent > full:
        raise ValueError(f"d_latent must be at most {full}, the numbers of a token's keys and values; got {latent}")
    width = max(2, round(full / ratio)) if latent is None else latent
    return width


def _plan(kind, attentions, method, width, hidden, size, early, keep, share):
    """How each layer is to hold its tokens. Widths of "separate" latents are settled later."""
    _, kv_heads, dim = kind.heads(attentions[0])
    full = 2 * kv_heads * dim
    windows = [kind.window(attention) for attention in attentions]
    first, layers = {}, {}
    numbers = range(early if keep else 0, len(attentions))
    if method == "xkv" and early >= len(attentions):
        raise ValueError(f"xkv_skip_early_layers must be less than the {len(attentions)} layers; got {early}")
    groups: list[list[int]] = []
    for number in numbers:
        first.setdefault(windows[number], number)
        grouped = method == "xkv" and number >= early
        last = groups[-1] if groups else None
        if grouped and last and last[0] >= early and len(last) < size and windows[last[0]] == windows[number]:
            last.append(number)
        else:
            groups.append([number])
    for group in groups:
        for number in group:
            where = first[windows[number]]
            if method == "xkv" and share == "latents" and number >= early:
                whole = min(width * len(group), min(full, hidden) * len(group))
                layers[number] = Latents("shared", whole, whole, group, positions_in=where)
            elif method in ("joint", "decoupled_rope"):
                one = min(width, hidden)  # more cannot differ
                layers[number] = Latents("joint", one, one, group, positions_in=where)
            else:
                layers[number] = Latents("separate", width // 2, width - width // 2, group, positions_in=where)
    return layers


def _fill(kind, attentions, rotary, seen, layers, turned, width):
    """The matrices of each layer, set."""
    grounds, bases, done = {}, {}, set()
    for number, latents in layers.items():
        own = None if latents.is_shared else seen.get(number)
        grounds[number] = calibrating.Ground(kind, attentions[number], rotary, own, turned)
        if latents.is_shared and seen:
            grounds[number] = calibrating.SharedGround(kind, attentions[number], rotary, seen, latents.group, number)
        if turned is not None:
            dim = kind.heads(attentions[number])[2]
            latents.turned = grounds[number].turns[: dim // 2].nonzero()[:, 0].tolist()
    for number, latents in layers.items():
        group = latents.group
        if group[0] in done or latents.is_shared:
            continue
        done.add(group[0])
        if latents.kind == "joint":
            bases[number] = [factorize.spectrum(*grounds[number].together()).cut(latents.width)]
            continue
        moments = [sum(grounds[each].covariance(which) for each in group) for which in (0, 1)]
        metrics = [sum(grounds[each].metrics()[which] for each in group) / len(group) for which in (0, 1)]
        spectra = [factorize.spectrum(moment, metric) for moment, metric in zip(moments, metrics)]
        parts = factorize.split(*spectra, width)
        for each in group:
            layers[each].keys, layers[each].values = parts
            bases[each] = [one.cut(part) for one, part in zip(spectra, parts)]
    made = installing.factors_of(kind, attentions, layers)
    for number, latents in layers.items():
        if not latents.is_shared:
            calibrating.fill(made[number], grounds[number], bases[number])
        elif number == latents.group[0]:
            group = [grounds[each] for each in latents.group]
            moment, mean = calibrating.shared_moments(group, seen.get(number))
            calibrating.fill_shared([made[each] for each in latents.group], group, moment, mean, latents.width)
    return made


def _check_float16(made, seen, layers):
    for number, factors in made.items():
        if factors.down.dtype != torch.float16:
            continue
        down = factors.down.detach().float()
        largest = float(down.abs().max())
        samples = seen[number].samples if seen and number in seen else None
        if samples is not None and not layers[number].is_shared:
            largest = max(largest, float((samples @ down.T).abs().max()))
        if not largest < LARGEST:
            raise ValueError(
                f"latents of layer {number} reach {largest:.0f}, too much for float16: pass dtype=torch.bfloat16 or "
                "torch.float32"
            )


def _say(text):
    print(f"whisperkv.lowrank: {text}", file=sys.stderr)
