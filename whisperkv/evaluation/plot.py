"""Pictures: what each layer keeps, what that misses, what the caches take, and what settings cost.

Every function returns a matplotlib Figure. Backgrounds are transparent and text of a middle grey, so that they can be
read on white and on dark pages alike.
"""

import functools
import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np

from ..config import EvictionConfig
from ..simulate import attention_kept, simulate_eviction

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..tracing import Decode, Trace
    from .results import Result
    from .tuning import Entry

GREY, ACCENT, OTHER = "#8b949e", "#2f81c7", "#b0a08c"
COLOURS = ("#2f81c7", "#d9822b", "#3fa66b", "#b65fc0", "#c94f4f", "#8a7a3d", "#5f6bd0", "#3aa7a7")
STYLE: Any = {
    "text.color": GREY, "axes.labelcolor": GREY, "axes.edgecolor": GREY, "xtick.color": GREY, "ytick.color": GREY,
    "svg.fonttype": "none", "svg.hashsalt": "whisperkv", "font.size": 10, "axes.spines.top": False,
    "axes.spines.right": False, "font.family": "sans-serif", "figure.facecolor": "none", "axes.facecolor": "none",
    "savefig.facecolor": "none", "legend.frameon": False,
}  # fmt: skip
Draw = TypeVar("Draw", bound=Callable[..., Any])
LINE = 26  # letters of a name in one line
Y = {"wer": "WER, %", "nll": "NLL, nats a token"}
X = {"bytes": "bytes of both caches", "seconds": "seconds", "memory": "peak memory, bytes"}


def _styled(draw: Draw) -> Draw:
    """All of it in our colours, whatever the notebook's are."""

    @functools.wraps(draw)
    def drawn(*args: Any, **given: Any) -> Any:
        try:
            import matplotlib
        except ImportError as error:
            raise ImportError(f"{error.name} is not installed: pip install whisperkv[cli]") from error
        with matplotlib.rc_context(STYLE):
            return draw(*args, **given)

    return cast(Draw, drawn)


