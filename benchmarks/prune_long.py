"""Ten minutes of audio in a Qwen2-Audio of true width, fewer layers and random weights: python benchmarks/prune_long.py

For each pruner: seconds of the prompt's pass beside the unpruned one, of a token after it, and bytes of the cache.
"""

import argparse
import json
import resource
import sys
import time

import torch
import transformers

from whisperkv import prune

AUDIO, CLIP, MELS = 1999, 750, 128  # tokens of a clip of 30 s


def made(layers, dtype):
    audio = dict(
        model_type="qwen2_audio_encoder", d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64,
        num_mel_bins=MELS, max_source_positions=1500,
    )  # fmt: skip
    text = dict(
        model_type="qwen2", hidden_size=4096, intermediate_size=11008, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=2000, max_position_embeddings=32768,
    )  # fmt: skip
    config = transformers.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=AUDIO)
    torch.manual_seed(0)
    return transformers.Qwen2AudioForConditionalGeneration._from_config(config, dtype=dtype).eval()


def prompt(clips):
    question = torch.arange(20) + 100
    tokens = torch.cat([torch.tensor([1]), torch.full((clips * CLIP,), AUDIO), question])[None]
    mask = torch.ones(clips, 3000, dtype=torch.long)
    features = torch.randn(clips, MELS, 3000, generator=torch.Generator().manual_seed(1))
    return {"input_ids": tokens, "input_features": features, "feature_attention_mask": mask}


@torch.no_grad()
def timed(model, inputs, steps):
    """(seconds of the prompt, of a step, bytes)"""
    begin = time.perf_counter()
    cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    read = time.perf_counter() - begin
    token, took = torch.tensor([[123]]), []
    for _ in range(steps):
        begin = time.perf_counter()
        model(input_ids=token, past_key_values=cache)
        took.append(time.perf_counter() - begin)
    held = sum(
        layer.bytes() if hasattr(layer, "bytes") else 2 * layer.keys.numel() * layer.keys.element_size()
        for layer in cache.layers
    )
    return read, sorted(took)[len(took) // 2], held


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--pruners", nargs="+", default=["merge", "token_attn_recency", "window"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--results", help="JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, inputs = made(args.layers, getattr(torch, args.dtype)), prompt(round(args.minutes * 2))
    inputs["input_features"] = inputs["input_features"].to(model.dtype)
    timed(model, prompt(1) | {"input_features": prompt(1)["input_features"].to(model.dtype)}, 1)
    full = None
    for name in [None, *args.pruners]:
        if name:
            with prune.apply(model, name, budget=args.budget):
                read, step, held = timed(model, inputs, args.steps)
        else:
            read, step, held = full = timed(model, inputs, args.steps)
        record = {
            "pruner": name or "full", "tokens": inputs["input_ids"].shape[1], "layers": args.layers,
            "dtype": args.dtype, "threads": args.threads, "budget": args.budget if name else 1.0,
            "prompt_seconds": round(read, 2), "prompt_over_full": round(read / full[0], 3),
            "step_ms": round(1000 * step, 1), "step_over_full": round(step / full[1], 3), "bytes": held,
            "bytes_over_full": round(held / full[2], 3),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 2),
        }  # fmt: skip
        print(json.dumps(record), flush=True)
        if args.results:
            with open(args.results, "a") as out:
                print(json.dumps(record), file=out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
