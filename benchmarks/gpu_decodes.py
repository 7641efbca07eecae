"""The tables `steps`, `generate` and `memory` of gpu.py: whole models, as transformers runs them and as we do."""

import warnings
from functools import partial
from importlib.util import find_spec
from statistics import median
from time import perf_counter

import decoding
import models
import numpy
import torch
from device import Memory, attempt, between, forget, mark
from transformers import EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

import whisperkv
from whisperkv import CrossConfig
from whisperkv.config import FORMATS

FRAMES, LIMIT = 1500, 448  # of an audio; tokens at most
TOKENS, WARM, RUN = 64, 4, 12  # steps end at TOKENS, as many as 30 s of speech usually have; the last RUN are timed
DECODES = ((1, 1, 128), (32, 5, 64))  # audios, beams, tokens of large-v3's generate()
QUICK_DECODES = ((1, 1, 6), (2, 5, 6))

THEIRS, STATIC, KVPRESS = "transformers", "static + compile", "kvpress"
OURS = {form: {"cross": CrossConfig(form)} for form in FORMATS}
OURS["model, graphs=False"] = {"cross": CrossConfig("model"), "graphs": False}

warnings.filterwarnings("error", "whisperkv decodes without graphs")  # or they would be measured as if there were some


def prepare(model, way):
    """As that way has it, and without what the one before may have kept of memory."""
    whisperkv.unpatch(model)
    if way in OURS:
        whisperkv.patch(model, **OURS[way])
    forget()


def in_turns(model, ways, rounds, measure):
    """{way: results of measure(way)} and {way: why it failed}: one way after the other, and back the next time."""
    found, failed = {way: [] for way in ways}, {}
    for turn in range(rounds):
        for way in ways[:: -1 if turn % 2 else 1]:
            if way not in failed:
                prepare(model, way)
                result, why = attempt(measure, way)
                if why:
                    failed[way] = why
                else:
                    found[way].append(result)
    prepare(model, THEIRS)
    return found, failed


def ratio(theirs, ours):
    return theirs / ours if theirs and ours else None


def random_model(shape, args):
    name, layers = args.shapes[shape]
    dtype = torch.float16 if args.device.type == "cuda" else torch.float32
    model = models.random_model(name, layers, args.device, dtype)
    model.config.encoder_layers = layers  # transformers makes a static cache of as many layers as the encoder has
    return model


def random_states(model, audios):
    """[audios, frames, width]"""
    states = torch.randn(audios, FRAMES, model.config.d_model, device=model.device, dtype=model.dtype)
    return torch.nn.functional.layer_norm(states, states.shape[-1:])


def label_of(shape, model, audios, beams):
    return {"shape": shape, "dtype": str(model.dtype).removeprefix("torch."), "batch": audios, "beams": beams}


# ---- steps ----


def steps(args):
    for shape in args.shapes:
        model = random_model(shape, args)
        for batch in args.batches:
            for beams in args.beams:
                static = [STATIC] if beams == 1 and batch in args.compiled else []
                states = random_states(model, batch).repeat_interleave(beams, 0)
                torch._dynamo.reset()
                compiled = torch.compile(model.forward, mode="reduce-overhead", dynamic=False)
                measure = partial(timed_steps, model, compiled, states)
                found, failed = in_turns(model, [THEIRS, *static, *OURS], args.rounds, measure)
                ms = {way: median(sum((times for times, _ in each), [])) for way, each in found.items() if each}
                for way, each in found.items():
                    yield {
                        **label_of(shape, model, batch, beams),
                        "tokens": TOKENS,
                        "way": way,
                        "ms": ms.get(way),
                        "peak": each[0][1] if each else None,
                        "ratio": ratio(ms.get(THEIRS), ms.get(way)),
                        "to_static": ratio(ms.get(STATIC), ms.get(way)),
                        "note": failed.get(way, ""),
                    }
        del model, compiled, measure
        forget()


def timed_steps(model, compiled, states, way):
    """Milliseconds of each step, and GB at most during them, caches included."""
    device = states.device
    memory = Memory(device)
    step = Decode(model, states, TOKENS - WARM - RUN, compiled if way == STATIC else None)
    for _ in range(WARM):
        step()
    memory.begin_peak()
    times = []
    for _ in range(RUN):
        start = mark(device)
        step()
        times.append(between(start, mark(device)))  # waits for it, as generate() does
    return times, memory.peak


class Decode:
    """A decode behind a prompt of so many tokens; each call is a step. A compiled model has a static cache."""

    def __init__(self, model, states, prompt, compiled=None):
        self.forward, self.states, cache = compiled or model, BaseModelOutput(last_hidden_state=states), None
        if compiled:
            sizes = LIMIT, states.shape[1]
            cache = EncoderDecoderCache(*(StaticCache(config=model.config, max_cache_len=size) for size in sizes))
        start = model.generation_config.decoder_start_token_id
        tokens = torch.full((len(states), prompt), start, device=states.device)
        output = model.get_decoder()(
            input_ids=tokens, encoder_hidden_states=states, past_key_values=cache, use_cache=True
        )
        self.cache, self.token = output.past_key_values, tokens[:, :1].clone()

    def __call__(self):
        torch.compiler.cudagraph_mark_step_begin()  # means something to a compiled model only
        self.forward(
            encoder_outputs=self.states, decoder_input_ids=self.token, past_key_values=self.cache, use_cache=True
        )


