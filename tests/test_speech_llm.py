"""The speech LLM that pruners are measured on, small and at random, and the digits that it is trained on."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, WhisperConfig

pytest.importorskip("jiwer")
pytest.importorskip("tqdm")
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
AUDIO, LENGTHS = 3, (20, 31, 12)  # the placeholder, how many of them the rows have
SETTINGS = {"max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}


@pytest.fixture(scope="module", autouse=True)
def bench():
    """The folder from which the scripts import each other."""
    before = sys.path[:]
    sys.path.insert(0, str(BENCHMARKS))
    yield
    sys.path[:] = before


@pytest.fixture(scope="module")
def model():
    from whisper_llm import WhisperLLM, WhisperLLMConfig

    torch.manual_seed(0)
    audio_config = WhisperConfig(
        d_model=32, encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=64, num_mel_bins=8,
        max_source_positions=100,
    )  # fmt: skip
    text_config = LlamaConfig(
        vocab_size=40, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    config = WhisperLLMConfig(audio_config=audio_config, text_config=text_config, audio_token_id=AUDIO, stack=2)
    model = WhisperLLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None, suppress_tokens=[AUDIO])
    return model


def inputs(rows=range(3)):
    """Of those rows, the prompts padded on the left to the longest and the features on the right."""
    random = torch.Generator().manual_seed(1)
    features = torch.randn(3, 8, 4 * max(LENGTHS), generator=random)
    prompts = [torch.tensor([1, *[AUDIO] * length, *range(7, 10 + row)]) for row, length in enumerate(LENGTHS)]
    input_ids = torch.nn.utils.rnn.pad_sequence([prompts[row] for row in rows], True, 0, padding_side="left")
    columns = 4 * max(LENGTHS[row] for row in rows)
    return {
        "input_ids": input_ids,
        "attention_mask": (input_ids != 0).long(),
        "input_features": features[list(rows), :, :columns],
    }


@pytest.mark.parametrize("beams", [1, 3])
def test_left_padding(model, beams):
    """A row decodes as it does alone, and hears nothing beyond its placeholders."""
    together = model.generate(**inputs(), **SETTINGS, num_beams=beams)
    start = inputs()["input_ids"].shape[1]
    for row in range(3):
        given = inputs([row])
        alone = model.generate(**given, **SETTINGS, num_beams=beams)
        new = alone.sequences[0, given["input_ids"].shape[1] :]
        assert torch.equal(together.sequences[row, start:], new)
        if beams == 1:
            torch.testing.assert_close(together.scores[-1][row], alone.scores[-1][0], rtol=1e-4, atol=1e-4)
    assert len({tuple(row) for row in together.sequences[:, start:].tolist()}) == 3


def test_cache_is_what_a_pass_over_everything_says(model):
    given = inputs()
    tokens = model.generate(**given, **SETTINGS).sequences
    again = {**given, "input_ids": tokens, "attention_mask": torch.cat([given["attention_mask"], torch.ones(3, 8)], 1)}
    with torch.no_grad():
        logits = model(**again).logits[:, -9:-1]
    logits[..., AUDIO] = -torch.inf
    assert torch.equal(logits.argmax(-1), tokens[:, -8:])
    without = model.generate(**given, **SETTINGS, use_cache=False).sequences
    assert torch.equal(without, tokens)


def test_features_are_heard_once(model):
    heard = []
    hook = model.projector.register_forward_hook(lambda _, args, out: heard.append(len(args[0])))
    try:
        model.generate(**inputs([1]), **SETTINGS, num_beams=4)
    finally:
        hook.remove()
    assert heard == [1]  # the beams of one audio are heard together


def test_what_does_not_fit_is_refused(model):
    given = inputs()
    with pytest.raises(ValueError, match="124 columns; got 100"):
        model(**{**given, "input_features": given["input_features"][..., :100]})
    with pytest.raises(ValueError, match="2 rows, and input_ids 3"):
        model(**{**given, "input_features": given["input_features"][:2]})


def test_outputs(model):
    given = inputs()
    with torch.no_grad():
        out = model(**given, labels=given["input_ids"], logits_to_keep=0, output_hidden_states=True)
        assert out.logits.shape == (3, given["input_ids"].shape[1], 40) and out.loss > 0
        assert out.ctc_logits.shape == (sum(LENGTHS), 40)
        assert model(**given, logits_to_keep=1).logits.shape == (3, 1, 40)
        assert len(out.hidden_states) == 4
        audio = out.hidden_states[0][given["input_ids"] == AUDIO]  # a pruner finds the same from what the LLM is given
        torch.testing.assert_close(model.ctc_head(audio), out.ctc_logits)
        text = model(given["input_ids"][:, -2:])
    assert text.ctc_logits is None and text.logits.shape == (3, 2, 40)


def test_saved_and_loaded(model, tmp_path):
    from whisper_llm import WhisperLLM

    model.save_pretrained(tmp_path)
    again = WhisperLLM.from_pretrained(tmp_path).eval()
    assert again.config.stack == 2 and again.config.audio_token_id == AUDIO
    assert all(torch.equal(one, other) for one, other in zip(model.state_dict().values(), again.state_dict().values()))
    assert torch.equal(
        model.generate(**inputs(), **SETTINGS).sequences, again.generate(**inputs(), **SETTINGS).sequences
    )


def test_hiding(model):
    """Hidden tokens are as if they were not in the cache."""
    from speech_llm import hiding

    given = inputs([1])
    full = model.generate(**given, **SETTINGS)
    hidden = torch.zeros_like(given["input_ids"], dtype=torch.bool)
    with hiding(model, hidden):
        same = model.generate(**given, **SETTINGS)
    assert torch.equal(full.sequences, same.sequences)
    hidden[:, 1:30] = True
    with hiding(model, hidden):
        fewer = model.generate(**given, **SETTINGS)
    assert torch.equal(fewer.scores[0], full.scores[0]) and not torch.allclose(fewer.scores[1], full.scores[1])
    with torch.no_grad():
        cache = model(**given).past_key_values
        for layer in cache.layers:
            layer.keys, layer.values = (x[:, :, ~hidden[0]] for x in (layer.keys, layer.values))
        token, position = full.sequences[:, -8:-7], torch.tensor([[hidden.shape[1]]])
        logits = model(token, position_ids=position, past_key_values=cache).logits[:, -1]
    logits[:, AUDIO] = -torch.inf
    torch.testing.assert_close(logits, fewer.scores[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("by", ["random", "blank", "attention"])
def test_chosen(model, by):
    """A share of each row's audio tokens, and nothing else; more hides what fewer hid."""
    from speech_llm import chosen

    given, generator = inputs(), torch.Generator()
    model.language_model.set_attn_implementation("eager")
    try:
        model.generation_config.max_new_tokens = 3
        half, most = (chosen(model, given, share, by, generator.manual_seed(0)) for share in (0.5, 0.8))
    finally:
        model.language_model.set_attn_implementation("sdpa")
        model.generation_config.max_new_tokens = None
    assert half.sum(1).tolist() == [10, 16, 6] and most.sum(1).tolist() == [16, 25, 10]
    assert not (most & (given["input_ids"] != AUDIO)).any() and not (half & ~most).any()


