"""MLATrainer: what a conversion lost, learned back by its own matrices alone."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from . import installing, optimizers, record, shared
from .architectures import architecture
from .calibration import inputs_of, token_rows
from .evaluating import ALL


class MLATrainer:
    """Trains the compression matrices of a converted model. All other weights stay as they are, and the matrices that
    rebuild keys and values stay orthonormal.

    euclidean_lr              of the matrices that make latents
    riemannian_lr             of the orthonormal ones, that rebuild
    use_distillation          learn to say what the model said before: of teacher_model, or of the model itself if it
                              was converted with store_original_weights=True
    use_reconstruction_loss   in its place: the likelihood of the text, and keys and values as they were, in the
                              proportion of 1 - reconstruction_alpha to reconstruction_alpha. With neither, the
                              likelihood alone
    optimizer                 "adamw", with a QR decomposition from time to time, or "riemannian" (geoopt)
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        euclidean_lr: float = 1e-5,
        riemannian_lr: float = 1e-4,
        use_distillation: bool = True,
        use_reconstruction_loss: bool = False,
        reconstruction_alpha: float = 0.3,
        teacher_model: Any = None,
        *,
        optimizer: str = "adamw",
    ) -> None:
        if use_distillation and use_reconstruction_loss:
            raise ValueError(
                "use_distillation=True and use_reconstruction_loss=True exclude each other: set use_distillation=False"
            )
        if not 0 <= reconstruction_alpha <= 1:
            raise ValueError(f"reconstruction_alpha must be from 0 to 1; got {reconstruction_alpha!r}")
        for name, rate in (("euclidean_lr", euclidean_lr), ("riemannian_lr", riemannian_lr)):
            if isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate >= 0:
                raise ValueError(f"{name} must be a number of at least 0; got {rate!r}")
        if optimizer not in optimizers.NAMES:
            raise ValueError(f"optimizer must be one of {', '.join(optimizers.NAMES)}; got {optimizer!r}")
        self.record = record.record_of(model)
        if (use_distillation or use_reconstruction_loss) and teacher_model is None:
            if not installing.knows_before(self.record):
                name = "use_distillation" if use_distillation else "use_reconstruction_loss"
                raise ValueError(
                    f"{name} needs what the model was: convert with store_original_weights=True, or pass teacher_model"
                )
        if model.dtype == torch.float16:
            raise ValueError("training in float16 loses small steps: convert with dtype=torch.float32 or bfloat16")
        self.model, self.tokenizer, self.teacher = model, tokenizer, teacher_model
        self.rates = euclidean_lr, riemannian_lr
        self.distills, self.reconstructs, self.alpha = use_distillation, use_reconstruction_loss, reconstruction_alpha
        self.optimizer = optimizer
        self._kind = architecture(self.record.architecture)
        self._attentions = self._kind.attentions(model)
        self._shares = any(each.is_shared for each in self.record.layers.values())

    def train(
        self,
        dataset: Any,
        num_epochs: int = 3,
        batch_size: int = 4,
        max_length: int = 512,
        *,
        seed: int = 0,
        checkpoint: Any = None,
        checkpoint_every: int = 100,
        progress: bool = True,
    ) -> list[float]:
        """Train, and return the loss of every step.

        dataset      texts, lists of token ids, a `datasets` object or a file
        seed         of the order of the rows
        checkpoint   a file that is written every checkpoint_every steps. If it is there, training goes on from it, and
                     ends with the very bits of a run that was not interrupted
        """
        for name, value in (("num_epochs", num_epochs), ("batch_size", batch_size), ("max_length", max_length),
                            ("checkpoint_every", checkpoint_every)):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        rows = token_rows(dataset, self.tokenizer, ALL, max_length, "dataset")
        batches = [batch for epoch in range(num_epochs) for batch in _order(len(rows), batch_size, seed + 7919 * epoch)]
        factors = [self._attentions[number].factors for number in self.record.layers]
        learned = {name: each.requires_grad for name, each in self.model.named_parameters()}
        was_training = self.model.training
        self.model.requires_grad_(False).eval()  # dropout would only blur what is learned from
        matrices = optimizers.Matrices(factors)
        optimizer = optimizers.optimizer(self.optimizer, matrices, *self.rates)
        for matrix in matrices.all:
            matrix.requires_grad_(True)
        losses: list[float] = []
        file = None if checkpoint is None else Path(checkpoint)
        about = self._about(rows, num_epochs, batch_size, seed)
        try:
            if file is not None and file.exists():
                losses = _resume(file, about, matrices, optimizer)
            self._steps(rows, batches, matrices, optimizer, losses, (file, checkpoint_every, about), progress)
        finally:
            optimizer.finish()
            for name, each in self.model.named_parameters():
                each.requires_grad_(learned[name])
            self.model.train(was_training)
        return losses

    def _steps(self, rows, batches, matrices, optimizer, losses, saving, progress):
        from tqdm import tqdm

        file, every, about = saving
        with tqdm(total=len(batches), initial=len(losses), disable=not progress, unit="step") as bar:
            for number in range(len(losses), len(batches)):
                loss = self.loss([rows[place] for place in batches[number]])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(matrices.all, 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
                if file is not None and (number + 1) % every == 0 or file is not None and number + 1 == len(batches):
                    _save(file, about, matrices, optimizer, losses)

    def loss(self, rows: Iterable[torch.Tensor]) -> torch.Tensor:
        """The loss of some rows of tokens."""
        tokens = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=-100).to(self.model.device)
        given = tokens.clamp(min=0)
        labels = tokens[:, 1:]
        said = labels >= 0
        seen: dict[int, torch.Tensor] = {}
        collected = shared.Collected(learns=True)
        hooks = self._listen(seen) if self.reconstructs else []
        try:
            logits = self._logits(given, collected)[:, :-1][said]
        finally:
            for hook in hooks:
                hook.remove()
        if self.distills:
            with torch.no_grad():
                teacher = self._before(given)[:, :-1][said].float().log_softmax(-1)
            return functional.kl_div(logits.float().log_softmax(-1), teacher, reduction="batchmean", log_target=True)
        likelihood = functional.cross_entropy(logits.float(), labels[said])
        if not self.reconstructs:
            return likelihood
        missing = self._missing(seen, collected, tokens >= 0)
        return (1 - self.alpha) * likelihood + self.alpha * missing

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

    def _missing(self, seen, collected, there):
        """The share of the variance of keys and values that is not rebuilt, the mean over layers."""
        projections = self._projections()
        shares = []
        for number, latents in self.record.layers.items():
            factors = self._attentions[number].factors
            if latents.is_shared:
                wanted = collected.made[number].split(factors.dim, -1)
                latent = collected[latents.group[0]]
            else:
                wanted = [functional.linear(seen[number], weight, bias) for weight, bias in projections[number]]
                latent = factors.compress(seen[number])
            for rebuilt, target in zip(factors.rebuild(latent), wanted):
                rebuilt, target = rebuilt[there].float(), target[there].float()
                shares.append((rebuilt - target).square().sum() / (target - target.mean(0)).square().sum())
        return sum(shares) / len(shares)

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

    def _about(self, rows, num_epochs, batch_size, seed):
        """What a checkpoint must have been made with."""
        digest = hashlib.sha256(repr((self.record.to_dict(), [row.tolist() for row in rows])).encode()).hexdigest()
        settings = [self.optimizer, *self.rates, self.distills, self.reconstructs, self.alpha]
        return repr([digest, *settings, num_epochs, batch_size, seed])


def _order(count, batch_size, seed):
    """The rows of each batch of an epoch."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return [order[begin : begin + batch_size] for begin in range(0, count, batch_size)]


def _save(file, about, matrices, optimizer, losses):
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = {
        "about": about,
        "losses": losses,
        "matrices": [matrix.detach().clone().as_subclass(torch.Tensor) for matrix in matrices.all],
        "optimizer": optimizer.state_dict(),
    }
    unfinished = file.with_name(file.name + ".part")
    torch.save(whole, unfinished)
    os.replace(unfinished, file)


def _resume(file, about, matrices, optimizer):
    try:
        whole = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"checkpoint {file} cannot be read: delete it to begin anew") from error
    if whole.get("about") != about:
        raise ValueError(f"checkpoint {file} is of another run (model, data or settings): name another, or delete it")
    with torch.no_grad():
        for matrix, saved in zip(matrices.all, whole["matrices"]):
            matrix.copy_(saved)
    optimizer.load_state_dict(whole["optimizer"])
    return whole["losses"]
