"""Times and memory of cross-attention in every format, beside transformers, in one process, taken turn by turn.

op      the op alone over 8 audios of 1500 frames, beside torch's scaled_dot_product_attention and a plain read of 512
        MB; 64 MB of other memory are read before each call, as the rest of a step would
decode  generate() of 24 tokens from the encoder's output, transformers beside every format: the first pass of the
        decoder, the mean of the steps that follow (reordering and the output head included), and the whole; tiny.en and
        base with real weights and audio, small and large with random ones
memory  bytes that the layers of a cache really hold, each storage once, beside stats() and transformers

Times are medians; the JSON lines have the least as well. Each table of times is measured twice, in processes of their
own: as it is, and with GLIBC_TUNABLES=glibc.malloc.hugetlb=1.
"""

import json
import os
import subprocess
import sys
from statistics import median
from time import perf_counter

import audio
import decoding
import models
import tables
import torch
from steps import HUGE, cool
from tqdm import tqdm
from transformers import WhisperConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperAttention

import whisperkv
from whisperkv import CrossConfig, ops
from whisperkv.config import FORMATS
from whisperkv.cross_cache import Audios, CrossCacheLayer, Matrix
from whisperkv.records import DecodeRecord

ROUNDS, OP_ROUNDS = 3, 15  # decodes, calls of the op
AUDIOS, FRAMES, HEAD_DIM, TOKENS = 8, 1500, 64, 24
READ = 128 << 20  # float32 numbers in a plain read of memory: 512 MB
DTYPES = (torch.float32, torch.bfloat16)
THEIRS = "transformers"
LARGE_LAYERS = 8

DECODES = {  # model, audios, beams
    "base 4x5": ("base", 4, 5),
    "base 8": ("base", 8, 1),
    "base 1": ("base", 1, 1),
    "tiny.en 8": ("tiny.en", 8, 1),
    "small 8": ("small", 8, 1),
    "large 8": ("large", 8, 1),
}
QUICK_DECODES = {"tiny.en 2x5": ("tiny.en", 2, 5), "tiny.en 2": ("tiny.en", 2, 1)}

TABLES = {
    "op": (
        "ms a call",
        {"shape": ("shape", ""), "dtype": ("dtype", ""), "format": ("format", ""), "beams": ("beams", "d"),
         "sdpa": ("torch", ".3f"), "ours": ("whisperkv", ".3f"), "gbps": ("GB/s", ".1f"),
         "share": ("of a plain read", ".2f"), "ratio": ("ratio to torch", ".2f"),
         "ratio_float32": ("to torch in float32", ".2f"), "of_one": ("beams: times one", ".2f"),
         "folded": ("with the folding of Wk and Wv", ".3f"), "ours_huge": ("whisperkv, huge pages", ".3f"),
         "share_huge": ("of a plain read", ".2f"), "ratio_huge": ("ratio to torch", ".2f")},
    ),
    "decode": (
        "ms",
        {"model": ("model", ""), "audios": ("audios", "d"), "beams": ("beams", "d"), "format": ("cross cache", ""),
         "first": ("first pass", ".0f"), "step": ("step", ".1f"), "whole": ("24 tokens", ".0f"),
         "ratio_first": ("ratio: first pass", ".2f"), "ratio_step": ("step", ".2f"), "ratio": ("24 tokens", ".2f"),
         "to_int8": ("24 tokens against int8", ".2f"), "same": ("same tokens", "d"), "rows": ("of", "d"),
         "ratio_first_huge": ("huge pages: first pass", ".2f"), "ratio_step_huge": ("step", ".2f"),
         "ratio_huge": ("24 tokens", ".2f"), "to_int8_huge": ("against int8", ".2f")},
    ),
    "memory": (
        "bytes",
        {"model": ("model", ""), "dtype": ("dtype", ""), "audios": ("audios", "d"), "beams": ("beams", "d"),
         "format": ("format", ""), "trim": ("trim", ""), "frames": ("frames kept", ".2f"),
         "held": ("numbers, codes and scales", "d"), "stats": ("stats()", "d"), "beside": ("indices beside", "d"),
         "theirs": ("transformers", "d"), "ratio": ("ratio", ".1f")},
    ),
}  # fmt: skip


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


# ---- the op ----


