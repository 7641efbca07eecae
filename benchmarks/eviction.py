"""Accuracy under eviction: one row for each policy and budget, on 30 s windows and on long recordings.

A configuration is written   policy recent+heavy [decay] [unpinned]
for example                  "heavy_hitter 64+32", "heavy_hitter 32+16 0.9", "window 96+0 unpinned", or "full".
"""

from dataclasses import dataclass

import audio
import decoding
import models
import tables
from tqdm import tqdm

import whisperkv
from whisperkv import EvictionConfig

DECAYS = (0.9, 0.95, 0.98, 0.99, 1.0)
CONFIGS = [
    "full",
    "heavy_hitter 64+32",
    "heavy_hitter 32+16",
    "heavy_hitter 16+8",
    "heavy_hitter 64+32 unpinned",
    "heavy_hitter 32+16 unpinned",
    "window 96+0",
    "window 96+0 unpinned",
    "window 48+0",
    "window 48+0 unpinned",
    "window 24+0",
    "magnitude 64+32",
    "magnitude 32+16",
    "magnitude 16+8",
    *(
        f"heavy_hitter {budget} {decay}"
        for budget in ("32+16", "16+8")
        for decay in DECAYS
        if decay != EvictionConfig.decay
    ),
]
LONG_CONFIGS = [
    "full",
    *(f"heavy_hitter 64+32 {decay} unpinned" for decay in DECAYS),
    "window 96+0 unpinned",
    "magnitude 64+32 unpinned",
    *(f"heavy_hitter 32+16 {decay} unpinned" for decay in DECAYS),
    "window 48+0 unpinned",
    "magnitude 32+16 unpinned",
    "heavy_hitter 16+240",
    "window 256+0",
]
QUICK = ["full", "heavy_hitter 32+16", "window 48+0 unpinned"]
QUICK_LONG = ["full", "heavy_hitter 32+16 unpinned"]

COLUMNS = {
    "model": ("model", ""),
    "config": ("cache", ""),
    "wer": ("WER %", ".2f"),
    "nll": ("NLL", ".4f"),
    "loops": ("loops", "d"),
    "same": ("same text", "d"),
    "windows": ("of", "d"),
    "tokens": ("tokens", "d"),
    "bitten": ("evicting", "d"),
    "kib": ("self cache, KiB a row", ".0f"),
    "kib_transformers": ("transformers", ".0f"),
}


def parsed(text):
    """The EvictionConfig that a text describes; None for "full"."""
    if text == "full":
        return None
    policy, budget, *rest = text.split()
    recent, heavy = map(int, budget.split("+"))
    decay = [float(word) for word in rest if word != "unpinned"] or [EvictionConfig.decay]
    return EvictionConfig(policy, recent, heavy, *decay, pin_prompt="unpinned" not in rest)


@dataclass
class Task:
    """What is decoded in one call, with the transcript of the full model for teacher forcing."""

    speeches: list
    features: object  # of generate()
    options: dict
    forced: list  # of (features, prompts, transcripts), batches


def window_tasks(model, processor, speeches, batch):
    """30 s windows. Teacher forcing: the full model's own transcript of them."""
    start = decoding.start_tokens(model, processor)
    tasks = []
    for group in decoding.batches(speeches, batch):
        features = decoding.features_of(processor, group)
        sequences = decoding.generate(model, features)
        transcripts = [decoding.transcript_tokens(model, sequence) for sequence in sequences]
        tasks.append(Task(group, features, {}, [(features, [start] * len(group), transcripts)]))
    return tasks


def long_task(model, processor, recordings, speeches, batch):
    """Recordings of over a minute, each chunk with the text so far as its prompt. Teacher forcing: the full model's
    transcript of each window behind those of the speaker's windows before it."""
    inputs = decoding.long_features_of(processor, recordings)
    features = inputs.pop("input_features")
    options = {"return_timestamps": True, "condition_on_prev_tokens": True, "temperature": 0.0, **inputs}

    config, start = model.generation_config, decoding.start_tokens(model, processor)
    most = model.config.max_target_positions // 2 - 1 - len(start)
    told, cases = {}, []
    for speech, transcript in transcribed(model, processor, speeches, batch):
        before = told.setdefault(speech.speaker, [])
        if before:
            cases.append((speech, [config.prev_sot_token_id, *before[-most:], *start], transcript))
        before += transcript[:-1]
    forced = [
        (decoding.features_of(processor, group), prompts, transcripts)
        for group, prompts, transcripts in (zip(*cases_of) for cases_of in decoding.batches(cases, batch))
    ]
    return Task(recordings, features, options, forced)


