"""Trains and evaluates small speech LLMs on connected digits: python benchmarks/speech_llm.py train --task digits

Nothing is downloaded: the encoder is tiny.en's and stays frozen, the digits are those of ../shared/data/fsdd. A model
trained by steps is the same for the same seed (on one machine, with one number of threads); one trained by --seconds
is not. It goes to ~/.cache/whisperkv/speech-llm/<task>, where load() finds it.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import audio
import digits
import torch
from digits import END, PAD, TASKS, VOCABULARY, ZERO, inputs_of, prompt, sequences, text_of
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig
from whisper_llm import WhisperLLM, WhisperLLMConfig

import whisperkv
from whisperkv import compat

CACHE = Path.home() / ".cache" / "whisperkv" / "speech-llm"
ABOUT = "training.json"  # beside a model: how it was trained, and what it reached
TEST = {"count": 200, "seed": 0}
LEARNING_RATE, WARMUP, CTC_WEIGHT = 1e-3, 100, 0.3  # WARMUP: steps


def load(task, train_if_missing=True, data=audio.DATA):
    """The trained model of a task, from the cache folder."""
    folder = CACHE / task
    if not (folder / ABOUT).is_file():
        if not train_if_missing:
            raise FileNotFoundError(f"{folder}: no model; python benchmarks/speech_llm.py train --task {task}")
        train(task, folder, data=data)
    return WhisperLLM.from_pretrained(folder).eval()


def test_set(task, count=TEST["count"], seed=TEST["seed"], data=audio.DATA):
    """Yields (inputs of generate(), the text, [(first audio token, the one after the last)] of each digit), one
    sequence at a time, of recordings that no model was trained on."""
    for one in sequences(TASKS[task], "test", count, seed, data):
        yield inputs_of(TASKS[task], [one]), one.text, one.spans


test_set.__test__ = False  # pytest


# ---- Training ----


def untrained(task, encoder):
    """A WhisperLLM of some 3 million weights over the encoder of a Whisper."""
    text_config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, pad_token_id=PAD, bos_token_id=digits.START,
        eos_token_id=END,
    )  # fmt: skip
    config = WhisperLLMConfig(
        audio_config=encoder.config, text_config=text_config, audio_token_id=digits.AUDIO, stack=task.stack
    )
    model = WhisperLLM(config)
    model.audio_encoder.load_state_dict(encoder.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=digits.START, eos_token_id=END, pad_token_id=PAD, suppress_tokens=[digits.AUDIO], max_new_tokens=12
    )
    return model


def heard(model, task, seed, data):
    """[(states of the encoder, float16 [frames, channels], digits)], what is trained on"""
    pool = []
    made = sequences(task, "train", task.pool, seed, data)
    for one in tqdm(made, "encoding", task.pool, file=sys.stderr, mininterval=5):
        states = model.encode(inputs_of(task, [one])["input_features"])
        pool.append((states[0].half(), one.digits))
    return pool


def batches(pool, size, random):
    """Without end: sequences of about one length."""
    while True:
        order = torch.randperm(len(pool), generator=random).tolist()
        for start in range(0, len(order), 16 * size):
            near = sorted(order[start : start + 16 * size], key=lambda index: len(pool[index][0]))
            groups = [near[first : first + size] for first in range(0, len(near), size)]
            for group in torch.randperm(len(groups), generator=random).tolist():
                yield [pool[index] for index in groups[group]]


def loss_of(model, group, random):
    """Of the text, and of CTC over the audio tokens: without it no attention to the audio would form in minutes."""
    stack, states, rows, labels = model.config.stack, [], [], []
    for heard, spoken in group:
        first = torch.randint(stack, (), generator=random)  # the frames of a token are others each time
        heard = heard[first : first + (len(heard) - first) // stack * stack]
        states.append(heard.float())
        rows.append(prompt(len(heard) // stack))
        labels.append([ZERO + digit for digit in spoken])
    lengths = torch.tensor([len(heard) // stack for heard in states])
    tokens = model.project(torch.cat(states))
    said = [torch.tensor([*[-100] * len(row), *label, END]) for row, label in zip(rows, labels)]
    given = [torch.tensor([*row, *label, END]) for row, label in zip(rows, labels)]
    input_ids = torch.nn.utils.rnn.pad_sequence(given, True, PAD)
    text = model(
        inputs_embeds=model.embed(input_ids, tokens),  # padded on the right: the causal mask is enough
        labels=torch.nn.utils.rnn.pad_sequence(said, True, -100),
        use_cache=False,
    ).loss
    scores = model.ctc_head(tokens).log_softmax(-1).split(lengths.tolist())
    ctc = torch.nn.functional.ctc_loss(
        torch.nn.utils.rnn.pad_sequence(scores),
        torch.tensor([token for label in labels for token in label]),
        lengths,
        torch.tensor(list(map(len, labels))),
        blank=PAD,
        zero_infinity=True,
    )
    return text, ctc


def train(name, folder, steps=None, seconds=None, seed=0, data=audio.DATA, pool=None):
    """Saves the model, how it was trained, and what it reached on sequences of recordings set aside."""
    task = TASKS[name]
    steps = steps or (None if seconds else task.steps)
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = untrained(task, whisperkv.demo_model()[0].model.encoder)
    pool = pool or heard(model, task, seed, data)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    start, step, done, losses = time.perf_counter(), 0, 0.0, [1.0, 1.0]
    progress = tqdm(total=1.0, desc=name, file=sys.stderr, mininterval=5, bar_format="{l_bar}{bar}| {elapsed}{postfix}")
    for group in batches(pool, task.batch, random):
        for part in optimizer.param_groups:
            part["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * (1 + math.cos(math.pi * done)) / 2
        text, ctc = loss_of(model, group, random)
        optimizer.zero_grad()
        (text + CTC_WEIGHT * ctc).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        losses = [0.95 * old + 0.05 * float(new) for old, new in zip(losses, (text, ctc))]
        step += 1
        before, done = done, step / steps if steps else (time.perf_counter() - start) / seconds
        progress.set_postfix_str(f"step {step}, text {losses[0]:.3f}, ctc {losses[1]:.3f}", refresh=False)
        progress.update(min(done, 1.0) - before)
        if done >= 1:
            break
    progress.close()
    model.eval()
    reached = judged(model, list(sequences(task, "validation", 100, seed, data)), task)
    about = {"task": name, "steps": step, "seed": seed, "seconds": round(time.perf_counter() - start), **reached}
    model.save_pretrained(folder)
    (Path(folder) / ABOUT).write_text(json.dumps(about))


# ---- Evaluation ----


@contextlib.contextmanager
def hiding(model, hidden):
    """hidden, bool [rows, tokens of the prompt]: what no token may attend to after the prompt's own pass."""

    def hide(_, args, kwargs):
        if kwargs["inputs_embeds"].shape[1] == 1:
            mask = kwargs["attention_mask"]
            if mask is None:  # nothing is padding
                mask = hidden.new_ones(len(hidden), kwargs[compat.CACHE].get_seq_length() + 1, dtype=torch.long)
            shown = torch.nn.functional.pad(~hidden, (0, mask.shape[1] - hidden.shape[1]), value=True)
            return args, {**kwargs, "attention_mask": mask * shown}

    hook = model.language_model.register_forward_pre_hook(hide, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def chosen(model, inputs, share, by, random):
    """Which tokens to hide: that share of each row's audio tokens, those of the lowest rank first."""
    is_audio = inputs["input_ids"] == model.config.audio_token_id
    order = RANKS[by](model, inputs, is_audio, random).masked_fill(~is_audio, torch.inf).argsort(1).argsort(1)
    return order < (share * is_audio.sum(1, keepdim=True)).round()


def at_random(model, inputs, is_audio, random):
    return torch.rand(is_audio.shape, generator=random)


@torch.no_grad()
def not_blank(model, inputs, is_audio, random):
    """What is surest to be blank to CTC ranks lowest."""
    blank = model(**inputs).ctc_logits.softmax(-1)[:, PAD]
    return torch.zeros(is_audio.shape).masked_scatter(is_audio, -blank)


@torch.no_grad()
def attended(model, inputs, is_audio, random):
    """By the attention that the text will pay, over all layers and heads: what no pruner can know beforehand."""
    tokens, length = model.generate(**inputs), is_audio.shape[1]
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, tokens.shape[1] - length), value=1)
    weights = model(tokens, inputs["input_features"], mask, output_attentions=True).attentions
    is_text = (tokens[:, length:] != PAD).float()
    return sum(torch.einsum("rhqk,rq->rk", one[:, :, length:, :length], is_text) for one in weights)


