"""Every pruner at every budget on a data set, beside the full cache: python benchmarks/prune_data.py --model M --data D

--data: a folder as LibriSpeech or LibriSpeech-long, GigaSpeech.json, or JSON lines of audio, question and answers.
Prints Markdown: word error rate, or exact match where there are answers, with 95 % intervals over samples and seeds.
"""

import argparse
import sys
from contextlib import nullcontext

import torch
from tqdm import tqdm

from whisperkv import prune
from whisperkv.evaluation import exact_match, interval, normalized, read, word_errors
from whisperkv.prune.loading import inputs_of, load
from whisperkv.transcription.audio import RATE, read_audio


def answered(model, processor, sample, prompt, ways, tokens):
    """{way: (text, share of the bytes)} of each (pruner, budget, seed)"""
    samples = read_audio(sample.audio)
    samples = samples[round(sample.begin * RATE) : None if sample.end is None else round(sample.end * RATE)]
    inputs = inputs_of(processor, samples, sample.question or prompt).to(model.device, dtype=model.dtype)
    tokenizer, found = getattr(processor, "tokenizer", processor), {}
    for name, budget, seed in ways:
        settings = {"seed": seed} if name == "random" else {}
        torch.manual_seed(seed)
        with prune.apply(model, name, budget=budget, **settings) if name else nullcontext():
            output = model.generate(**inputs, max_new_tokens=tokens)
            held = prune.stats(model) if name else None
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        found[name, budget, seed] = text, held.bytes / held.bytes_full if held and held.bytes_full else 1.0
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--pruners", nargs="+", default=prune.names())
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.75, 0.5, 0.3])
    parser.add_argument(
        "--seeds", type=int, default=3, help="of pruners that draw; others run once (default: %(default)s)"
    )
    parser.add_argument("--prompt", default="Transcribe the audio.", help="where the data have no question")
    parser.add_argument("--count", type=int, help="samples (default: all)")
    parser.add_argument("--max-new-tokens", type=int, default=444)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    try:
        samples = read(args.data)[: args.count]
        model, processor = load(args.model, args.device)
        ways = [(None, 1.0, 0)]
        for budget in args.budgets:
            for name in args.pruners:
                ways += [(name, budget, seed) for seed in range(args.seeds if name == "random" else 1)]
        errors, words, bytes_held = ({way: [] for way in ways} for _ in range(3))
        for sample in tqdm(samples, file=sys.stderr):
            for way, (text, share) in answered(
                model, processor, sample, args.prompt, ways, args.max_new_tokens
            ).items():
                if sample.answers:
                    wrong, of = int(not exact_match(text, sample.answers)), 1
                else:
                    wrong, of = word_errors(normalized(text), normalized(sample.text))
                errors[way].append(wrong)
                words[way].append(of)
                bytes_held[way].append(share)
    except (ImportError, OSError, ValueError, TypeError) as error:
        parser.error(str(error))
    print(
        f"{len(samples)} samples of {args.data}\n\n| pruner | budget | bytes | errors % | 95 % |\n|---|---|---|---|---|"
    )
    for name, budget in dict.fromkeys((name, budget) for name, budget, _ in ways):
        seeds = [way for way in ways if way[:2] == (name, budget)]
        wrong, of, share = ([value for way in seeds for value in each[way]] for each in (errors, words, bytes_held))
        low, high = interval(wrong, of)
        rate = 100 * sum(wrong) / max(sum(of), 1)
        held = sum(share) / len(share)
        print(f"| {name or 'full'} | {budget} | {held:.2f} | {rate:.2f} | {100 * low:.2f} to {100 * high:.2f} |")


if __name__ == "__main__":
    main()
