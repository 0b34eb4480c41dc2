"""One self-contained HTML page per run: the final table, the curves, some pseudo-graphs, the settings."""

from __future__ import annotations

import html
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import DataError
from .files import write_text
from .graphs import GraphBatch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# (stage, title, measurements)
_CURVES = (
    ("learn", "Learn: terms of the loss", ("loss", "cross_entropy", "batch_norm")),
    ("refine", "Refine: divergence K and cross-entropy", ("k", "cross_entropy")),
    ("student", "Student: distillation loss", ("loss",)),
    ("student", "Student: share of the graphs visited", ("share",)),
    ("student", "Student: adversarial temperature", ("temperature",)),
)
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .25rem .75rem; border-bottom: 1px solid #ccc; text-align: left; }
td:nth-child(n+2) { font-variant-numeric: tabular-nums; text-align: right; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 13px; } svg { max-width: 100%; height: auto; }
"""


def write_report(run: Path, rows: Sequence[dict[str, Any]], graphs: GraphBatch, config: dict[str, Any]) -> Path:
    """Write ``report.html`` into a run folder.

    Args:
        run: the folder.
        rows: the lines of ``metrics.jsonl``; those of stage "result" make the table.
        graphs: the pseudo-graphs, some of which are drawn.
        config: the run's ``config.json``.

    Returns:
        The path of the page. Without matplotlib it holds no pictures and says so.
    """
    parts = ["<h1>Distillation report</h1>", _table([row for row in rows if row["stage"] == "result"])]
    changes: dict[str, Any] = next((row for row in rows if row["stage"] == "changes"), {})
    parts += [_pool({**changes, **row}) for row in rows if row["stage"] == "pool"]
    parts += _prior([row for row in rows if row["stage"] == "prior"], config)
    parts += [_sizes(row) for row in rows if row["stage"] == "parameters"]
    parts += _agreement([row for row in rows if row["stage"] == "agreement"])
    try:
        import matplotlib  # noqa: F401

        parts += _curves(rows)
        parts.append("<h2>Some pseudo-graphs</h2>" + _svg(_draw_graphs(graphs)))
    except ImportError:
        parts.append("<p>Pictures are left out: matplotlib is not installed (extra <code>report</code>).</p>")
    parts.append(f"<h2>Settings</h2><pre>{html.escape(json.dumps(config, indent=2))}</pre>")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>acgkd-fast: distillation report</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>"
    )
    path = run / "report.html"
    write_text(path, page)
    return path


def result_table(results: Sequence[dict[str, Any]]) -> str:
    """The final table as aligned text: one line per row, mean and deviation over seeds in percent."""
    if not results:
        raise DataError("results: expected at least one row, got none")
    width = max(len(row["row"]) for row in results)
    lines = [f"{'':{width}}  accuracy"]
    for row in results:
        lines.append(f"{row['row']:{width}}  {_accuracy(row)}")
    return "\n".join(lines)


def parameter_line(counts: dict[str, int]) -> str:
    """Sizes of teacher and student in one line; see :func:`acgkd_fast.distill.projector.parameter_counts`."""
    text = f"parameters: teacher {counts['teacher']}, student {counts['student']}"
    if counts["reused_classifier"]:
        text += (
            f" (trained {counts['trained']}, of which projector {counts['projector']}; reused classifier "
            f"{counts['reused_classifier']})"
        )
    return text


def _accuracy(row: dict[str, Any]) -> str:
    text = f"{100 * row['accuracy']:5.1f} %"
    if row.get("seeds", 1) > 1:
        text += f" +- {100 * row['deviation']:.1f} ({row['seeds']} seeds)"
    return text


def _table(results: Sequence[dict[str, Any]]) -> str:
    if not results:
        return "<p>No evaluation data set was given, so there is no accuracy to show.</p>"
    body = "".join(f"<tr><td>{html.escape(row['row'])}</td><td>{_accuracy(row)}</td></tr>" for row in results)
    return (
        "<h2>Accuracy on held-out real graphs</h2><table><tr><th>model</th><th>accuracy</th></tr>"
        f"{body}</table><p>Measured after the run; nothing in it was chosen by these figures.</p>"
    )


def _pool(row: dict[str, Any]) -> str:
    named = {
        "k": "divergence K of its statistics from the teacher's",
        "cross_entropy": "teacher's cross-entropy, nats",
        "agreement": "share of graphs to which the teacher gives their label",
        "graphs": "graphs",
        "nodes": "nodes",
        "edges": "edges",
        "mean_degree": "mean degree",
        "density": "edges over pairs of nodes",
        "candidates": "learned edge logits",
        "peak_memory_mib": "peak memory, MiB",
        "perturbation": "for the student: largest chance of a change, anew in every epoch",
        "twins": "and of a node to get a twin in a second copy",
    }
    body = "".join(f"<tr><td>{text}</td><td>{row[name]:.4g}</td></tr>" for name, text in named.items() if name in row)
    return f"<h2>The pseudo-graphs</h2><table>{body}</table>"


def _prior(rows: Sequence[dict[str, Any]], config: dict[str, Any]) -> list[str]:
    tried = [row for row in rows if "k" in row]
    if not tried:
        return []
    named = {"mean_degree": "mean degree", "hub_share": "hub share", "size_spread": "spread of sizes"}
    named |= {"degree_growth": "growth of degrees", "ego_networks": "ego networks"}
    as_they_are = config["settings"]["prior"]["feature_kind"] == "degree"
    named |= {"draws": "draws", "k": "K of the start graphs"} if as_they_are else {"k": "K after a short search"}
    head = "".join(f"<th>{text}</th>" for text in named.values())
    body = "".join("<tr>" + "".join(f"<td>{_figures(row[name])}</td>" for name in named) + "</tr>" for row in tried)
    last = [row for row in rows if "k" not in row][-1:]
    chosen = "".join(
        "<p>Chosen: " + ", ".join(f"{named[name]} {_figures(row[name])}" for name in named if name in row) + ".</p>"
        for row in last
    )
    return [f"<h2>Start graphs tried</h2><table><tr>{head}</tr>{body}</table>{chosen}"]


def _figures(value: bool | float | list[float]) -> str:
    """A number, several, or yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return " and ".join(f"{one:.3g}" for one in (value if isinstance(value, list) else [value]))


