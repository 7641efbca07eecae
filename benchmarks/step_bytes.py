"""A greedy step of the decoder, output head included, beside the time that the bytes it reads take.

Bytes are those of the matrices, biases and both caches; the bandwidth is that of a plain read of 512 MB (torch's sum)
by as many threads, between the steps, so that whoever disturbs the machine disturbs both. All settings take turns.
"""

from statistics import median
from time import perf_counter

import models
import tables
import torch
from settings import OURS, apply
from steps import Decode

import whisperkv

SETTINGS = ("patch(model)", "bfloat16, latent_int8, trim", "int8", "int8, latent_int8, trim")
BYTES = {"model": 4, "bfloat16": 2, "int8": 1}
LENGTH, STEPS = 32, 20
COLUMNS = {
    "model": ("model", ""), "setting": ("setting", ""), "rows": ("batch", "d"), "megabytes": ("MB", ".1f"),
    "step": ("ms a step", ".2f"), "read": ("GB/s, plain read", ".1f"), "bound": ("ms of its bytes", ".2f"),
    "ratio": ("times as long", ".2f"),
}  # fmt: skip


def bytes_of(model, setting):
    """What a step reads: of the decoder's matrices each once, keys and values of the audio projected before."""
    size, skipped = BYTES[setting.get("weights", "model")], ()
    if "latent" not in setting.get("cross", {}).get("format", ""):
        skipped = ("encoder_attn.k_proj", "encoder_attn.v_proj")
    numbers = 0
    for name, parameter in model.model.decoder.named_parameters():
        if "embed_positions" not in name and not any(part in name for part in skipped):
            numbers += parameter.numel() * (size if parameter.dim() == 2 else 4)
    held = whisperkv.stats(model)
    return numbers + held.self_bytes + held.cross_bytes


def plain_read(memory):
    begin = perf_counter()
    memory.sum()
    return memory.nbytes / (perf_counter() - begin)


def measured(name, rows, args):
    memory = torch.ones(2**27)
    decodes, times, reads = {}, {}, []
    for setting in args.settings:
        model = models.load(name, args.base)[0] if name in models.REAL else models.random_model(name)
        apply(model, OURS[setting])
        states = torch.randn(rows, 1500, model.config.d_model)
        with torch.no_grad():
            decodes[setting] = model, Decode(model, states, LENGTH)
        times[setting] = []
    with torch.no_grad():
        for _ in range(STEPS):
            for setting, (_, decode) in decodes.items():
                decode()  # what the others have read is in the processor's cache
                begin = perf_counter()
                decode()
                times[setting].append(perf_counter() - begin)
            reads.append(plain_read(memory))
    for setting, (model, _) in decodes.items():
        size, step, read = bytes_of(model, OURS[setting]), median(times[setting]), median(reads)
        yield {"model": name, "setting": setting, "rows": rows, "megabytes": size / 1e6, "step": 1e3 * step,
               "read": read / 1e9, "bound": 1e3 * size / read, "ratio": step * read / size}  # fmt: skip


def main(args):
    tables.pin(args)
    table = tables.Table(f"step-bytes-{args.threads}", COLUMNS, args)
    for name in args.models:
        for rows in args.batch:
            for row in measured(name, rows, args):
                table.add(**row)
    print(table)


def arguments():
    parser = tables.arguments(__doc__)
    for action in parser._actions:
        if action.dest == "models":
            action.choices = (*models.REAL, *models.SHAPES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="audios at once (default: 1)")
    parser.add_argument("--settings", nargs="+", default=SETTINGS, choices=OURS, metavar="NAME", help="of %(choices)s")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
