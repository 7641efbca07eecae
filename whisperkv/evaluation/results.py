"""Results: the figures of one setting, each with a line that says how it was made."""

import csv
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .hearing import Audio
from .measuring import Measured, Options
from .metrics import ROUNDS, interval, loops, word_counts, word_diff

Interval = tuple[float, float]


@dataclass
class File:
    """One recording under one setting. Figures that need a reference are None where there is none."""

    name: str
    seconds: float
    text: str
    wanted: str = ""  # the reference, or the unpatched model's text
    errors: int | None = None
    words: int | None = None
    insertions: int | None = None
    nats: float = 0.0
    tokens: int = 0
    loops: int = 0  # windows that got stuck
    diff: list[tuple[str, str, str]] = field(default_factory=list)  # of normalized words, see word_diff()


@dataclass
class Result:
    """One setting on a data set. Intervals are of 95 %, differences are from the unpatched model. What a single
    recording (of NLL: window) gives has no interval."""

    setting: str
    python: str  # the line that sets it
    model: str
    language: str
    audios: int
    seconds: float
    wer: float | None  # percent
    wer_interval: Interval | None
    wer_difference: float | None  # points
    wer_difference_interval: Interval | None
    words: int  # of the references
    substitutions: int
    deletions: int
    insertions: int
    nll: float  # nats a token of the unpatched model's text
    nll_difference: float
    nll_difference_interval: Interval | None
    tokens: int
    rtfx: float  # seconds of audio in a second
    seconds_taken: float
    self_bytes: int
    self_bytes_transformers: int
    cross_bytes: int
    cross_bytes_transformers: int
    weight_bytes: int
    evicted: int
    frames_share: float  # kept, of those that the encoder hears
    peak_memory: int  # bytes at most, while it decoded
    memory_before: int  # with the model loaded and no more
    loops: int  # recordings that got stuck somewhere
    same_texts: int  # as the unpatched model's
    note: str = ""  # what stats() says was not done as asked
    signatures: dict[str, str] = field(default_factory=dict)
    files: list[File] = field(default_factory=list)

    @property
    def cache_bytes(self) -> int:
        return self.self_bytes + self.cross_bytes

    @property
    def cache_bytes_transformers(self) -> int:
        return self.self_bytes_transformers + self.cross_bytes_transformers

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """As JSON, files and signatures included; written to `path` if one is given."""
        return write_json([self], path)

    def to_csv(self, path: str | PathLike[str] | None = None) -> str:
        """Two lines, without the files and signatures."""
        return write_csv([self], path)

    def __str__(self) -> str:
        return markdown([self])


def result(
    measured: Measured,
    baseline: Measured,
    audios: Sequence[Audio],
    options: Options,
    model: str,
    normalize: Callable[[str], str],
    norm: str,
) -> Result:
    """The figures of what was measured, beside the unpatched model on the same recordings."""
    ours, theirs = (files_of(each, baseline, audios, normalize) for each in (measured, baseline))
    scored = [index for index, file in enumerate(ours) if file.words is not None]
    wrong, wrong_theirs, words = (
        np.array([getattr(files[index], name) for index in scored], float)
        for files, name in ((ours, "errors"), (theirs, "errors"), (ours, "words"))
    )
    counts = [word_counts(normalize(ours[index].text), normalize(ours[index].wanted)) for index in scored]
    spoken = words.sum()
    nats, nats_theirs, lengths = (
        np.concatenate(each).astype(float) for each in (measured.nats, baseline.nats, measured.lengths)
    )
    taken, seconds = median(measured.taken), sum(audio.seconds for audio in audios)
    held: Any = {name: value if name == "frames_share" else int(value) for name, value in measured.held.items()}
    return Result(
        setting=measured.setting.name,
        python=measured.setting.python,
        model=model,
        language=measured.about["language"],
        audios=len(audios),
        seconds=round(seconds, 2),
        wer=float(100 * wrong.sum() / spoken) if spoken else None,
        wer_interval=_between_draws(100 * wrong, words),
        wer_difference=float(100 * (wrong - wrong_theirs).sum() / spoken) if spoken else None,
        wer_difference_interval=_between_draws(100 * (wrong - wrong_theirs), words),
        words=int(spoken),
        substitutions=sum(each.substitutions for each in counts),
        deletions=sum(each.deletions for each in counts),
        insertions=sum(each.insertions for each in counts),
        nll=float(nats.sum() / lengths.sum()),
        nll_difference=float((nats - nats_theirs).sum() / lengths.sum()),
        nll_difference_interval=_between_draws(nats - nats_theirs, lengths),
        tokens=int(lengths.sum()),
        rtfx=seconds / taken,
        seconds_taken=taken,
        peak_memory=measured.peak,
        memory_before=measured.before,
        loops=sum(file.loops > 0 for file in ours),
        same_texts=sum(one.text == other.text for one, other in zip(ours, theirs)),
        note=measured.note,
        signatures=signatures(measured, audios, scored, int(spoken), options, model, norm),
        files=ours,
        **held,
    )


