"""What a model's layers are given, on a text: the ground on which they are made small."""

from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

SAMPLED = 512  # inputs of a layer that are kept as they are


@dataclass
class Seen:
    """Of one layer, over the tokens of a text. Moments are those about zero, in float64.

    mean      [inputs] and second [inputs, inputs]: of the inputs of the factors
    queries   [heads, head_dim, head_dim]: the second moment of queries before rotation
    samples   [SAMPLED, inputs]
    """

    mean: torch.Tensor
    second: torch.Tensor
    queries: torch.Tensor
    samples: torch.Tensor

    @property
    def covariance(self):
        return self.second - torch.outer(self.mean, self.mean)


def texts_of(given):
    """The texts of a list, of a file or of a `datasets` object; what ships with the package for None."""
    if given is None:
        return paragraphs(resources.files(__package__).joinpath("data/calibration.txt").read_text())
    if isinstance(given, (str, Path)):
        path = Path(given)
        if not (len(str(given)) < 4096 and path.is_file()):
            raise ValueError(f"calibration must be a list of texts, a datasets object or a file; no file {given!s:.80}")
        return paragraphs(path.read_text())
    columns = getattr(given, "column_names", None)
    if isinstance(columns, list):  # a Dataset of the library datasets
        name = next((each for each in ("text", "content", "document", "sentence") if each in columns), None)
        if name is None:
            raise ValueError(f"the data set must have a column 'text' or 'content'; it has {', '.join(columns)}")
        return [each for each in given[name] if each.strip()]
    return list(given)


def paragraphs(text):
    return [each.strip() for each in text.split("\n\n") if each.strip()]


def token_rows(given, tokenizer, count, length, name="calibration"):
    """At most `count` rows of at most `length` tokens, int64 each; texts are put one behind another to fill rows.
    What is tokens already, lists or tensors of numbers, stays as it is."""
    texts, rows = texts_of(given), []
    if texts and not isinstance(texts[0], str):
        rows = [torch.as_tensor(each, dtype=torch.int64).flatten()[:length] for each in texts[:count]]
        rows = [row for row in rows if row.numel() > 1]
    elif texts:
        if tokenizer is None:
            raise ValueError(f"{name} of texts needs a tokenizer: pass tokenizer=, or lists of token ids as {name}")
        stop = getattr(tokenizer, "eos_token_id", None)
        stream = []
        for text in texts:
            stream += tokenizer(text, add_special_tokens=False)["input_ids"] + ([] if stop is None else [stop])
            if len(stream) >= count * length:
                break
        pieces = [stream[begin : begin + length] for begin in range(0, len(stream), length)][:count]
        rows = [torch.tensor(piece) for piece in pieces if len(piece) > 1]
    if not rows:
        raise ValueError(f"{name} holds no text: give a list of texts, a file or a datasets object that is not empty")
    return rows


def inputs_of(args, kwargs):
    return args[0] if args else kwargs["hidden_states"]


@torch.no_grad()
def collect(model, architecture, rows, groups):
    """What each layer of the groups is given when the model reads rows of tokens: {layer: Seen}.

    groups   {layer: layers whose keys and values make up its latents together, or None where its own inputs do}
    """
    kind, layers = architecture.attention, architecture.attentions(model)
    sums, samples, kept = {}, {}, {}
    total = sum(len(row) for row in rows)
    stride = max(1, total // SAMPLED)

    def add(number, inputs, queries):
        inputs = inputs.reshape(-1, inputs.shape[-1])
        samples.setdefault(number, []).append(inputs[::stride].float())
        inputs, queries = inputs.double(), queries.double().transpose(0, 1).flatten(1, 2)
        moments = inputs.sum(0), inputs.T @ inputs, queries.transpose(1, 2) @ queries
        held = sums.get(number)
        sums[number] = moments if held is None else tuple(a + b for a, b in zip(held, moments))

    def before(number):
        def hook(module, args, kwargs):
            inputs = inputs_of(args, kwargs)
            queries = kind.queries(module, inputs)
            if groups[number] is not None:
                kept[number] = torch.cat(kind.keys_values(module, inputs), -1), queries
                if number != groups[number][-1]:
                    return
                whole = torch.cat([kept[each][0] for each in groups[number]], -1)
                add(groups[number][0], whole, kept[groups[number][0]][1])
                for each in groups[number][1:]:
                    add_queries(each, kept[each][1])
            else:
                add(number, inputs, queries)

        return hook

    def add_queries(number, queries):
        queries = queries.double().transpose(0, 1).flatten(1, 2)
        moment = queries.transpose(1, 2) @ queries
        held = sums.get(number)
        sums[number] = (None, None, moment if held is None else held[2] + moment)

    hooks = [layers[number].register_forward_pre_hook(before(number), with_kwargs=True) for number in groups]
    was_training = model.training
    model.eval()
    try:
        device = model.get_input_embeddings().weight.device
        for row in rows:
            model(input_ids=row[None].to(device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(was_training)
    seen = {}
    for number, (first, second, queries) in sums.items():
        if first is None:
            seen[number] = Seen(None, None, queries / total, None)
        else:
            rows_kept = torch.cat(samples[number])[:SAMPLED]
            seen[number] = Seen(first / total, second / total, queries / total, rows_kept)
    for number, moments in seen.items():
        if not all(bool(each.isfinite().all()) for each in (moments.mean, moments.queries) if each is not None):
            raise ValueError(
                f"layer {number} makes numbers that are not finite of the calibration text: load the model in bfloat16 "
                "or float32"
            )
    return seen