# Digits


def test_sequences(recordings):
    pytest.importorskip("soxr")
    import digits
    from speech_llm import test_set

    for task in digits.TASKS.values():
        for given, text, spans in test_set(task.name, 3, 5, recordings):
            count = int((given["input_ids"] == digits.AUDIO).sum())
            assert given["input_features"].shape == (1, 80, count * task.stack * 2)
            assert task.digits[0] <= len(text.split()) == len(spans) <= task.digits[1]
            assert all(start < end for start, end in spans) and spans[-1][1] <= count
            assert all(before[0] < after[0] for before, after in zip(spans, spans[1:]))
        first, again = ([one.samples for one in digits.sequences(task, "test", 2, 3, recordings)] for _ in range(2))
        assert all((one == other).all() for one, other in zip(first, again))


def test_splits_have_no_recording_in_common(recordings):
    pytest.importorskip("soxr")
    import digits

    heard = {}
    for split, count in (("train", 2000), ("validation", 250), ("test", 250)):
        found = digits.recordings(split, recordings)
        heard[split] = {one.tobytes() for said in found.values() for several in said.values() for one in several}
        assert len(heard[split]) == count
    assert not set.intersection(*heard.values()) and not heard["train"] & (heard["validation"] | heard["test"])


def test_loss(model):
    """What is trained on may start at any frame, and the loss reaches all that is not frozen."""
    from speech_llm import batches, loss_of

    random = torch.Generator().manual_seed(0)
    pool = [(torch.randn(41 + n, 32, generator=random).half(), [n % 10, 3, 3]) for n in range(8)]
    text, ctc = loss_of(model, next(batches(pool, 4, random)), random)
    assert torch.isfinite(text) and text > 0 and ctc > 0
    (text + ctc).backward()
    assert all(weight.grad is not None for weight in model.parameters() if weight.requires_grad)
    model.zero_grad()