def files_of(
    measured: Measured, baseline: Measured, audios: Sequence[Audio], normalize: Callable[[str], str]
) -> list[File]:
    """Each recording under a setting. References are the audios'; where none has one, the unpatched model's texts."""
    known = any(audio.text for audio in audios)
    found = []
    for index, audio in enumerate(audios):
        text = " ".join(filter(None, measured.texts[index]))
        wanted = audio.text if known else " ".join(filter(None, baseline.texts[index]))
        file = File(audio.name, round(audio.seconds, 2), text, wanted)
        if audio.text or not known:
            heard, said = normalize(text), normalize(wanted)
            counts = word_counts(heard, said)
            file.errors, file.words, file.insertions = counts.errors, counts.words, counts.insertions
            file.diff = word_diff(heard, said)
        file.nats, file.tokens = sum(measured.nats[index]), sum(measured.lengths[index])
        file.loops = sum(loops(window, normalize) for window in measured.texts[index])
        found.append(file)
    return found


def signature(figure: str, **parts: object) -> str:
    """One line that says how a figure was made: FIGURE|name:value|..."""
    return "|".join([figure, *(f"{name.replace('_', '-')}:{value}" for name, value in parts.items())])


def signatures(
    measured: Measured,
    audios: Sequence[Audio],
    scored: Sequence[int],
    words: int,
    options: Options,
    model: str,
    norm: str,
) -> dict[str, str]:
    """{figure: its line}"""
    import jiwer

    about, known = measured.about, any(audio.text for audio in audios)
    version = getattr(jiwer, "__version__", "") or _version("jiwer")
    search = {"search": "greedy" if options.beams == 1 else f"{options.beams} beams", "batch": options.batch}
    made = {"model": model, "dtype": about["dtype"], "language": about["language"]}
    versions = {name: about[name] for name in ("whisperkv", "transformers", "torch")}
    drawn = f"paired bootstrap,{ROUNDS},seed 0"
    most = "all" if options.most is None else options.most
    machine = {"device": about["device"], "threads": about["threads"], "isa": about["isa"]}
    return {
        "wer": signature(
            "WER", reference="given" if known else "unpatched", norm=norm, jiwer=version, audios=len(scored),
            words=words, interval=drawn, **made, **search, tokens=most, timestamps="no", fallback="no",
            windows="30 s, cut where quiet", **versions,
        ),
        "nll": signature(
            "NLL", text="unpatched greedy" if options.beams == 1 else f"unpatched {options.beams} beams",
            forced="through the cache", unit="nats a token", tokens=sum(map(sum, measured.lengths)),
            interval=f"{drawn},over windows", **made, **versions,
        ),
        "rtfx": signature(
            "RTFx", audio="samples in memory", to="text", seconds=f"{sum(each.seconds for each in audios):.1f}",
            passes=options.repeat, of="median", **made, **search, **machine, **versions,
        ),
        "caches": signature("caches", of="the batch that holds most", **search, **made, **versions),
        "memory": signature(
            "memory", of="the process" if about["device"] == "cpu" else "torch's allocator", most="while decoding",
            **search, **made, **machine, **versions,
        ),
    }  # fmt: skip


def norm_name(language: str, spellings: Mapping[str, str] | None) -> str:
    """What normalizer(language, spellings) is called in a signature."""
    if language == "en":
        return f"whisper english{'' if spellings else ' without spellings'}"
    from .metrics import LETTERS

    return f"whisper basic{', letters' if language in LETTERS else ''}"


# Writing