def op(args):
    """One query a row over the audios of one layer."""
    read = torch.ones(READ)
    for shape in models.SHAPES if not args.quick else ("tiny",):
        calls, sizes = {"read": lambda: torch.dot(read, read)}, {"read": read.nbytes}
        for dtype in DTYPES:
            for beams in (1, 5):
                calls[dtype, THEIRS, beams] = sdpa_call(shape, dtype, beams)
            for form in FORMATS:
                config = CrossConfig(form)
                layers = [cache_layer(config, shape, dtype, beams) for beams in (1, 5)]
                layers[1].keys_of_audios, layers[1].values_of_audios = (
                    layers[0].keys_of_audios, layers[0].values_of_audios
                )  # fmt: skip
                for layer, beams in zip(layers, (1, 5)):
                    calls[dtype, form, beams], folded = op_calls(layer, shape, dtype)
                    if folded:
                        calls[dtype, form, beams, "folded"] = folded
                    sizes[dtype, form, beams] = bytes_of([layer])[0]
        times = by_turns(calls, args.op_rounds)
        bandwidth = sizes["read"] / times["read"][0]  # bytes a millisecond
        for dtype in DTYPES:
            for form in FORMATS:
                for beams in (1, 5):
                    key = dtype, form, beams
                    (theirs, theirs_least), (ours, ours_least) = times[dtype, THEIRS, beams], times[key]
                    yield {
                        "shape": shape,
                        "dtype": name_of(dtype),
                        "format": form,
                        "beams": beams,
                        "sdpa": theirs,
                        "ours": ours,
                        "gbps": sizes[key] / ours / 1e6,
                        "read_gbps": bandwidth / 1e6,
                        "share": sizes[key] / ours / bandwidth,
                        "ratio": theirs / ours,
                        "ratio_float32": times[torch.float32, THEIRS, beams][0] / ours,
                        "of_one": ours / times[dtype, form, 1][0] if beams > 1 else None,
                        "folded": times[(*key, "folded")][0] if form.startswith("latent") else None,
                        "least": {"sdpa": theirs_least, "ours": ours_least, "read": times["read"][1]},  # less disturbed
                    }


def by_turns(calls, rounds):
    """Milliseconds of each, median and least: one after the other, and the other way round the next time."""
    times = {key: [] for key in calls}
    for turn in range(rounds + 1):
        for key in list(calls)[:: 1 if turn % 2 else -1]:
            cool()
            start = perf_counter()
            calls[key]()
            if turn:  # the first warms up
                times[key].append(1e3 * (perf_counter() - start))
    return {key: (median(each), min(each)) for key, each in times.items()}


def sdpa_call(shape, dtype, beams):
    """As transformers calls it, with keys and values of every beam."""
    heads = models.SHAPES[shape][2]
    keys, values = torch.randn(2, AUDIOS * beams, heads, FRAMES, HEAD_DIM, dtype=dtype)
    query = torch.randn(AUDIOS * beams, heads, 1, HEAD_DIM, dtype=dtype)
    return lambda: torch.nn.functional.scaled_dot_product_attention(query, keys, values, scale=1.0)


def cache_layer(config, shape, dtype, beams):
    """A layer of the cache with random numbers in it."""
    width, _, heads = models.SHAPES[shape]
    lengths = torch.full((AUDIOS,), FRAMES, dtype=torch.int32)
    owner = torch.arange(AUDIOS, dtype=torch.int32).repeat_interleave(beams)
    layer = CrossCacheLayer(config, Audios(None, lengths, None, FRAMES, 0, None), owner)
    if beams == 1:
        sides = (1, width) if config.is_latent else (heads, HEAD_DIM)
        made = [
            Matrix.of(torch.randn(AUDIOS, FRAMES, *sides, dtype=dtype), lengths, config.bits, config.group)
            for _ in range(1 if config.is_latent else 2)
        ]
        layer.keys_of_audios, layer.values_of_audios = made[0], made[-1]
    return layer


def op_calls(layer, shape, dtype):
    """The op alone, and in the latent formats the whole, with the query times Wk before and Wv after."""
    width, _, heads = models.SHAPES[shape]
    rows, latent = len(layer.owner), layer.config.is_latent
    query = torch.randn(rows, *((heads, 1, width) if latent else (1, heads, HEAD_DIM)), dtype=dtype)
    keys, values = layer.keys_of_audios, layer.values_of_audios

    def alone():
        ops.cross_attention(
            query, keys.data, values.data, keys.scales, values.scales, layer.owner, layer.audios.lengths,
            layer.audios.bias, layer.audios.counters, FRAMES, layer.config.group, 1.0, False,
        )  # fmt: skip

    if not latent:
        return alone, None
    attention, plain = attention_of(shape, dtype), torch.randn(rows, 1, heads, HEAD_DIM, dtype=dtype)
    return alone, lambda: layer.attend(plain, attention, False)


def attention_of(shape, dtype):
    """One cross-attention, with random weights."""
    width, _, heads = models.SHAPES[shape]
    return WhisperAttention(width, heads, is_decoder=True, layer_idx=0, config=WhisperConfig()).to(dtype).eval()


# ---- whole decodes ----


