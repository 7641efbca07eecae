"""python -m whisperkv.prune, on a tiny Qwen2-Audio with a processor of its own."""

import json

import numpy as np
import pytest
import transformers
from speech_models import make

from whisperkv.prune.__main__ import main

soundfile = pytest.importorskip("soundfile")
pytest.importorskip("soxr")

TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}{% if part['type'] == 'audio' %}"
    "<|audio_bos|><|AUDIO|><|audio_eos|>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} answer"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("qwen2-audio")
    model, _ = make("qwen2_audio")
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    special = {"<|AUDIO|>": 7, "<|audio_bos|>": 9, "<|audio_eos|>": 13, "<pad>": 0, "<s>": 1, "</s>": 2}
    words = {f"w{number}": number for number in range(200)}
    for name, number in special.items():
        del words[f"w{number}"]
        words[name] = number
    words |= {word: 20 + at for at, word in enumerate(("answer", "Transcribe", "the", "audio.", "what?"))}
    words = {
        word: number
        for word, number in words.items()
        if not word.startswith("w") or not 20 <= number < 25 or word == "what?"
    }
    plain = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, pad_token="<pad>", eos_token="</s>")
    extractor = transformers.WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    transformers.Qwen2AudioProcessor(extractor, tokenizer, chat_template=TEMPLATE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder, files = tmp_path_factory.mktemp("audio"), []
    for number, seconds in enumerate((1.5, 2.0)):
        noise = np.random.default_rng(number).normal(size=int(seconds * 16000)) * 0.1
        files.append(str(folder / f"{number}.wav"))
        soundfile.write(files[-1], noise, 16000)
    return files


def run(capsys, *arguments):
    done = main([str(each) for each in arguments])
    return done, *capsys.readouterr()


def test_answers(folder, recordings, tmp_path, capsys):
    given = ("--model", folder, "--audio", *recordings, "--max-new-tokens", 8, "--device", "cpu", "--threads", 1)
    outs = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for out in outs:
        done, printed, told = run(capsys, *given, "--pruner", "random", "--seed", 3, "--budget", 0.5, "--out", out)
        assert done == 0 and len(printed.splitlines()) == 2
        assert "audio tokens kept a head" in told and "s of audio in" in told
    assert outs[0].read_bytes() == outs[1].read_bytes()
    first, second = map(json.loads, outs[0].read_text().splitlines())
    assert (first["file"], first["pruner"], first["seed"]) == (recordings[0], "Random(seed=3)", 3)
    assert first["text"] == printed.splitlines()[0] and first["audio_seconds"] == 1.5
    assert first["kept"][0] == [-(-first["audio_tokens"] // 2)] * 2 and second["audio_tokens"] > first["audio_tokens"]


def test_streamed_words(folder, recordings, capsys):
    done, printed, _ = run(
        capsys, "--model", folder, "--audio", recordings[0], "--stream", "--max-new-tokens", 5, "--device", "cpu",
        "--prompt", "what?", "--budget", 12,
    )  # fmt: skip
    assert done == 0 and len(printed.split()) >= 1


def test_a_bad_file_is_named_and_the_rest_goes_on(folder, recordings, tmp_path, capsys):
    bad = tmp_path / "bad.wav"
    bad.write_bytes(b"no sound")
    gone = tmp_path / "gone.wav"
    done, printed, told = run(
        capsys, "--model", folder, "--audio", bad, gone, recordings[0], "--max-new-tokens", 4, "--device", "cpu"
    )
    assert done == 1 and len(printed.splitlines()) == 1
    assert f"\n{bad}: Format not recognised" in "\n" + told and f"\n{gone}: " in told


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (["--pruner", "tokens"], "pruner must be one of"),
        (["--budget", "1.5"], "budget must be a share"),
        (["--budget", "half"], "--budget must be a number"),
        (["--stream", "--pruner", "merge"], "--stream is for streaming_anchor, window"),
        (["--set", "seed"], "--set takes NAME=VALUE"),
        (["--pruner", "random", "--set", "sed=3"], "sed"),
        (["--model", "/no/such/folder"], "/no/such/folder"),
        (["--device", "cuda:99"], "device 'cuda:99': torch sees "),
        (["--out", "/no/such/a.jsonl"], "--out: /no/such: no such folder; make it"),
    ],
)
def test_bad_input(folder, recordings, capsys, arguments, complaint):
    with pytest.raises(SystemExit):
        run(capsys, "--model", folder, "--audio", recordings[0], *arguments)
    assert complaint in capsys.readouterr().err


def test_not_a_speech_llm(tmp_path, recordings, capsys):
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        run(capsys, "--model", tmp_path, "--audio", recordings[0])
    assert "knows no speech LLM of type 'llama'" in capsys.readouterr().err


def test_table_of_a_data_set(folder, recordings, tmp_path, capsys, monkeypatch):
    import importlib.util
    from pathlib import Path

    path = Path(__file__).parents[1] / "benchmarks/prune_data.py"
    spec = importlib.util.spec_from_file_location("prune_data", path)
    script = importlib.util.module_from_spec(spec)
    pytest.importorskip("tqdm")
    pytest.importorskip("jiwer")
    spec.loader.exec_module(script)
    lines = [{"audio": file, "question": "what?", "answers": ["w30"]} for file in recordings]
    (tmp_path / "qa.jsonl").write_text("\n".join(map(json.dumps, lines)))
    given = [
        "--model",
        folder,
        "--data",
        tmp_path / "qa.jsonl",
        "--pruners",
        "merge",
        "random",
        "--budgets",
        "0.5",
        "--seeds",
        "2",
    ]
    monkeypatch.setattr("sys.argv", ["prune_data.py", *map(str, given), "--max-new-tokens", "3", "--device", "cpu"])
    script.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == ["| full", "| merge", "| random"]
    assert all(0 <= float(row.split(" | ")[3]) <= 100 for row in rows)