# ---- generate() ----


def generate(args):
    for name in dict.fromkeys(["tiny.en", *args.weights]):
        loaded, why = attempt(real, name, args)
        if why:
            yield {"shape": name, "dtype": "float32", "way": THEIRS, "note": why}
            continue
        for beams in args.beams:
            options = {"num_beams": beams, "max_new_tokens": 12 if args.quick else 100}
            yield from generate_rows(name, *loaded, [], options, args)
    shape = next(iter(args.shapes))
    model = random_model(shape, args)
    for audios, beams, tokens in QUICK_DECODES if args.quick else DECODES:
        options = {"num_beams": beams, "min_new_tokens": tokens, "max_new_tokens": tokens}
        static = [STATIC] if beams == 1 and audios in args.compiled else []
        yield from generate_rows(shape, model, random_states(model, audios), static, options, args)


def generate_rows(shape, model, states, static, options, args):
    """static: whether the static cache is measured too, as the list of its name."""
    press = [KVPRESS] if find_spec("kvpress") else []
    measure = partial(timed_generate, model, states, options)
    found, failed = in_turns(model, [THEIRS, *static, *OURS, *press], args.rounds + 1, measure)
    found = {way: each[1:] for way, each in found.items()}  # the first warms up, compiles and captures
    seconds = {way: median(each["seconds"] for each in runs) for way, runs in found.items() if runs}
    for way, runs in found.items():
        last = runs[-1] if runs else {}
        theirs, caches = found[THEIRS][-1]["tokens"] if found[THEIRS] else None, last.get("caches", (None, None))
        yield {
            **label_of(shape, model, len(states), options["num_beams"]),
            "tokens": last["tokens"].shape[1] if last else None,
            "way": way,
            "seconds": seconds.get(way),
            "peak": last.get("peak"),
            "ratio": ratio(seconds.get(THEIRS), seconds.get(way)),
            "to_static": ratio(seconds.get(STATIC), seconds.get(way)),
            "cache": caches[0],
            "cache_transformers": caches[1],
            "smaller": ratio(*caches[::-1]),
            "same": same_rows(theirs, last.get("tokens")) if model.dtype == torch.float32 else None,
            "note": failed.get(way, ""),
        }


def timed_generate(model, states, options, way):
    if way == STATIC:
        options = {**options, "cache_implementation": "static"}  # which generate() compiles by itself, on a GPU
    if way == KVPRESS:
        from kvpress import KnormPress

        with KnormPress(compression_ratio=0.5)(model):
            return timed_generate(model, states, options, THEIRS)
    given = BaseModelOutput(last_hidden_state=states.clone())  # generate() changes it
    memory, start = Memory(states.device), perf_counter()
    tokens = decoding.generate(model, None, encoder_outputs=given, **options).cpu()  # waits for it
    found = {"seconds": perf_counter() - start, "peak": memory.peak, "tokens": tokens}
    if way in OURS:
        stats = whisperkv.stats(model)
        assert not stats.note, stats.note
        theirs = stats.self_bytes_transformers + stats.cross_bytes_transformers
        found["caches"] = stats.self_bytes + stats.cross_bytes, theirs
    return found


def same_rows(theirs, ours):
    """The share of rows that are those of transformers."""
    if theirs is None or ours is None:
        return None
    return float((theirs == ours).all(-1).float().mean()) if theirs.shape == ours.shape else 0.0


def real(name, args):
    """A model with real weights in float32, and its encoder's output for three pieces of speech."""
    folder = args.weights.get(name)
    model, processor = whisperkv.load_ctranslate2(folder) if folder else models.load(name)
    samples = numpy.load(args.speech) if args.speech else whisperkv.demo_audio()[0]
    pieces = [samples, samples[: 6 * 16000], samples[9 * 16000 : 20 * 16000]]
    features = processor(pieces, sampling_rate=16000, return_tensors="pt").input_features.to(args.device)
    return model.to(args.device), model.get_encoder()(features).last_hidden_state


# ---- memory ----


def memory(args):
    shape = next(iter(args.shapes))
    model, largest = random_model(shape, args), {}
    for way in (THEIRS, "model", "int4", "latent_int4"):
        largest[way], why = attempt(largest_batch, partial(fits, model, way), 4 if args.quick else 1 << 16)
        yield {
            "shape": shape,
            "dtype": str(model.dtype).removeprefix("torch."),
            "way": way,
            "largest": largest[way],
            "ratio": ratio(largest[way], largest[THEIRS]),
            "note": why,
        }


def largest_batch(fits, most):
    """By doubling, then by halving, to an eighth."""
    least, tried = 0, min(32, most)
    while tried <= most and fits(tried):
        least, tried = tried, 2 * tried
    while tried <= most and tried - least > max(least // 8, 1):
        middle = (least + tried) // 2
        least, tried = (middle, tried) if fits(middle) else (least, middle)
    return least


def fits(model, way, batch):
    """Whether so many audios begin to decode, greedily."""
    prepare(model, way)
    _, why = attempt(begin, model, batch)
    if why not in ("", "out of memory"):
        raise RuntimeError(why)
    return not why


def begin(model, batch):
    step = Decode(model, random_states(model, batch), 4)
    for _ in range(WARM):
        step()