def decode(args):
    """24 tokens, greedy or by beam search, of rows that never stop before."""
    loaded, label = None, None
    chosen = QUICK_DECODES.values() if args.quick else [DECODES[each] for each in args.decodes]
    for name, audios, beams in chosen:
        if name in models.REAL and name not in args.models:
            continue
        if name != loaded:
            model, states, label, loaded = *decoder_of(name, args), name
            clock = Clock(model)
        options = {"num_beams": beams, "min_new_tokens": TOKENS, "max_new_tokens": TOKENS}
        times, found = {form: [] for form in (THEIRS, *FORMATS)}, {}
        for turn in range(args.rounds + 1):
            for form in list(times)[:: 1 if turn % 2 else -1]:
                whisperkv.unpatch(model)
                if form != THEIRS:
                    whisperkv.patch(model, cross=CrossConfig(form))
                given = BaseModelOutput(last_hidden_state=states[:audios].clone())  # generate() changes it
                sequences, taken = clock.taken(lambda: decoding.generate(model, None, encoder_outputs=given, **options))
                if turn:  # the first warms up
                    times[form].append(taken)
                found[form] = sequences
        whisperkv.unpatch(model)
        medians = {form: [median(part) for part in zip(*each)] for form, each in times.items()}
        for form, (first, step, whole) in medians.items():
            theirs = medians[THEIRS]
            yield {
                "model": label,
                "audios": audios,
                "beams": beams,
                "format": form,
                "first": first,
                "step": step,
                "whole": whole,
                "ratio_first": theirs[0] / first,
                "ratio_step": theirs[1] / step,
                "ratio": theirs[2] / whole,
                "to_int8": medians["int8"][2] / whole,
                "same": equal_rows(found[THEIRS], found[form]),
                "rows": audios,
                "least": dict(zip(("first", "step", "whole"), map(min, zip(*times[form])))),  # less disturbed
            }


def decoder_of(name, args):
    """A model, the encoder's output that it decodes, and what to call it."""
    if name in models.REAL:
        model, processor = models.load(name, args.base)
        speeches = audio.windows(args.data, 2 if args.quick else AUDIOS)
        features = decoding.features_of(processor, speeches)
        return model, torch.cat([model.get_encoder()(each[None]).last_hidden_state for each in features]), name
    layers = {"large": args.large_layers}.get(name, models.SHAPES[name][1])
    model, cut = models.random_model(name, layers), layers < models.SHAPES[name][1]
    states = torch.nn.functional.layer_norm(torch.randn(AUDIOS, FRAMES, model.config.d_model), (model.config.d_model,))
    return model, states, f"{name}, {f'{layers} layers of {models.SHAPES[name][1]}, ' if cut else ''}random weights"


class Clock:
    """Notes when the decoder begins and ends its passes. It has the first word: what patch() does is counted."""

    def __init__(self, model):
        self.begins, self.ends = [], []
        decoder = model.get_decoder()
        decoder.register_forward_pre_hook(lambda *_: self.begins.append(perf_counter()), prepend=True)
        decoder.register_forward_hook(lambda *_: self.ends.append(perf_counter()))

    def taken(self, generate):
        """The tokens, and milliseconds of the first pass, of a mean step after it, and of the whole."""
        self.begins.clear()
        self.ends.clear()
        start = perf_counter()
        sequences = generate()
        end = perf_counter()
        assert len(self.begins) == TOKENS, f"{len(self.begins)} passes of the decoder for {TOKENS} tokens"
        first, later = self.ends[0] - self.begins[0], end - self.begins[1]
        return sequences, [1e3 * each for each in (first, later / (TOKENS - 1), end - start)]


def equal_rows(theirs, ours):
    return int((theirs == ours).all(-1).sum()) if theirs.shape == ours.shape else 0


# ---- memory ----


def memory(args):
    """base hears single utterances, padded to 30 s, and decodes each with 5 beams; large fills the cache of one."""
    for name in args.models if args.quick else ("base",):
        model, processor = models.load(name, args.base)
        decoding.remember_encoder(model)
        speeches = audio.utterances(args.data)[: 2 if args.quick else 32]
        start = decoding.start_tokens(model, processor)
        for trim in ("off", "padding"):
            for form in FORMATS:
                whisperkv.patch(model, cross=CrossConfig(form, trim=trim))
                states = model.get_encoder()(decoding.features_of(processor, speeches)).last_hidden_state
                states = states.repeat_interleave(5, 0)
                output = model.get_decoder()(
                    input_ids=torch.tensor([start] * len(states)), encoder_hidden_states=states, use_cache=True
                )
                stats = whisperkv.stats(model)
                assert not stats.note, stats.note
                layers = output.past_key_values.cross_attention_cache.layers
                yield {"model": name, "dtype": name_of(states.dtype), "audios": len(speeches), "beams": 5,
                       "format": form, "trim": trim, **held_row(layers, stats)}  # fmt: skip
                del output, layers
    shape = "tiny" if args.quick else "large"
    width, count, _ = models.SHAPES[shape]
    for dtype in DTYPES:
        attention = attention_of(shape, dtype)  # the same in every layer: its bytes do not matter
        states, owner = torch.randn(1, FRAMES, width, dtype=dtype), torch.zeros(1, dtype=torch.int32)
        for form in FORMATS:
            record = DecodeRecord(
                layers=count, width=width, limit=448, item_size=dtype.itemsize, rows=1, padding=0, frames=FRAMES,
                eviction=None, audios=1, frames_kept=FRAMES,
            )  # fmt: skip
            audios = Audios.gather(states, owner, None, count, record)
            layers = [CrossCacheLayer(CrossConfig(form), audios, owner) for _ in range(count)]
            for layer in layers:
                layer.fill(attention)
            yield {"model": f"{shape}, random weights", "dtype": name_of(dtype), "audios": 1, "beams": 1,
                   "format": form, "trim": "off", **held_row(layers, record.stats(1, ""))}  # fmt: skip