def transcribed(model, processor, speeches, batch):
    """(speech, tokens) of each window, by the full model."""
    for group in decoding.batches(speeches, batch):
        sequences = decoding.generate(model, decoding.features_of(processor, group))
        yield from zip(group, (decoding.transcript_tokens(model, sequence) for sequence in sequences))


def measured(model, processor, tasks, config):
    """One row, and the texts: decode the tasks, and force their transcripts, with this cache."""
    texts, speeches, total, count, tokens, bitten, sizes = [], [], 0.0, 0, 0, 0, [0, 0]
    whisperkv.patch(model, config)
    for task in tasks:
        sequences = decoding.generate(model, task.features, **task.options)
        texts += processor.batch_decode(sequences, skip_special_tokens=True)
        speeches += task.speeches
        tokens += sum(len(decoding.transcript_tokens(model, sequence)) for sequence in sequences)
        stats = whisperkv.stats(model)
        sizes = [
            max(sizes[0], stats.self_bytes / stats.rows),
            max(sizes[1], stats.self_bytes_transformers / stats.rows),
        ]
        for features, prompts, transcripts in task.forced:
            loss, length = decoding.negative_log_likelihood(model, features, prompts, transcripts)
            total, count = total + loss, count + length
            if config is not None:
                bitten += sum(len(p) + len(t) - 1 > config.budget for p, t in zip(prompts, transcripts))
    whisperkv.unpatch(model)
    return {
        "wer": audio.word_error_rate(speeches, texts),
        "nll": total / count,
        "loops": sum(map(decoding.loops, texts)),
        "windows": len(texts),
        "tokens": tokens,
        "bitten": bitten,
        "kib": sizes[0] / 1024,
        "kib_transformers": sizes[1] / 1024,
    }, texts


def main(args):
    tables.pin(args)
    most = 3 if args.quick else None
    speeches, recordings = audio.windows(args.data, most), audio.recordings(args.data, most and 2)
    configs = args.configs or (QUICK if args.quick else CONFIGS)
    long_configs = args.long_configs or (QUICK_LONG if args.quick else LONG_CONFIGS)
    for config in [*configs, *long_configs]:
        parsed(config)  # a mistake shows before an hour has gone
    jobs = [("eviction", configs), ("eviction-long", long_configs)]
    done = {name: tables.Table(name, COLUMNS, args) for name, _ in jobs if name in args.tables}
    progress = tqdm(total=len(args.models) * sum(len(names) for name, names in jobs if name in args.tables), unit="row")
    for model_name in args.models:
        model, processor = models.load(model_name, args.base)
        decoding.remember_encoder(model)
        for name, names in jobs:
            if name not in args.tables:
                continue
            if name == "eviction":
                tasks = window_tasks(model, processor, speeches, args.batch)
            else:
                tasks = [long_task(model, processor, recordings, speeches, args.batch)]
            full = None
            for config in names:
                progress.set_description(f"{model_name}: {config}")
                row, texts = measured(model, processor, tasks, parsed(config))
                full = texts if config == "full" else full
                same = full and sum(map(str.__eq__, texts, full))
                row |= {"texts": texts} if args.texts else {}
                done[name].add(model=model_name, config=config, same=same, **row)
                progress.update()
    progress.close()
    seconds = sum(speech.seconds for speech in speeches)
    words = sum(len(audio.normalized(speech.text).split()) for speech in speeches)
    print(f"\n{len(speeches)} windows, {seconds:.0f} s, {words} words. A window loops if {decoding.LOOP}.\n")
    for table in done.values():
        print(f"{table.path.stem}\n\n{table}\n")


def arguments():
    parser = tables.arguments(__doc__)
    parser.add_argument(
        "--tables", nargs="+", default=["eviction", "eviction-long"], choices=["eviction", "eviction-long"]
    )
    parser.add_argument("--configs", nargs="+", metavar="CONFIG", help="for the windows")
    parser.add_argument("--long-configs", nargs="+", metavar="CONFIG", help="for the recordings")
    parser.add_argument("--batch", type=int, default=12, help="windows decoded together (default: 12)")
    parser.add_argument("--texts", action="store_true", help="put the transcripts into the JSON lines as well")
    return parser


if __name__ == "__main__":
    main(arguments().parse_args())
