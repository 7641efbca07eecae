"""Every pruner beside the full cache on the trained speech LLMs: python benchmarks/pruning.py

Exact match and digit error rate of greedy decodes, each of --seeds a test set (and a lot) of its own, with 95 %
intervals over all sequences (bootstrap), and the wins over `random` in pairs. speech_llm.py trains the models.
"""

import argparse
import json
import sys

import digits
import speech_llm
import torch
from digits import TASKS, inputs_of, sequences, text_of
from tqdm import tqdm

from whisperkv import prune
from whisperkv.evaluation import interval, word_errors

BUDGETS = (0.75, 0.5, 0.3)


def texts_of(model, task, spoken, pruner, budget, settings, batch=8):
    """(texts, share of the full cache's bytes)"""
    texts, held, full = [], 0, 0
    for first in range(0, len(spoken), batch):
        inputs = inputs_of(task, spoken[first : first + batch])
        if pruner is None:
            tokens = model.generate(**inputs)
        else:
            with prune.apply(model, pruner, budget=budget, **settings):
                tokens = model.generate(**inputs)
                held += prune.stats(model).bytes
                full += prune.stats(model).bytes_full
        texts += [text_of(row) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]
    return texts, held / full if full else 1.0


def rounded(numbers):
    return [round(number, 4) for number in numbers]


def settings_of(name, model, seed):
    if name == "random":
        return {"seed": seed}
    if name == "token_saliency":

        def speaks(embeddings):
            logits = model.ctc_head(embeddings).float().log_softmax(-1)
            return torch.log1p(-logits[..., digits.PAD].exp().clamp(max=1 - 1e-6)) - logits[..., digits.PAD]

        return {"head": speaks}
    return {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--pruners", nargs="+", default=prune.names())
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=100, help="sequences a seed (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", help="JSON lines")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out = open(args.results, "a") if args.results else None
    for task in args.tasks:
        model = speech_llm.load(task)
        sets = [list(sequences(TASKS[task], "test", args.count, seed)) for seed in range(args.seeds)]
        wanted = [one.text for spoken in sets for one in spoken]
        pruners = sorted(args.pruners, key=lambda name: name != "random")  # the others are held against it
        cells = [(None, 1.0)] + [(name, budget) for budget in args.budgets for name in pruners]
        exact = {}
        for name, budget in tqdm(cells, task, file=sys.stderr, mininterval=5):
            texts, shares = [], []
            for seed, spoken in enumerate(sets):
                settings = settings_of(name, model, seed)
                some, share = texts_of(model, TASKS[task], spoken, name, budget, settings)
                texts += some
                shares.append(share)
            exact[name, budget] = [float(text == right) for text, right in zip(texts, wanted, strict=True)]
            wrong, words = map(sum, zip(*map(word_errors, texts, wanted)))
            record = {
                "task": task, "pruner": name or "full", "budget": budget, "bytes": round(sum(shares) / len(shares), 3),
                "exact": round(sum(exact[name, budget]) / len(wanted), 4),
                "exact_95": rounded(interval(exact[name, budget])),
                "digit_errors": round(wrong / words, 4), "sequences": len(wanted),
            }  # fmt: skip
            if name not in (None, "random") and ("random", budget) in exact:
                gains = [a - b for a, b in zip(exact[name, budget], exact["random", budget], strict=True)]
                record["exact_over_random_95"] = rounded(interval(gains))
            print(json.dumps(record), flush=True)
            if out:
                print(json.dumps(record), file=out, flush=True)


if __name__ == "__main__":
    main()
