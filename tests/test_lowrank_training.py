"""What a conversion lost, learned back; perplexity, samples and files."""

import copy
import json
import math

import pytest
import torch
from killing import losses_when_killed
from language_models import byte_tokenizer, language_model

from whisperkv import lowrank
from whisperkv.lowrank import MLATrainer, compute_perplexity, convert_to_mla, load_mla_model, save_mla_model


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def plain():
    """A model that has read one sentence until it knows it."""
    model = language_model("llama_grouped", initializer_range=0.08)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    rows = text(8)
    for _ in range(40):
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def text(rows, tokens=32):
    """Bytes of a sentence that goes round, from another place in each row."""
    line = b"the small latents of a token are read by every head. " * 3
    return torch.stack([torch.tensor(list(line[begin : begin + tokens])) for begin in range(0, 5 * rows, 5)])


def small(model, method="joint", ratio=8.0, **others):
    return convert_to_mla(
        copy.deepcopy(model), ratio, method, calibration=list(text(8)), verbose=False, store_original_weights=True,
        **{"cross_layer_group_size": 2, **({} if method == "xkv" else {}), **others} if method == "xkv" else others,
    )[0]  # fmt: skip


LOSSES = {
    "distillation": {},
    "reconstruction": {"use_distillation": False, "use_reconstruction_loss": True},
    "likelihood": {"use_distillation": False},
}


class TestTraining:
    @pytest.mark.parametrize("optimizer", ["adamw", "riemannian"])
    @pytest.mark.parametrize("loss", LOSSES)
    @pytest.mark.parametrize(("method", "others"), [("joint", {}), ("xkv", {}), ("xkv", {"xkv_share": "bases"})])
    def test_learns(self, plain, method, others, loss, optimizer):
        if optimizer == "riemannian":
            pytest.importorskip("geoopt")
        model = small(plain, method, **others)
        before = {name: each.clone() for name, each in model.state_dict().items()}
        learned = {name: each.requires_grad for name, each in model.named_parameters()}
        held_out = list(text(4)[:, 1:])
        first = compute_perplexity(model, None, held_out)
        trainer = MLATrainer(model, None, 3e-3, 3e-3, optimizer=optimizer, **LOSSES[loss])
        losses = trainer.train(list(text(8)), 9, 4, 32, progress=False)
        assert len(losses) == 18 and sum(losses[-4:]) < sum(losses[:4])
        assert compute_perplexity(model, None, held_out) < first
        for name, each in model.state_dict().items():
            changed = not torch.equal(each, before[name])
            assert changed == (".factors.down" in name or ".factors.up" in name), name
        for number in model.lowrank.layers:
            factors = model.model.layers[number].self_attn.factors
            for name in factors.ups():
                up = getattr(factors, name)
                assert type(up) is torch.nn.Parameter
                assert torch.allclose(up.T @ up, torch.eye(up.shape[1]), atol=1e-5)
        assert learned == {name: each.requires_grad for name, each in model.named_parameters()}
        if method == "xkv":
            layers = [model.model.layers[number].self_attn.factors for number in (0, 1)]
            assert all(getattr(layers[0], name) is getattr(layers[1], name) for name in layers[0].ups())

    def test_retraction_changes_nothing(self, plain):
        from whisperkv.lowrank.optimizers import Matrices

        model = small(plain, "xkv", xkv_share="bases")
        factors = [layer.self_attn.factors for layer in model.model.layers]
        with torch.no_grad():
            for each in Matrices(factors).orthonormal:
                each += 0.1 * torch.randn_like(each)
        tokens = text(2)
        before = model(input_ids=tokens).logits
        Matrices(factors).retract()
        assert torch.allclose(before, model(input_ids=tokens).logits, atol=1e-4)
        up = factors[2].up_keys
        assert torch.allclose(up.T @ up, torch.eye(up.shape[1]), atol=1e-5)

    def test_a_teacher(self, plain):
        model = convert_to_mla(copy.deepcopy(plain), 8, "joint", calibration=list(text(8)), verbose=False)[0]
        for loss in ("distillation", "reconstruction"):
            with pytest.raises(ValueError, match="store_original_weights=True, or pass teacher_model"):
                MLATrainer(model, None, **LOSSES[loss])
            taught = MLATrainer(model, None, teacher_model=plain, **LOSSES[loss]).loss(text(2))
            own = MLATrainer(small(plain), None, **LOSSES[loss]).loss(text(2))
            assert torch.allclose(taught, own, atol=1e-6)

    def test_refusals(self, plain):
        model = small(plain)
        for settings, error in (
            ({"use_reconstruction_loss": True}, "exclude each other"),
            ({"reconstruction_alpha": 2}, "reconstruction_alpha must be from 0 to 1; got 2"),
            ({"optimizer": "sgd"}, "optimizer must be one of adamw, riemannian; got 'sgd'"),
            ({"euclidean_lr": -1.0}, "euclidean_lr must be a number of at least 0"),
        ):
            with pytest.raises(ValueError, match=error):
                MLATrainer(model, None, **settings)
        with pytest.raises(ValueError, match="holds no latents"):
            MLATrainer(plain, None)
        with pytest.raises(ValueError, match="num_epochs must be a whole number"):
            MLATrainer(model, None).train(list(text(2)), 0)
        with pytest.raises(ValueError, match="dataset of texts needs a tokenizer"):
            MLATrainer(model, None).train(["a text"])


