"""How MLATrainer teaches a language model: its texts, and what its matrices are to learn from them."""

from contextlib import contextmanager

import torch
from torch.nn import functional

from . import installing, record, shared
from .architectures import architecture
from .calibration import inputs_of, token_rows
from .evaluating import ALL


class LanguageLessons:
    def __init__(self, model, tokenizer, aims, teacher):
        self.model, self.tokenizer, self.aims, self.teacher = model, tokenizer, aims, teacher
        self.record = record.record_of(model)
        if (aims.distills or aims.reconstructs) and teacher is None and not installing.knows_before(self.record):
            name = "use_distillation" if aims.distills else "use_reconstruction_loss"
            raise ValueError(
                f"{name} needs what the model was: convert with store_original_weights=True, or pass teacher_model"
            )
        self._kind = architecture(self.record.architecture)
        self._attentions = self._kind.attentions(model)
        self._shares = any(each.is_shared for each in self.record.layers.values())

    def rows(self, dataset, max_length):
        return token_rows(dataset, self.tokenizer, ALL, max_length, "dataset")

    def order(self, rows, generator):
        """Of an epoch."""
        return [rows[place] for place in torch.randperm(len(rows), generator=generator).tolist()]

    def about(self, rows):
        """What tells a training from others."""
        return self.record.to_dict(), [row.tolist() for row in rows]

    @contextmanager
    def factors(self):
        """What learns."""
        yield [self._attentions[number].factors for number in self.record.layers]

    def keep(self, factors):
        """They stand in the model."""

    def loss(self, rows):
        tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-100).to(self.model.device)
        given = tokens.clamp(min=0)
        labels = tokens[:, 1:]
        said = labels >= 0
        seen: dict[int, torch.Tensor] = {}
        collected = shared.Collected(learns=True)
        hooks = self._listen(seen) if self.aims.reconstructs else []
        try:
            logits = self._logits(given, collected)[:, :-1][said]
        finally:
            for hook in hooks:
                hook.remove()
        return self.aims.loss(
            logits, labels[said], lambda: self._before(given)[:, :-1][said],
            lambda: self._rebuilt(seen, collected, tokens >= 0),
        )  # fmt: skip

    def _logits(self, given, collected):
        """Of a text as generate() would read it: where layers share latents, by those of a pass before."""
        if not self._shares:
            return self.model(input_ids=given, use_cache=False).logits
        with torch.no_grad(), shared.beside(collected):
            self.model(input_ids=given, use_cache=False)
        with shared.beside(dict(collected)):
            return self.model(input_ids=given, use_cache=False).logits

    def _before(self, given):
        if self.teacher is not None:
            return self.teacher(input_ids=given.to(self.teacher.device), use_cache=False).logits.to(given.device)
        with installing.as_before(self.model, self.record):
            return self.model(input_ids=given, use_cache=False).logits

    def _listen(self, seen):
        def hook(number):
            def listen(module, args, kwargs):
                seen[number] = inputs_of(args, kwargs).detach()

            return listen

        return [
            self._attentions[number].register_forward_pre_hook(hook(number), with_kwargs=True)
            for number, each in self.record.layers.items()
            if not each.is_shared
        ]

    def _rebuilt(self, seen, collected, there):
        """Keys and values of each layer, and as they were."""
        projections = self._projections()
        for number, latents in self.record.layers.items():
            factors = self._attentions[number].factors
            if latents.is_shared:
                wanted = collected.made[number].split(factors.dim, -1)
                latent = collected[latents.group[0]]
            else:
                wanted = [functional.linear(seen[number], weight, bias) for weight, bias in projections[number]]
                latent = factors.compress(seen[number])
            for rebuilt, target in zip(factors.rebuild(latent), wanted):
                yield rebuilt[there], target[there]

    def _projections(self):
        """((weight, bias) of keys, the same of values) of each layer, as they were."""
        if self.teacher is not None:
            attentions = self._kind.attentions(self.teacher)
            found = {number: self._kind.projections(attentions[number]) for number in self.record.layers}
        else:
            with installing.as_before(self.model, self.record):
                found = {number: self._kind.projections(self._attentions[number]) for number in self.record.layers}
        return {
            number: [(weight.detach(), None if bias is None else bias.detach()) for weight, bias in both]
            for number, both in found.items()
        }
