"""MLATrainer: what a conversion lost, learned back by its own matrices alone."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from . import optimizers
from .language_lessons import LanguageLessons
from .losses import Aims
from .whisper_converting import WhisperLowRank
from .whisper_lessons import WhisperLessons


class MLATrainer:
    """Trains the compression matrices of a converted model. All other weights stay as they are, and the matrices that
    rebuild keys and values stay orthonormal.

    tokenizer                 that of the model; a Whisper needs none
    euclidean_lr              of the matrices that make latents
    riemannian_lr             of the orthonormal ones, that rebuild. All of a Whisper's are free, and those that rebuild
                              are made orthonormal at the end
    use_distillation          learn to say what the model said before: of teacher_model, or of the model itself if it
                              was converted with store_original_weights=True. A Whisper always knows what it was
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
        aims = Aims(use_distillation, use_reconstruction_loss, reconstruction_alpha)
        if isinstance(getattr(model, "lowrank", None), WhisperLowRank):
            if optimizer != "adamw":
                raise ValueError(
                    f"optimizer must be 'adamw' for a Whisper, no matrix of which is bound; got {optimizer!r}"
                )
            self._lessons: Any = WhisperLessons(model, aims, teacher_model)
        else:
            self._lessons = LanguageLessons(model, tokenizer, aims, teacher_model)
        if model.dtype == torch.float16:
            raise ValueError("training in float16 loses small steps: convert with dtype=torch.float32 or bfloat16")
        self.model, self.aims = model, aims
        self.rates, self.optimizer = (euclidean_lr, riemannian_lr), optimizer

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

        dataset      texts, lists of token ids, a `datasets` object or a file; of a Whisper recordings, samples at 16
                     kHz or files' names, which are joined to windows of 30 seconds, to others in every epoch
        seed         of the order of the rows
        checkpoint   a file that is written every checkpoint_every steps. If it is there, training goes on from it, and
                     ends with the very bits of a run that was not interrupted
        """
        for name, value in (("num_epochs", num_epochs), ("batch_size", batch_size), ("max_length", max_length),
                            ("checkpoint_every", checkpoint_every)):  # fmt: skip
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1; got {value!r}")
        rows = self._lessons.rows(dataset, max_length)
        batches = [batch for epoch in range(num_epochs) for batch in self._epoch(rows, batch_size, seed + 7919 * epoch)]
        file = None if checkpoint is None else Path(checkpoint)
        about = self._about(rows, num_epochs, batch_size, seed)
        losses: list[float] = []
        learned = {name: each.requires_grad for name, each in self.model.named_parameters()}
        was_training = self.model.training
        self.model.requires_grad_(False).eval()  # dropout would only blur what is learned from
        try:
            with self._lessons.factors() as factors:
                matrices = optimizers.Matrices(factors)
                optimizer = optimizers.optimizer(self.optimizer, matrices, *self.rates)
                for matrix in matrices.all:
                    matrix.requires_grad_(True)
                try:
                    if file is not None and file.exists():
                        losses = _resume(file, about, matrices, optimizer)
                    self._steps(batches, matrices, optimizer, losses, (file, checkpoint_every, about), progress)
                finally:
                    optimizer.finish()
                    self._lessons.keep(factors)
        finally:
            for name, each in self.model.named_parameters():
                each.requires_grad_(learned[name])
            self.model.train(was_training)
        return losses

    def _epoch(self, rows, batch_size, seed):
        order = self._lessons.order(rows, torch.Generator().manual_seed(seed))
        return [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]

    def _steps(self, batches, matrices, optimizer, losses, saving, progress):
        from tqdm import tqdm

        file, every, about = saving
        with tqdm(total=len(batches), initial=len(losses), disable=not progress, unit="step") as bar:
            for number in range(len(losses), len(batches)):
                loss = self._lessons.loss(batches[number])
                loss.backward()
                torch.nn.utils.clip_grad_norm_(matrices.all, 1.0)
                optimizer.step()
                losses.append(float(loss.detach()))
                bar.update()
                bar.set_postfix(loss=f"{losses[-1]:.4f}")
                if file is not None and ((number + 1) % every == 0 or number + 1 == len(batches)):
                    _save(file, about, matrices, optimizer, losses)

    def loss(self, rows: Iterable[Any]) -> torch.Tensor:
        """The loss of some rows of tokens; of a Whisper, of some windows."""
        with self._lessons.factors():
            return self._lessons.loss(rows)

    def _about(self, rows, num_epochs, batch_size, seed):
        """What a checkpoint must have been made with."""
        digest = hashlib.sha256(repr(self._lessons.about(rows)).encode()).hexdigest()
        aims = self.aims.distills, self.aims.reconstructs, self.aims.alpha
        return repr([digest, self.optimizer, *self.rates, *aims, num_epochs, batch_size, seed])


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