def _sizes(row: dict[str, Any]) -> str:
    names = ("teacher", "student", "trained", "projector", "reused_classifier")
    body = "".join(f"<tr><td>{name.replace('_', ' ')}</td><td>{row[name]}</td></tr>" for name in names)
    return f"<h2>Parameters</h2><table>{body}</table>"


def _agreement(rows: Sequence[dict[str, Any]]) -> list[str]:
    if not rows:
        return []
    body = "".join(
        f"<tr><td>seed {row['step']}</td><td>{100 * row['agreement']:.1f} %</td><td>{row['divergence']:.3g}</td></tr>"
        for row in rows
    )
    return [
        "<h2>Agreement of student and teacher on the pseudo-graphs</h2><table><tr><th>student</th><th>same class"
        f"</th><th>divergence</th></tr>{body}</table>"
    ]


def _curves(rows: Sequence[dict[str, Any]]) -> list[str]:
    from matplotlib.figure import Figure

    parts = []
    for stage, title, names in _CURVES:
        # Students are numbered by their seeds; the first one stands for all.
        runs = [row["stage"] for row in rows if row["stage"].split("-")[0] == stage]
        if not runs:
            continue
        points = [row for row in rows if row["stage"] == runs[0]]
        if not any(name in row for row in points for name in names):
            continue
        figure = Figure(figsize=(7, 2.6), layout="constrained")
        axes = figure.subplots()
        for name in names:
            xs = [row["step"] for row in points if name in row]
            if xs:
                axes.plot(xs, [row[name] for row in points if name in row], label=name.replace("_", " "))
        axes.set_xlabel("epoch" if stage == "student" else "step")
        axes.set_yscale("symlog", linthresh=1e-3)
        axes.legend(frameon=False)
        parts.append(f"<h2>{html.escape(title)}</h2>{_svg(figure)}")
    return parts


def _draw_graphs(graphs: GraphBatch, count: int = 12) -> Figure:
    """The first graphs of each class in turn, nodes coloured by their feature."""
    import networkx
    from matplotlib.figure import Figure

    order = list(range(graphs.num_graphs))
    if graphs.y is not None:
        labels = graphs.y.tolist()
        rank: dict[int, int] = {}
        position = {}
        for g in order:
            position[g] = rank[labels[g]] = rank.get(labels[g], -1) + 1
        order.sort(key=lambda g: (position[g], labels[g]))
    chosen = graphs.select(order[:count])
    figure = Figure(figsize=(10, 5), layout="constrained")
    grid = figure.subplots(3, 4, squeeze=False)
    ptr = chosen.ptr.tolist()
    sources, targets = chosen.to_edge_index()[0].tolist()
    colours = chosen.x.argmax(-1).tolist()
    for number, axes in enumerate(grid.flat):
        axes.set_axis_off()
        if number >= chosen.num_graphs:
            continue
        first, last = ptr[number], ptr[number + 1]
        drawing = networkx.Graph()
        drawing.add_nodes_from(range(first, last))
        drawing.add_edges_from((s, t) for s, t in zip(sources, targets, strict=True) if first <= t < last)
        networkx.draw_networkx(
            drawing,
            pos=networkx.spring_layout(drawing, seed=0),
            ax=axes,
            node_color=colours[first:last],
            node_size=25,
            cmap="tab10",
            vmin=0,
            vmax=9,
            with_labels=False,
            width=0.8,
        )
        if chosen.y is not None:
            axes.set_title(f"class {int(chosen.y[number])}", fontsize=9)
    return figure


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg")
    text = buffer.getvalue()
    return text[text.index("<svg") :]