INTERVAL = " (95 %)"
MARKDOWN: dict[str, tuple[str, Callable[[Result], object]]] = {
    "setting": ("", lambda row: row.setting),
    "WER %": (".2f", lambda row: row.wer),
    "difference (95 %)": ("", lambda row: between(row.wer_difference, row.wer_difference_interval, "+.2f")),
    "NLL": (".4f", lambda row: row.nll),
    "NLL difference (95 %)": ("", lambda row: between(row.nll_difference, row.nll_difference_interval, "+.4f")),
    "RTFx": (".1f", lambda row: row.rtfx),
    "self cache, MB": (".2f", lambda row: row.self_bytes / 1e6),
    "cross cache, MB": (".2f", lambda row: row.cross_bytes / 1e6),
    "peak memory, MB": (".0f", lambda row: row.peak_memory / 1e6),
    "insertions": ("d", lambda row: row.insertions),
    "loops": ("d", lambda row: row.loops),
    "same texts": ("", lambda row: f"{row.same_texts} of {row.audios}"),
}


def between(value: float | None, edges: Interval | None, form: str) -> str | None:
    if value is None:
        return None
    if edges is None:
        return _signed(value, form)
    return f"{_signed(value, form)} ({_signed(edges[0], form)} to {_signed(edges[1], form)})"


def _signed(value, form):
    """Nothing has no minus."""
    text = format(value, form)
    return text if text.strip("-0.") else text.replace("-", "+")


def table(headings: Sequence[str], rows: Iterable[Sequence[object]], forms: Sequence[str]) -> str:
    """Markdown. None is a dash."""
    cells = [list(headings), ["---"] * len(headings)]
    for row in rows:
        cells.append(["-" if value is None else format(value, form) for value, form in zip(row, forms)])
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def markdown(results: Sequence[Result]) -> str:
    """A table, one line a setting, and the signatures of the last."""
    rows = [[get(row) for _, get in MARKDOWN.values()] for row in results]
    lines = "\n".join(f"    {line}" for line in results[-1].signatures.values()) if results else ""
    return f"{table(list(MARKDOWN), rows, [form for form, _ in MARKDOWN.values()])}\n\n{lines}"


def beside(results: Sequence[Result]) -> str:
    """The same figures with a setting a column, aligned, for a terminal; it is Markdown all the same."""
    lines: list[list[str]] = []
    for name, (form, get) in MARKDOWN.items():
        cells = ["-" if (value := get(row)) is None else format(value, form) for row in results]
        if not name.endswith(INTERVAL):
            lines.append([name, *cells])
            continue
        lines.append([name.removesuffix(INTERVAL), *(cell.partition(" (")[0] for cell in cells)])
        if any(" (" in cell for cell in cells):
            lines.append([f" {INTERVAL}", *(cell.partition(" (")[2].removesuffix(")") or "-" for cell in cells)])
    first, *others = (max(map(len, column)) for column in zip(*lines))
    lines.insert(1, ["-" * first, *("-" * (width - 1) + ":" for width in others)])
    aligned = ([name.ljust(first), *(map(str.rjust, cells, others))] for name, *cells in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in aligned)


def write_json(results: Sequence[Result], path: str | PathLike[str] | None = None) -> str:
    text = json.dumps([each.to_dict() for each in results], indent=1, ensure_ascii=False) + "\n"
    return _written(text, path)


def write_csv(results: Sequence[Result], path: str | PathLike[str] | None = None) -> str:
    names = [each.name for each in fields(Result) if each.name not in ("signatures", "files")]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    intervals = [name for name in names if name.endswith("_interval")]
    heads = [[f"{name}_low", f"{name}_high"] if name in intervals else [name] for name in names]
    writer.writerow([head for pair in heads for head in pair])
    for each in results:
        row: list[object] = []
        for name in names:
            value = getattr(each, name)
            row += (list(value) if value else ["", ""]) if name in intervals else ["" if value is None else value]
        writer.writerow(row)
    return _written(out.getvalue(), path)


def read_json(path: str | PathLike[str]) -> list[Result]:
    """What write_json() has written."""
    found = []
    for given in json.loads(Path(path).read_text()):
        given["files"] = [File(**{**each, "diff": [tuple(piece) for piece in each["diff"]]}) for each in given["files"]]
        pairs = {name: tuple(value) for name, value in given.items() if name.endswith("_interval") and value}
        found.append(Result(**{**given, **pairs}))
    return found


def _written(text, path):
    if path is not None:
        Path(path).write_text(text)
    return text


def _between_draws(values, weights):
    """The interval over recordings; one recording says nothing about others."""
    return interval(values, weights) if len(values) > 1 and sum(weights) else None


def _version(name):
    from importlib.metadata import version

    return version(name)
