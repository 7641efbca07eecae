"""A small language model whose cache holds latents, by every method: python benchmarks/lowrank_llm.py

Trains a byte-level LLaMA (1.2 million parameters, 6 layers, 8 heads for queries and 4 for keys) on the docstrings of
the Python standard library and of torch, as they are installed here; one model a seed. Each is converted at 2, 4 and 8
times fewer numbers by every method, its perplexity a byte is taken on modules that were not trained on, then its
matrices are trained by both optimizers and both losses from the conversion on. What is done stands in the JSON lines of
--results, and is not done again. --table prints it.

Accuracy alone is measured: nothing here depends on what else the machine does.
"""

import argparse
import ast
import copy
import hashlib
import importlib.util
import itertools
import json
import statistics
import sys
import sysconfig
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from whisperkv.lowrank import MLATrainer, compute_perplexity, convert_to_mla, quantize_latents

RATIOS = (2, 4, 8)
METHODS = {
    "separate": {"compression_method": "separate"},
    "joint": {"compression_method": "joint"},
    "decoupled_rope": {"compression_method": "decoupled_rope"},
    "xkv, bases": {"compression_method": "xkv", "xkv_share": "bases", "cross_layer_group_size": 3},
    "xkv, latents": {"compression_method": "xkv", "cross_layer_group_size": 3},
}
MORE = {  # before training alone
    "separate, not calibrated": {"compression_method": "separate", "use_calibration": False},
    "joint, not calibrated": {"compression_method": "joint", "use_calibration": False},
    "xkv, bases, 2 layers skipped": {**METHODS["xkv, bases"], "xkv_skip_early_layers": 2},
    "xkv, latents, 2 layers skipped": {**METHODS["xkv, latents"], "xkv_skip_early_layers": 2},
    "xkv, bases, 2 layers original": {
        **METHODS["xkv, bases"], "xkv_skip_early_layers": 2, "keep_early_layers_original": True,
    },
}  # fmt: skip
LOSSES = {"distillation": {}, "reconstruction": {"use_distillation": False, "use_reconstruction_loss": True}}
OPTIMIZERS = ("adamw", "riemannian")
LENGTH = 128


def docstrings():
    """(bytes to train on, bytes to test on) of modules that are not the same."""
    roots = [Path(sysconfig.get_paths()["stdlib"])]
    roots += [Path(importlib.util.find_spec("torch").origin).parent]
    parts = bytearray(), bytearray()
    for root in roots:
        for file in sorted(root.rglob("*.py")):
            relative = file.relative_to(root)
            if {"site-packages", "test", "tests", "idlelib"} & set(relative.parts):
                continue
            try:
                tree = ast.parse(file.read_text())
            except (SyntaxError, UnicodeDecodeError):
                continue
            held_out = hashlib.sha256(str(relative).encode()).digest()[0] < 26
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                    text = ast.get_docstring(node) or ""
                    if len(text) > 200:
                        parts[held_out].extend(text.encode() + b"\n\n")
    return parts


def rows_of(data, count, generator):
    """int64 [count, LENGTH]"""
    whole = torch.frombuffer(data, dtype=torch.uint8)
    begins = torch.randint(len(whole) - LENGTH, (count,), generator=generator)
    return torch.stack([whole[begin : begin + LENGTH].long() for begin in begins.tolist()])


def language_model(data, seed, args):
    """Trained, or as it was trained before."""
    file = args.results / f"lowrank-llm-{seed}.pt"
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if file.exists():
        model.load_state_dict(torch.load(file, weights_only=True))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=args.steps, pct_start=0.05)
    generator = torch.Generator().manual_seed(seed)
    for _ in tqdm(range(args.steps), desc=f"model of seed {seed}"):
        rows = rows_of(data, 12, generator)
        model(input_ids=rows, labels=rows).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), file)
    return model.eval()


