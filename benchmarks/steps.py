"""Times and memory, with and without whisperkv, of decode steps in one process, taken turn by turn.

steps       a step of the whole decoder at some length: tiny.en and base with real weights, small with random ones
attention   the self-attention modules alone at up to 448 tokens, with their four projections and without; the caches
            of all layers take turns, and 64 MB of other memory are read before each pass, as the rest of a step would
reorder     moving the self-attention caches when 5 beams an audio change places
memory      bytes of the tensors in the cache, beside stats(), the formula and transformers

Each table is measured twice, in processes of their own: as it is, and with GLIBC_TUNABLES=glibc.malloc.hugetlb=1.
"""

import copy
import json
import os
import subprocess
import sys
from statistics import median
from time import perf_counter

import models
import tables
import torch
from tqdm import tqdm
from transformers import DynamicCache, EncoderDecoderCache, WhisperConfig
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.whisper.modeling_whisper import WhisperAttention

import whisperkv
from whisperkv import EvictionConfig
from whisperkv.attention import SelfAttention
from whisperkv.cache import SelfCacheLayer
from whisperkv.slots import Shared, slots_for

HUGE = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
LENGTHS, BATCHES, RUN = (32, 128, 440), (1, 8), 16  # tokens, rows; steps in a row that end 8 after the length
ROUNDS, QUICK_ROUNDS = 5, 1
EVICTION = EvictionConfig(recent=64, heavy=32)

RATIO = {
    "theirs": ("transformers", ".3f"),
    "ours": ("whisperkv", ".3f"),
    "ratio": ("ratio", ".2f"),
    "theirs_huge": ("transformers, huge pages", ".3f"),
    "ours_huge": ("whisperkv, huge pages", ".3f"),
    "ratio_huge": ("ratio", ".2f"),
}
TABLES = {
    "steps": ("ms a step", {"model": ("model", ""), "rows": ("batch", "d"), "tokens": ("tokens", "d"), **RATIO}),
    "attention": (
        "ms for all layers",
        {"shape": ("shape", ""), "dtype": ("dtype", ""), "rows": ("batch", "d"), "tokens": ("tokens", "d"),
         "part": ("self-attention", ""), **RATIO},
    ),
    "reorder": (
        "ms for all layers",
        {"shape": ("shape", ""), "rows": ("audios x 5 beams", "d"), "tokens": ("tokens", "d"), **RATIO},
    ),
    "memory": (
        "bytes",
        {"model": ("model", ""), "case": ("case", ""), "rows": ("rows", "d"), "tokens": ("tokens", "d"),
         "held": ("tensors in the cache", "d"), "stats": ("stats()", "d"), "formula": ("formula", "d"),
         "spare": ("spare buffer", "d"), "theirs": ("transformers", "d"), "ratio": ("ratio", ".2f")},
    ),
}  # fmt: skip


# ---- taking turns ----


def medians(times):
    """Milliseconds of theirs and ours, and the ratio: above 1, ours is faster."""
    theirs, ours = (1e3 * median(each) for each in times)
    return {"theirs": theirs, "ours": ours, "ratio": theirs / ours}


class Turns:
    """Times of two functions, called one after the other, and the other way round the next time."""

    def __init__(self, *functions, before=lambda: None):
        self.functions, self.before = functions, before

    def take(self, times):
        for which in (0, 1) if len(times[0]) % 2 else (1, 0):
            self.before()
            start = perf_counter()
            self.functions[which]()
            times[which].append(perf_counter() - start)


OTHER = torch.zeros(16 << 20)  # 64 MB


def cool():
    OTHER.sum()


# ---- the tables ----


def steps(args, names):
    """One token through the whole decoder and the output head."""
    for name in names:
        model = models.load(name, args.base)[0] if name in models.REAL else models.random_model(name)
        twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})  # the same weights
        whisperkv.patch(model)
        for rows in BATCHES:
            states = torch.randn(rows, 1500, model.config.d_model)
            for tokens in LENGTHS:
                times = [[], []]
                for _ in range(args.rounds):
                    turns = Turns(Decode(twin, states, tokens + 8 - RUN), Decode(model, states, tokens + 8 - RUN))
                    for _ in range(RUN):
                        turns.take(times)
                label = name if name in models.REAL else f"{name}, random weights"
                yield {"model": label, "rows": rows, "tokens": tokens, **medians(times)}


