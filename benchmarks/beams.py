"""A step of beam search, reordering included, late in a transcript: python benchmarks/beams.py [--tokens 200]

Encoder outputs of real audio, tokens at random: all are forced through the cache, so every step does the same work. Two
whisperkvs (PYTHONPATH) are compared by running this twice in turns; its own ratio is that to transformers.
"""

import argparse
import json
import statistics
import time

import torch
from audio import windows
from decoding import features_of
from models import load

from whisperkv import CrossConfig, patch, unpatch


@torch.no_grad()
def step_times(model, states, beams, tokens, steps):
    """Seconds of each step with its reordering, after so many tokens."""
    generator = torch.Generator().manual_seed(0)
    rows = len(states) * beams
    states = states.repeat_interleave(beams, 0)
    past, times = None, []
    for position in range(tokens + steps):
        ids = torch.randint(1000, (rows, 1), generator=generator)
        chosen = torch.randint(beams, (rows // beams, beams), generator=generator)
        order = (torch.arange(0, rows, beams)[:, None] + chosen).view(-1)
        begin = time.perf_counter()
        past = model(encoder_outputs=(states,), decoder_input_ids=ids, past_key_values=past).past_key_values
        past.reorder_cache(order)
        if position >= tokens:
            times.append(time.perf_counter() - begin)
    return times


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="base", help="tiny.en or base")
    parser.add_argument("--base", help="a faster-whisper folder of base")
    parser.add_argument("--audios", type=int, default=4)
    parser.add_argument("--beams", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=200, help="before the first step that counts")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--format", default="latent_int8", help="of the cross-attention cache")
    parser.add_argument("--ours-only", action="store_true", help="leave transformers out")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, processor = load(args.model, args.base)
    with torch.no_grad():
        states = model.get_encoder()(features_of(processor, windows(most=args.audios))).last_hidden_state
    row = {name: getattr(args, name) for name in ("model", "audios", "beams", "tokens", "threads", "format")}
    kinds = {"ours": lambda: patch(model, cross=CrossConfig(args.format)), "transformers": lambda: unpatch(model)}
    for name, prepare in kinds.items():
        if name == "ours" or not args.ours_only:
            prepare()
            times = step_times(model, states, args.beams, args.tokens, args.steps)
            row[f"{name}_ms"] = round(1e3 * statistics.median(times), 2)
    if "transformers_ms" in row:
        row["ratio"] = round(row["transformers_ms"] / row["ours_ms"], 2)
    print(json.dumps(row))


if __name__ == "__main__":
    main()