@_styled
def tokens_kept(recorded: "Trace | Decode", row: int = 0, layers: Sequence[int] | None = None) -> "Figure":
    """Which tokens each layer keeps: a line is a step, a column a token. Dark is kept, light was evicted."""
    from matplotlib.colors import ListedColormap

    decode = _decode(recorded)
    chosen = list(range(decode.layers)) if layers is None else list(layers)
    kept = [decode.kept(layer, row) for layer in chosen]
    steps, tokens = kept[0].shape
    across = min(len(chosen), 3)
    down = -(-len(chosen) // across)
    figure, axes = _figure(down, across, (3 * across, 2.6 * down), sharex=True, sharey=True)
    colours = ListedColormap(["none", OTHER, ACCENT])
    for layer, held, panel in zip(chosen, kept, axes.flat):
        seen = np.arange(tokens) <= tokens - steps + np.arange(steps)[:, None]
        panel.imshow(
            seen.astype(int) + (seen & held), cmap=colours, vmin=0, vmax=2, aspect="auto", interpolation="nearest"
        )
        panel.set_title(f"layer {layer}", loc="left", fontsize=10)
    for panel in axes.flat[len(chosen) :]:
        panel.set_visible(False)
    for panel in axes[-1]:
        panel.set_xlabel("token")
    for panel in axes[:, 0]:
        panel.set_ylabel("step")
    _legend(figure, {"kept": ACCENT, "evicted": OTHER})
    return figure


@_styled
def attention_over_time(
    recorded: "Trace | Decode",
    configs: Mapping[str, EvictionConfig] | Sequence[EvictionConfig],
    layer: int | None = None,
    row: int = 0,
) -> "Figure":
    """The share of each step's attention that eviction would have left, for each config, in a layer or the mean of all.
    Record unpatched or with patch(model)."""
    decode = _decode(recorded)
    named = configs if isinstance(configs, Mapping) else {_name(each): each for each in configs}
    chosen = range(decode.layers) if layer is None else [layer]
    figure, ((panel,),) = _figure(1, 1, (6.5, 3.2))
    for colour, (name, config) in zip(_colours(len(named)), named.items()):
        shares = []
        for each in chosen:
            attention = decode.attention(each, row)
            keys = decode.keys(each, row) if config.policy == "magnitude" else None
            shares.append(attention_kept(attention, simulate_eviction(attention, config, keys)))
        panel.plot(np.mean(shares, axis=0), color=colour, label=name, linewidth=1.6)
    panel.set_xlabel("step")
    panel.set_ylabel("attention kept" if layer is None else f"attention kept, layer {layer}")
    panel.set_ylim(None, 1.01)
    panel.legend(loc="lower left")
    return figure


@_styled
def cache_over_time(recorded: "Mapping[str, Trace | Decode]") -> "Figure":
    """Bytes of the self-attention and of the cross-attention cache after each pass, of decodes by name."""
    figure, ((left, right),) = _figure(1, 2, (8, 3.2))
    for colour, (name, each) in zip(_colours(len(recorded)), recorded.items()):
        sizes = _decode(each).cache_bytes() / 1e6
        for panel, values in zip((left, right), sizes.T):
            panel.plot(values, color=colour, label=name, linewidth=1.6)
    for panel, title in ((left, "self-attention"), (right, "cross-attention")):
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xlabel("pass")
        panel.set_ylim(0, None)
    left.set_ylabel("MB")
    left.legend(loc="upper left")
    return figure


@_styled
def tradeoff(results: "Sequence[Result]", y: str = "wer", x: str = "bytes") -> "Figure":
    """WER or NLL of each setting against what it takes, with 95 % intervals of the difference from the unpatched model,
    and a line through those that no other beats in both."""
    if y not in Y or x not in X:
        raise ValueError(f"y must be one of {', '.join(Y)} and x one of {', '.join(X)}; got y={y!r}, x={x!r}")
    shown = [each for each in results if getattr(each, y) is not None]
    if not shown:
        raise ValueError(f"no result has {y}: there was nothing to compare with")
    places = [_place(each, x) for each in shown]
    values = [getattr(each, y) for each in shown]
    figure, ((panel,),) = _figure(1, 1, (5.4, 3.9))
    best = pareto(places, values)
    panel.plot([places[i] for i in best], [values[i] for i in best], color=GREY, linewidth=1, linestyle=":", zorder=1)
    for colour, each, at, value in zip(_colours(len(shown)), shown, places, values):
        more = getattr(each, f"{y}_difference")
        low, high = getattr(each, f"{y}_difference_interval") or (more, more)
        base = value - more
        bars = [[max(value - base - low, 0)], [max(base + high - value, 0)]]
        panel.errorbar(at, value, bars, fmt="o", color=colour, capsize=3, markersize=7, label=wrapped(each.setting))
    if x in ("bytes", "memory") and max(places) > 5 * min(places) > 0:
        panel.set_xscale("log")
    _bytes_on(panel, x)
    panel.set_xlabel(X[x])
    panel.set_ylabel(Y[y])
    panel.margins(0.12)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


@_styled
def bars(names: Sequence[str], values: Sequence[float], title: str = "", form: str = ".1f") -> "Figure":
    """One bar a name, the value beside it."""
    labels = [wrapped(name) for name in names]
    lines = sum(label.count("\n") for label in labels)
    figure, ((panel,),) = _figure(1, 1, (5.4, 0.4 + 0.34 * len(names) + 0.16 * lines))
    panel.barh(range(len(names)), values, color=[OTHER, *[ACCENT] * (len(names) - 1)], height=0.68)
    for place, value in enumerate(values):
        panel.text(value, place, f" {value:{form}}", va="center")
    panel.set_yticks(range(len(names)), labels)
    panel.invert_yaxis()
    panel.margins(x=0.14)
    panel.set_title(title, loc="left", fontsize=10)
    for side in panel.spines.values():
        side.set_visible(False)
    panel.tick_params(length=0, labelbottom=False)
    return figure


@_styled
def search(entries: "Sequence[Entry]", goal: str, bound: float, winner: str) -> "Figure":
    """What tune() has tried: NLL beyond the unpatched model's against the share of its seconds or bytes. The larger a
    dot, the more recordings it has heard; the line joins those that no other beats in both."""
    figure, ((panel,),) = _figure(1, 1, (6.5, 4.2))
    most = max(entry.audios for entry in entries)
    x, y = [entry.share for entry in entries], [entry.result.nll_difference for entry in entries]
    sizes = [12 + 50 * entry.audios / most for entry in entries]
    panel.scatter(x, y, s=sizes, color=OTHER, linewidths=0, label="tried")
    last = [index for index, entry in enumerate(entries) if entry.audios == most]
    panel.scatter(
        [x[i] for i in last], [y[i] for i in last], s=62, color=ACCENT, linewidths=0, label="on all recordings"
    )
    best = [last[i] for i in pareto([x[i] for i in last], [y[i] for i in last])]
    panel.plot([x[i] for i in best], [y[i] for i in best], color=ACCENT, linewidth=1, linestyle=":")
    panel.axhline(bound, color=COLOURS[4], linewidth=1, linestyle="--", label=f"bound, {bound:g} nats")
    for entry in entries:
        if entry.setting.name == winner:
            panel.scatter([entry.share], [entry.result.nll_difference], s=170, facecolors="none", edgecolors=COLOURS[1],
                          linewidths=2, label="chosen")  # fmt: skip
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=max(bound, 1e-4))
    panel.set_xlabel({"speed": "seconds", "memory": "bytes"}[goal] + ", as a share of the unpatched model's")
    panel.set_ylabel("NLL beyond the unpatched model's")
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
    figure.legend(loc="outside lower center", ncols=4, fontsize=9)
    return figure


def pareto(x: Sequence[float], y: Sequence[float]) -> list[int]:
    """Those that no other beats in both, from left to right."""
    found: list[int] = []
    for index in sorted(range(len(x)), key=lambda index: (x[index], y[index])):
        if not found or y[index] < y[found[-1]]:
            found.append(index)
    return found


@_styled
def svg(figure: "Figure") -> str:
    """As an <svg> that stands in a page."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _figure(down, across, size, **shared):
    import matplotlib.pyplot  # noqa: F401  # notebooks show figures once it is there
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(down, across, squeeze=False, **shared)


def _decode(recorded: Any) -> Any:
    return recorded if hasattr(recorded, "passes") else recorded._last()


def _legend(figure, entries):
    from matplotlib.patches import Patch

    keys = [Patch(color=colour, label=name) for name, colour in entries.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=len(keys))


def _colours(count):
    return (COLOURS * (count // len(COLOURS) + 1))[:count]


def _name(config):
    name = getattr(config.policy, "__name__", config.policy)
    return f"{name} {config.recent}+{config.heavy}"


def _place(result, x):
    return {"bytes": result.cache_bytes, "seconds": result.seconds_taken, "memory": result.peak_memory}[x]


def _bytes_on(panel, x):
    if x in ("bytes", "memory"):
        from matplotlib.ticker import FuncFormatter, NullFormatter

        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size(value)))
        panel.xaxis.set_minor_formatter(NullFormatter())


def wrapped(name: str) -> str:
    """A setting in lines that are not too long."""
    lines = [""]
    for part in name.replace(",", ",\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > LINE:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