class Decode:
    """A greedy decode behind a prompt of so many tokens; each call is a step."""

    def __init__(self, model, states, prompt):
        self.model, self.cache = model, None
        self.states = BaseModelOutput(last_hidden_state=states)
        self.tokens = torch.full((len(states), prompt), model.generation_config.decoder_start_token_id)
        self()

    def __call__(self):
        output = self.model(
            encoder_outputs=self.states, decoder_input_ids=self.tokens, past_key_values=self.cache, use_cache=True
        )
        self.cache, self.tokens = output.past_key_values, output.logits[:, -1:].argmax(-1)


def attention(args, shapes):
    """One token through the self-attention of every layer."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in shapes:
            width, layers, heads = models.SHAPES[shape]
            for rows in BATCHES:
                for part in ("with projections", "without"):
                    hidden = torch.randn(rows, 1, width, dtype=dtype)
                    theirs = modules(WhisperAttention, shape, dtype, part)
                    ours = modules(SelfAttention, shape, dtype, part)
                    times = [[], []]
                    for _ in range(args.rounds):
                        caches = filled(rows, 448 - RUN, shape, dtype)
                        turns = Turns(*(Sweep(*pair, hidden) for pair in zip((theirs, ours), caches)), before=cool)
                        for _ in range(RUN):
                            turns.take(times)
                    yield {"shape": shape, "dtype": str(dtype).removeprefix("torch."), "rows": rows, "tokens": 448,
                           "part": part, **medians(times)}  # fmt: skip


def modules(kind, shape, dtype, part):
    """The self-attention of each layer. Without projections, they hand on what they are given."""
    width, layers, heads = models.SHAPES[shape]
    config = WhisperConfig(attn_implementation="sdpa")
    made = [
        kind(width, heads, is_decoder=True, is_causal=True, layer_idx=index, config=config) for index in range(layers)
    ]
    for module in made:
        module.to(dtype).eval()
        if part == "without":
            module.q_proj = module.k_proj = module.v_proj = module.out_proj = torch.nn.Identity()
    return made


def filled(rows, tokens, shape, dtype=torch.float32):
    """Two caches with the same tokens in them: theirs and ours."""
    width, layers, heads = models.SHAPES[shape]
    theirs, ours = (EncoderDecoderCache(DynamicCache(), DynamicCache()) for _ in range(2))
    shared = Shared()
    ours.self_attention_cache.layers = [SelfCacheLayer(shared=shared) for _ in range(layers)]
    for index in range(layers):
        keys, values = torch.randn(2, rows, heads, tokens, width // heads, dtype=dtype)
        theirs.self_attention_cache.update(keys, values, index)
        ours.self_attention_cache.update(keys, values, index)
    return theirs, ours


class Sweep:
    """One token through the attention of all layers."""

    def __init__(self, modules, cache, hidden):
        self.modules, self.cache, self.hidden = modules, cache, hidden

    def __call__(self):
        for module in self.modules:
            module(self.hidden, past_key_values=self.cache)


def reorder(args, shapes):
    """Beams change places: two of five go on twice, as often happens."""
    for shape in shapes:
        for audios in BATCHES:
            order = (5 * torch.arange(audios)[:, None] + torch.tensor([0, 0, 1, 1, 3])).flatten()
            for tokens in (128, 440):
                theirs, ours = (cache.self_attention_cache for cache in filled(5 * audios, tokens, shape))
                turns = Turns(lambda: theirs.reorder_cache(order), lambda: ours.reorder_cache(order), before=cool)
                times = [[], []]
                for _ in range(1 + 8 * args.rounds):
                    turns.take(times)
                yield {"shape": shape, "rows": audios, "tokens": tokens, **medians([each[1:] for each in times])}


def memory(args, names):
    """After so many steps; 5 beams change places after each."""
    cases = (
        ("every token", None, 8, 40, False),
        ("every token", None, 8, 440, False),
        ("heavy_hitter 64+32", EVICTION, 8, 440, False),
        ("every token, 5 beams", None, 40, 200, True),
        ("heavy_hitter 64+32, 5 beams", EVICTION, 40, 200, True),
    )
    for name in names:
        model, _ = models.load(name, args.base)
        for case, eviction, rows, tokens, beams in cases:
            tokens = min(tokens, 120) if args.quick else tokens
            held = []
            for prepare in (whisperkv.unpatch, lambda model: whisperkv.patch(model, eviction)):
                prepare(model)
                decode = Decode(model, torch.zeros(rows, 1, model.config.d_model), 4)  # the cross cache does not matter
                for _ in range(tokens - 4):
                    if beams:
                        decode.cache.self_attention_cache.reorder_cache(torch.arange(rows).roll(1))
                    decode()
                held.append(bytes_of(decode.cache.self_attention_cache.layers))
            config, stats = model.config, whisperkv.stats(model)
            most = config.max_target_positions if eviction is None else eviction.budget
            slots = slots_for(min(tokens, most), most)
            table = 4 * slots * rows if beams and eviction is None else 0
            row = 2 * slots * config.d_model * 4 + 16 + (0 if eviction is None else 8 * slots)
            (theirs, _), (ours, spare) = held
            yield {"model": name, "case": case, "rows": rows, "tokens": tokens, "held": ours, "stats": stats.self_bytes,
                   "formula": config.decoder_layers * rows * row + table + spare, "spare": spare, "theirs": theirs,
                   "ratio": theirs / ours}  # fmt: skip


def bytes_of(layers):
    """Of all tensors that the layers hold with the spare buffer that they share, and of that buffer."""
    spare = sum(layer.shared.spare.nbytes for layer in layers[:1] if isinstance(layer, SelfCacheLayer))
    tensors = [each for layer in layers for each in vars(layer).values() if isinstance(each, torch.Tensor)]
    return sum({each.data_ptr(): each.nbytes for each in tensors}.values()) + spare, spare


# ---- one process for each allocator ----


def measure(args):
    """In a process of its own: rows to stdout, a JSON line each."""
    tables.pin(args)
    args.rounds = QUICK_ROUNDS if args.quick else args.rounds
    shapes = list(models.SHAPES)[:1] if args.quick else list(models.SHAPES)
    names = [*args.models, *([] if args.quick else ["small"])]
    work = {
        "steps": (steps, names),
        "attention": (attention, shapes),
        "reorder": (reorder, shapes),
        "memory": (memory, args.models),
    }
    with torch.no_grad():
        for table in args.tables:
            function, over = work[table]
            if table == "memory" and HUGE.items() <= os.environ.items():
                continue  # the same bytes
            for row in function(args, over):
                print(json.dumps({"table": table, **row}), flush=True)


def main(args, argv):
    huge_pages = {}
    for environment in (HUGE, {}):  # the plain run last, since its rows are the table's
        command = [sys.executable, __file__, *argv, "--measure"]
        label = f"{args.threads} threads, {'huge pages' if environment else 'as it is'}"
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True)
        made = {} if environment else {
            table: tables.Table(f"steps-{table}-{args.threads}", TABLES[table][1], args) for table in args.tables
        }  # fmt: skip
        for line in tqdm(process.stdout, desc=label, unit="row"):
            row = json.loads(line)
            table = row.pop("table")
            key = (table, *(row.get(each) for each in ("model", "shape", "dtype", "case", "rows", "tokens", "part")))
            if environment:
                huge_pages[key] = {f"{each}_huge": row[each] for each in ("theirs", "ours", "ratio") if each in row}
            else:
                made[table].add(**row, **({} if table == "memory" else huge_pages.get(key, {})))
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
        "--rounds", type=int, default=ROUNDS, help="runs of 16 steps for each number (default: %(default)s)"
    )
    parser.add_argument("--measure", action="store_true", help="do not start processes: measure in this one")
    return parser


if __name__ == "__main__":
    arguments_given = arguments().parse_args()
    measure(arguments_given) if arguments_given.measure else main(arguments_given, sys.argv[1:])