class TestResuming:
    @pytest.mark.parametrize(("optimizer", "method"), [("adamw", "xkv"), ("riemannian", "joint")])
    def test_killed_and_resumed(self, plain, tmp_path, optimizer, method):
        if optimizer == "riemannian":
            pytest.importorskip("geoopt")

        def run(checkpoint, epochs=20):
            model = small(plain, method)
            trainer = MLATrainer(model, None, 1e-3, 1e-3, optimizer=optimizer)
            settings = {"checkpoint": checkpoint, "checkpoint_every": 3, "progress": False}
            return model, trainer.train(list(text(8)), epochs, 4, 32, **settings)

        checkpoint = tmp_path / "checkpoint"
        assert 0 < len(losses_when_killed(checkpoint, run, checkpoint, 20)) < 40
        (resumed, losses), (whole, expected) = run(checkpoint), run(tmp_path / "other")
        assert losses == expected and len(losses) == 40
        ours, theirs = resumed.state_dict(), whole.state_dict()
        assert list(ours) == list(theirs) and all(torch.equal(ours[name], theirs[name]) for name in ours)

    def test_of_another_run(self, plain, tmp_path):
        checkpoint = tmp_path / "checkpoint"
        MLATrainer(small(plain), None).train(list(text(4)), 1, 4, 32, checkpoint=checkpoint, progress=False)
        with pytest.raises(ValueError, match="is of another run"):
            MLATrainer(small(plain), None, 2e-5).train(list(text(4)), 1, 4, 32, checkpoint=checkpoint)
        checkpoint.write_bytes(checkpoint.read_bytes()[:100])
        with pytest.raises(ValueError, match="cannot be read: delete it"):
            MLATrainer(small(plain), None).train(list(text(4)), 1, 4, 32, checkpoint=checkpoint)


class TestEvaluation:
    def test_a_text_helps(self, plain):
        """What was calibrated loses less than what knows the weights alone."""
        held_out = list(text(4)[:, 1:])
        blind = convert_to_mla(copy.deepcopy(plain), 4, "separate", use_calibration=False, verbose=False)[0]
        lost = [compute_perplexity(each, None, held_out) for each in (plain, small(plain, "separate", 4.0), blind)]
        assert lost[0] <= lost[1] and lost[1] - lost[0] < 0.5 * (lost[2] - lost[0])

    def test_perplexity(self, plain):
        rows = [row[:length] for row, length in zip(text(3), (32, 20, 9))]
        with torch.no_grad():
            said = [plain(input_ids=row[None]).logits[0, :-1].log_softmax(-1) for row in rows]
        lost = [-float(each.gather(-1, row[1:, None]).sum()) for each, row in zip(said, rows)]
        expected = math.exp(sum(lost) / (31 + 19 + 8))
        for stepwise in (False, True):
            assert compute_perplexity(plain, None, rows, batch_size=2, stepwise=stepwise) == pytest.approx(
                expected, rel=1e-4
            )
        shares = small(plain, "xkv")
        assert compute_perplexity(shares, None, rows) == compute_perplexity(shares, None, rows, stepwise=True)
        assert compute_perplexity(shares, None, rows, stepwise=False) == pytest.approx(expected, rel=1e-4)

    def test_samples(self, plain, tokenizer):
        samples = lowrank.generate_samples(plain, tokenizer, ["the small latents", "every"], 8)
        assert samples[0] == " of a to" and len(samples) == 2