def held_row(layers, stats):
    held, beside = bytes_of(layers)
    return {
        "frames": stats.frames_kept / (stats.audios * stats.frames),
        "held": held,
        "stats": stats.cross_bytes,
        "beside": beside,
        "theirs": stats.cross_bytes_transformers,
        "ratio": stats.cross_bytes_transformers / (held + beside),
    }


def bytes_of(layers):
    """Of all storages that the layers can reach, each once: of what they attend over, and of the rest."""
    matrices, others = {}, {}
    for layer in layers:
        assert layer.audios.states is None, "the states are held although every layer is filled"
        for kind, holder in (
            (matrices, layer.keys_of_audios),
            (matrices, layer.values_of_audios),
            (matrices, layer.audios.latent),
            (others, layer.audios),
            (others, layer),
        ):
            for each in vars(holder).values() if holder is not None else ():
                if isinstance(each, torch.Tensor):
                    storage = each.untyped_storage()
                    kind[storage.data_ptr()] = storage.nbytes()
    return sum(matrices.values()), sum(others.values())


# ---- one process for each allocator ----


def measure(args):
    """In a process of its own: rows to stdout, a JSON line each."""
    tables.pin(args)
    if args.quick:
        args.rounds, args.op_rounds = 1, 3
    with torch.no_grad():
        for table, function in (("op", op), ("decode", decode), ("memory", memory)):
            if table in args.tables:
                for row in function(args):
                    print(json.dumps({"table": table, **row}), flush=True)


KEY = ("model", "shape", "dtype", "format", "audios", "beams")
TIMES = ("sdpa", "ours", "gbps", "read_gbps", "share", "ratio", "ratio_float32", "of_one", "folded", "least",
         "first", "step", "whole", "ratio_first", "ratio_step", "to_int8")  # fmt: skip


def main(args, argv):
    huge_pages, made = {}, {}
    for environment in (HUGE, {}):  # the plain run last, since its rows are the table's
        wanted = [table for table in args.tables if not (environment and table == "memory")]  # the same bytes
        if not wanted:
            continue
        if not environment:
            made = {each: tables.Table(f"cross-{each}-{args.threads}", TABLES[each][1], args) for each in wanted}
        command = [sys.executable, __file__, *argv, "--tables", *wanted, "--measure"]
        label = f"{args.threads} threads, {'huge pages' if environment else 'as it is'}"
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
        for line in tqdm(process.stdout, desc=label, unit="row"):
            row = json.loads(line)
            table = row.pop("table")
            key = (table, *(row.get(each) for each in KEY))
            if environment:
                huge_pages[key] = {f"{each}_huge": row[each] for each in TIMES if each in row}
            else:
                made[table].add(**row, **huge_pages.get(key, {}))
        if process.wait():
            raise SystemExit(f"{label}: failed")
    for table, rows in made.items():
        print(f"\n{table}, {TABLES[table][0]}, {args.threads} thread(s)\n\n{rows}")


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument(
        "--tables", nargs="+", default=list(TABLES), choices=TABLES, metavar="TABLE", help="of %(choices)s"
    )
    parser.add_argument(
        "--decodes", nargs="+", default=list(DECODES), choices=DECODES, metavar="DECODE", help="of %(choices)s"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="decodes for each number (default: %(default)s)")
    parser.add_argument("--op-rounds", type=int, default=OP_ROUNDS, help="calls of the op (default: %(default)s)")
    parser.add_argument(
        "--large-layers", type=int, default=LARGE_LAYERS, help="of large's decoder, of 32 (default: %(default)s)"
    )
    parser.add_argument("--measure", action="store_true", help="do not start processes: measure in this one")
    return parser


if __name__ == "__main__":
    arguments_given = arguments().parse_args()
    measure(arguments_given) if arguments_given.measure else main(arguments_given, sys.argv[1:])