def cases(args):
    """(method, its settings, ratio, optimizer, loss): the last two None before training."""
    yield "the model", None, 1, None, None
    for ratio in RATIOS:
        for method, settings in {**METHODS, **MORE}.items():
            yield method, settings, ratio, None, None
    if not args.untrained:
        for ratio, (method, settings) in itertools.product((4, 2, 8), METHODS.items()):
            for optimizer, loss in itertools.product(OPTIMIZERS, LOSSES):
                yield method, settings, ratio, optimizer, loss


def measure(args):
    train, test = docstrings()
    generator = torch.Generator().manual_seed(99)
    calibration, held_out = (list(rows_of(data, 128, generator)) for data in (train, test))
    until = time.monotonic() + 60 * args.minutes
    done = {(line["seed"], *line["case"]) for line in lines(args)}
    print(f"{len(train)} bytes to train on, {len(test)} to test on", file=sys.stderr)
    for seed in args.seeds:
        model = language_model(train, seed, args)
        lessons = list(rows_of(train, 8 * args.lessons, torch.Generator().manual_seed(1000 + seed)))
        for method, settings, ratio, optimizer, loss in cases(args):
            case = [method, ratio, optimizer, loss]
            if (seed, *case) in done:
                continue
            if time.monotonic() > until:
                return
            small = copy.deepcopy(model)
            found = {}
            if settings is not None:
                given = {} if settings.get("use_calibration") is False else {"calibration": calibration}
                convert_to_mla(small, ratio, store_original_weights=True, verbose=False, **given, **settings)
                if optimizer is not None:
                    trainer = MLATrainer(small, None, args.rate, args.rate, optimizer=optimizer, **LOSSES[loss])
                    trainer.train(lessons, 1, 8, LENGTH, seed=seed, progress=False)
                elif method in METHODS:
                    for bits in (4, 3):
                        quantize_latents(small, bits, calibration)
                        found[f"bits {bits}"] = compute_perplexity(small, None, held_out, LENGTH, 64)
                    quantize_latents(small, None)
            perplexity = compute_perplexity(small, None, held_out, LENGTH, 64)
            line = {"seed": seed, "case": case, "perplexity": perplexity, **found}
            print(json.dumps(line), flush=True)
            with open(args.results / "lowrank-llm.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")


def lines(args):
    file = args.results / "lowrank-llm.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def cell(values):
    """The mean over seeds, and from which to which."""
    if not values:
        return "-"
    mean = statistics.mean(values)
    return f"{mean:.2f}" if len(values) == 1 else f"{mean:.2f} ({min(values):.2f} to {max(values):.2f})"


def table(args):
    found = {}
    for line in lines(args):
        for name in ("perplexity", "bits 4", "bits 3"):
            if name in line:
                found.setdefault((*line["case"], name), []).append(line[name])
    print(f"the model: {cell(found.get(('the model', 1, None, None, 'perplexity'), []))}\n")
    trained = [(optimizer, loss) for optimizer in OPTIMIZERS for loss in LOSSES]
    head = ["times fewer", "method", "before", "with 4 bits", "with 3 bits"]
    head += [f"{optimizer}, {loss}" for optimizer, loss in trained]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for ratio in RATIOS:
        for method in {**METHODS, **MORE}:
            cells = [
                cell(found.get((method, ratio, None, None, name), [])) for name in ("perplexity", "bits 4", "bits 3")
            ]
            cells += [cell(found.get((method, ratio, *how, "perplexity"), [])) for how in trained]
            print(f"| {ratio} | {method} | " + " | ".join(cells) + " |")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800, help="of the language model (default: %(default)s)")
    parser.add_argument("--lessons", type=int, default=50, help="steps of each training (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=1e-3, help="of both kinds of matrices (default: %(default)s)")
    parser.add_argument("--untrained", action="store_true", help="no training: every method before it")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin nothing new after so many")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--table", action="store_true", help="print what was measured so far")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if not args.table:
        measure(args)
    table(args)


if __name__ == "__main__":
    main()