RANKS = {"random": at_random, "blank": not_blank, "attention": attended}


def judged(model, spoken, task, share=0.0, by="random", batch=8, **settings):
    """{exact: the share of texts that are right, digit_errors: of all digits} of a greedy decode"""
    import jiwer

    texts, random = [], torch.Generator().manual_seed(0)
    for first in tqdm(range(0, len(spoken), batch), f"hidden {share:.0%}", file=sys.stderr, mininterval=5, leave=False):
        inputs = inputs_of(task, spoken[first : first + batch])
        with hiding(model, chosen(model, inputs, share, by, random)) if share else contextlib.nullcontext():
            tokens = model.generate(**inputs, **settings)
        texts += [text_of(row) for row in tokens[:, inputs["input_ids"].shape[1] :].tolist()]
    wanted = [one.text for one in spoken]
    exact = sum(map(str.__eq__, texts, wanted)) / len(wanted)
    return {"exact": exact, "digit_errors": round(jiwer.wer(wanted, texts), 4)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=audio.DATA, metavar="FOLDER", help="that holds fsdd/ (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default: 1)")
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="save a model")
    training.add_argument("--task", choices=TASKS, required=True)
    training.add_argument("--out", type=Path, metavar="DIR", help=f"default: {CACHE}/<task>")
    training.add_argument("--steps", type=int, help=f"{ {name: task.steps for name, task in TASKS.items()} }")
    training.add_argument("--seconds", type=float, help="so long instead, whatever the steps")
    training.add_argument("--seed", type=int, default=0)
    evaluating = commands.add_parser("evaluate", help="exact match and digit error rate on held-out recordings")
    evaluating.add_argument("--model", type=Path, required=True, metavar="DIR")
    evaluating.add_argument("--count", type=int, default=TEST["count"], help="sequences (default: %(default)s)")
    evaluating.add_argument("--hide", type=float, nargs="*", default=[], help="shares of audio tokens")
    evaluating.add_argument("--by", nargs="*", default=RANKS, choices=RANKS, help="which (default: each in turn)")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.command == "train":
        out = args.out or CACHE / args.task
        train(args.task, out, args.steps, args.seconds, args.seed, args.data)
        print((out / ABOUT).read_text())
        return
    model = WhisperLLM.from_pretrained(args.model).eval()
    task = TASKS[json.loads((args.model / ABOUT).read_text())["task"]]
    model.language_model.set_attn_implementation("eager")  # which returns attentions
    spoken = list(sequences(task, "test", args.count, TEST["seed"], args.data))
    print(json.dumps({"hidden": 0, **judged(model, spoken, task)}), flush=True)
    for share in args.hide:
        for by in args.by:
            print(json.dumps({"hidden": share, "by": by, **judged(model, spoken, task, share, by)}), flush=True)


if __name__ == "__main__":
    main()