class TestFiles:
    @pytest.mark.parametrize("method", ["separate", "joint", "xkv", "bases"])
    def test_round_trip(self, plain, tokenizer, tmp_path, method):
        share = {"xkv_share": "bases"} if method == "bases" else {}
        model = small(plain, "xkv" if method == "bases" else method, 2.0, cache_bits=3, **share)
        save_mla_model(model, tokenizer, tmp_path)
        loaded, same = load_mla_model(tmp_path)
        assert loaded.lowrank.to_dict() == model.lowrank.to_dict() and not loaded.training
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert list(ours) == list(theirs)
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)
        tokens = text(2)
        assert torch.equal(model(input_ids=tokens).logits, loaded(input_ids=tokens).logits)
        given = {"input_ids": tokens, "max_new_tokens": 12, "num_beams": 2}
        assert torch.equal(model.generate(**given), loaded.generate(**given))
        assert same("a token").input_ids == tokenizer("a token").input_ids
        if method in ("xkv", "bases"):
            layers = [loaded.model.layers[number].self_attn.factors for number in (0, 1)]
            assert all(getattr(layers[0], name) is getattr(layers[1], name) for name in layers[0].ups())
            from safetensors import safe_open

            with safe_open(tmp_path / "model.safetensors", "pt") as file:
                assert not any(name.startswith("model.layers.1.self_attn.factors.up") for name in file.keys())
        back = lowrank.restore(loaded)
        assert torch.equal(back(input_ids=tokens).logits, plain(input_ids=tokens).logits)

    def test_of_bfloat16(self, plain, tmp_path):
        model = small(plain, "joint", 2.0, cache_bits=8, dtype=torch.bfloat16)
        save_mla_model(model, None, tmp_path)
        loaded, tokenizer = load_mla_model(tmp_path)
        assert tokenizer is None and loaded.dtype == torch.bfloat16
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert {each.dtype for each in ours.values()} == {torch.bfloat16, torch.float32}
        assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in ours)

    def test_damage(self, plain, tmp_path):
        with pytest.raises(ValueError, match="holds no converted model"):
            load_mla_model(tmp_path)
        save_mla_model(small(plain), None, tmp_path)
        weights, record = tmp_path / "model.safetensors", tmp_path / "lowrank.json"
        whole, about = weights.read_bytes(), record.read_text()
        for length in (0, 5, 1000, len(whole) - 1):
            weights.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="truncated or damaged"):
                load_mla_model(tmp_path)
        weights.write_bytes(whole)
        record.write_text(about[:50])
        with pytest.raises(ValueError, match="truncated or damaged"):
            load_mla_model(tmp_path)
        record.write_text(json.dumps({**json.loads(about), "architecture": "opt"}))
        with pytest.raises(ValueError, match="for a model that is not known here"):
            load_mla_model(tmp_path)
        changed = json.loads(about)
        changed["layers"]["2"]["keys"] = changed["layers"]["2"]["values"] = 5
        record.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="does not fit"):
            load_mla_model(tmp_path)
        record.write_text(about)
        weights.unlink()
        with pytest.raises(ValueError, match="model.safetensors is missing"):
            load_mla_model(tmp_path)
        with pytest.raises(ValueError, match="holds no latents"):
            save_mla_model(plain, None, tmp_path / "other")
        assert not (tmp_path / "other").exists()
