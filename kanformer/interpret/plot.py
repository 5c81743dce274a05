"""Every layer's learned functions as files: figures, an overview, and a table of what was drawn."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from torch import nn

from kanformer.errors import CheckpointError, ConfigError, did_you_mean
from kanformer.interpret.blocks import find_layer
from kanformer.interpret.collect import collect
from kanformer.interpret.collecting.stats import LayerStats
from kanformer.interpret.scores import MapScores, score_layer

_FORMATS = ("pdf", "png", "svg")
_COLUMNS = ("layer", "map", "rank", "input", "output", "edges", "share", "std", "nonlinearity", "learned", "outside_grid")


def plot_model(
    model: nn.Module,
    batches: Iterable[Mapping],
    out_dir: str | Path,
    *,
    top: int = 48,
    formats: Iterable[str] = ("png",),
    y: str = "shared",
    max_tokens: int = 16_384,
    dpi: int = 110,
    progress: Callable[[str], None] | None = None,
) -> list[Path]:
    """Runs data through the model and writes `layer_NN.png` (full edges: `layer_NN_up.png`, ...), `overview.png` and `functions.csv`.

    Every file is complete or absent: it is written beside its place and moved there. Data are gathered before anything is written.

    Args:
        model, batches, max_tokens: see `collect`.
        out_dir: folder for the files, made if missing; files of the same names are replaced.
        top: how many functions of each map to draw and list, >= 1.
        formats: of "png", "svg", "pdf".
        y: "shared" or "free", see `plot_layer`.
        dpi: of the PNG files.
        progress: called with a line of text per step.

    Returns:
        The files, the overview and the table last.

    Raises:
        ConfigError: wrong options. NoFeedForwardError, DataError: see `collect`. CheckpointError: a file cannot be written.
    """
    formats = _check_options(formats, top, y)
    say = progress or (lambda line: None)
    stats = collect(model, batches, max_tokens, progress, scores=())
    scores = {}
    for number, path in enumerate(stats, 1):
        say(f"ranking functions: layer {number} of {len(stats)}")
        scores[path] = score_layer(model, stats, layer=path, top=top)
    folder = make_folder(out_dir, "the figures")
    files = []
    for name, figure in _figures(model, stats, scores, top, y, say):
        files += [write_file(folder / f"{name}.{kind}", render(figure, kind, dpi)) for kind in formats]
    files.append(write_file(folder / "functions.csv", _table(scores).encode()))
    return files


def write_file(path: Path, content: bytes) -> Path:
    """Writes a file whole or not at all.

    Raises:
        CheckpointError: it cannot be written; a file that was there before is untouched.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as handle:
            temporary = handle.name
            handle.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise CheckpointError("write a file", subject=str(path), got=error.strerror or str(error)) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)
    return path


def _check_options(formats: Iterable[str], top: int, y: str) -> list[str]:
    chosen = list(dict.fromkeys([formats] if isinstance(formats, str) else formats))
    for kind in chosen:
        if kind not in _FORMATS:
            raise ConfigError("plot a model", got=f"format {kind!r}", expected=f"one of {', '.join(_FORMATS)}", hint=did_you_mean(str(kind), _FORMATS))
    if not chosen or top < 1:
        raise ConfigError("plot a model", got=f"formats={tuple(chosen)}, top={top}", expected="at least one format and top >= 1")
    if y not in ("shared", "free"):
        raise ConfigError("plot a model", got=f"y={y!r}", expected="'shared' or 'free'")
    return chosen


def make_folder(out_dir: str | Path, what: str) -> Path:
    """A folder that is there. Raises CheckpointError."""
    folder = Path(out_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"make a folder for {what}", subject=str(folder), got=error.strerror or str(error), hint="Give another folder.") from error
    return folder


def _figures(model: nn.Module, stats: dict[str, LayerStats], scores: dict[str, dict[str, MapScores]], top: int, y: str, say) -> Iterator:
    """(file name without its ending, figure), drawn one at a time."""
    from kanformer.interpret.figures import draw_map, nothing_to_draw
    from kanformer.interpret.overview import plot_overview

    digits = max(2, len(str(len(stats) - 1)))
    for index, path in enumerate(stats):
        if not scores[path]:
            say(f"layer {index + 1} of {len(stats)} ({path}): {nothing_to_draw(stats[path])}")
        for name, drawn in scores[path].items():
            say(f"drawing layer {index + 1} of {len(stats)} ({path}): {len(drawn):,} of {drawn.n_functions:,} functions of {name}")
            ending = "" if name == "kan_functions" else "_" + name.removeprefix("kan_")
            yield f"layer_{index:0{digits}d}{ending}", draw_map(*find_layer(model, stats, path), drawn, y=y)
    say("drawing the overview")
    yield "overview", plot_overview(model, stats, top=top, scores=scores)


def render(figure, kind: str = "png", dpi: int = 110) -> bytes:
    buffer = io.BytesIO()
    dates = {"pdf": {"CreationDate": None}, "svg": {"Date": None}, "png": None}
    figure.savefig(buffer, format=kind, dpi=dpi, metadata=dates[kind])
    return buffer.getvalue()


def _table(scores: Mapping[str, Mapping[str, MapScores]]) -> str:
    """CSV text: a row per ranked function, and one per map for all the others."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for path, maps in scores.items():
        for name, ranked in maps.items():
            writer.writerows([path, name, *row] for row in _rows(ranked))
    return text.getvalue()


def _rows(ranked: MapScores) -> Iterator[list]:
    numbers = (ranked.share, ranked.std, ranked.nonlinearity, ranked.learned, ranked.outside)
    columns = zip(*(values.tolist() for values in (ranked.input, ranked.output, *numbers)), strict=True)
    for rank, (source, target, *values) in enumerate(columns, 1):
        yield [rank, source, "all" if target < 0 else target, ranked.edges_per_function, *(f"{value:.6g}" for value in values)]
    others = ranked.n_functions - len(ranked)
    yield ["other", "other", "all" if ranked.shared else "other", others * ranked.edges_per_function, f"{ranked.remainder:.6g}", "", "", "", ""]
