"""What `nicv2.py` found, for people: Markdown tables and two plots, made from the JSON result. Plots need matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import numpy as np

from methods.registry import BOUNDS, TITLES

_COLOURS = ("#7f7f7f", "#e377c2", "#2ca02c", "#9467bd", "#17becf", "#8c564b", "#ff7f0e", "#1f77b4", "#1f77b4", "#bcbd22", "#d62728")


def markdown(result: Dict[str, Any]) -> str:
    """The tables of everything that was run."""
    parts = [_head(result)]
    if result.get("methods"):
        parts.append(_field(result["methods"]))
    if result.get("choices"):
        parts.append(_choices(result["choices"]))
    if result.get("codecs"):
        parts.append(_codecs(result["codecs"], "latentd's closed-form head" if result.get("closed_form") else "latentd's head"))
    if result.get("stress"):
        parts.append(_stress(result["stress"], "closed-form head" if result.get("closed_form") else "head"))
    return "\n\n".join(parts) + "\n"


def _head(result: Dict[str, Any]) -> str:
    machine = result["machine"]
    sessions = ", ".join(str(session) for session in result["asked_sessions"])
    kind = "validation" if result["validation"] else "test"
    lines = [
        f"# NICv2-{result['protocol']} on {result['source']}",
        "",
        f"Accuracy in percent on all {result['classes']} classes of the {kind} sessions {sessions} after the last batch; mean ± standard",
        f"deviation over the orders {', '.join(str(order) for order in result['orders'])}. Forgetting: points that a class lost against",
        "its best time, mean over the classes. Memory: all that learning keeps between two batches.",
        f"Made by `{result['command']}` on {machine['cpu']} ({machine['cores']} cores, {result['workers']} runs at a time).",
    ]
    if result.get("quick"):
        lines.append("\n**A quick run: few frames a video. Its figures are no result.**")
    return "\n".join(lines)


def _field(methods: Dict[str, Any]) -> str:
    twentieth = any(abs(found["accuracy"]["mean"] - found["accuracy_watched"]["mean"]) > 1e-9 for found in methods.values())
    extra = ["one frame in 20"] if twentieth else []
    rows = []
    for name, found in methods.items():
        cells = [TITLES.get(name, name), _pm(found["accuracy"])]
        cells += [_pm(found["accuracy_watched"])] if twentieth else []
        cells += [_plain(found["forgetting"]), f"{found['bytes'] / 1e6:.2f}", f"{found['seconds_an_order']:.1f}", _joules(found)]
        rows.append(cells)
    return _table(["method", "accuracy", *extra, "forgetting", "memory, MB", "learning, s an order", "J a sample"], rows) + _energy_note(
        methods
    )


def _energy_note(methods: Dict[str, Any]) -> str:
    reasons = {found["energy"]["reason"] for found in methods.values() if found["energy"]["reason"]}
    return "\n\nNo joules: " + "; ".join(sorted(reasons)) if reasons else ""


def _choices(choices: Dict[str, List[Dict[str, Any]]]) -> str:
    rows = []
    for name, tried in choices.items():
        best = max(tried, key=lambda row: float(row["accuracy"]["mean"]))
        for row in tried:
            settings = ", ".join(f"{key} {value}" for key, value in row["changes"].items())
            rows.append([name, settings, f"**{_pm(row['accuracy'])}**" if row is best else _pm(row["accuracy"])])
    return "## Settings tried\n\n" + _table(["method", "settings", "accuracy"], rows)


def _codecs(codecs: Sequence[Dict[str, Any]], head_name: str) -> str:
    rows = [
        [
            row["rule"],
            row["name"] if row["kind"] == "float" else f"{row['name']} {row['kind']}",
            str(row["latent_bytes"]),
            str(row["latents"]),
            _pm(row["accuracy"]),
            f"{row['against_fp32']:+.2f}",
        ]
        for row in sorted(codecs, key=lambda row: str(row["rule"]))
    ]
    head = ["memory", "codec", "bytes a latent", "latents that fit", "accuracy", "against fp32"]
    return f"## Latents in few bits, {head_name}\n\n" + _table(head, rows)


def _stress(stress: Sequence[Dict[str, Any]], head: str) -> str:
    rows = [
        [row["name"], str(row["protocol"]), key.replace("_", " "), _pm(figure)] for row in stress for key, figure in row["figures"].items()
    ]
    return f"## Learning you can trust, latentd's {head}\n\n" + _table(
        ["stress", "batches", "figure", "mean ± deviation over orders"], rows
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _pm(figure: Dict[str, float]) -> str:
    return f"{figure['mean']:.2f} ± {figure['std']:.2f}"


def _plain(value: Optional[float]) -> str:
    return "–" if value is None else f"{value:.2f}"


def _joules(found: Dict[str, Any]) -> str:
    value = found["energy"]["per_sample_j"]
    return "–" if value is None else f"{value:.4f}"


def plots(result: Dict[str, Any], folder: Path) -> List[Path]:
    """PNG files beside the JSON: accuracy over the stream, accuracy against memory."""
    if not result.get("methods"):
        return []
    stem = f"nicv2-{result['protocol']}"
    return [_plot_stream(result, folder / f"{stem}-stream.png"), _plot_memory(result, folder / f"{stem}-memory.png")]


def band(runs: Sequence[Dict[str, Any]]) -> Optional[Dict[str, List[float]]]:
    """Lessons, mean and deviation of the curves of one method's runs; None where they hold less than two common points."""
    curves = [dict(zip(run["curve"]["lessons"], run["curve"]["accuracy"])) for run in runs]
    lessons = sorted(set(curves[0]).intersection(*curves[1:]))
    if len(lessons) < 2:
        return None
    table = np.array([[curve[lesson] for lesson in lessons] for curve in curves])
    return {"lessons": lessons, "mean": table.mean(axis=0).tolist(), "std": table.std(axis=0).tolist()}


def _plot_stream(result: Dict[str, Any], path: Path) -> Path:
    figure, axes = _canvas()
    for colour, (name, found) in zip(_COLOURS, result["methods"].items()):
        curve = band(found["runs"])
        title = TITLES.get(name, name).replace("**", "")
        if curve is None:
            axes.axhline(found["accuracy"]["mean"], color=colour, linestyle=":", label=title)
            continue
        mean, std = np.array(curve["mean"]), np.array(curve["std"])
        axes.plot(curve["lessons"], mean, color=colour, linestyle="--" if name == "latentd-floor" else "-", label=title)
        axes.fill_between(curve["lessons"], mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel="batches learned", ylabel=f"accuracy on all {result['classes']} classes, %", ylim=(0, 100))
    axes.set_title(f"NICv2-{result['protocol']} on {result['source']}")
    axes.legend(loc="lower right", fontsize=8)
    return _saved(figure, path)


def _plot_memory(result: Dict[str, Any], path: Path) -> Path:
    figure, axes = _canvas()
    for colour, (name, found) in zip(_COLOURS, result["methods"].items()):
        marker = "*" if name in BOUNDS else "o"
        size, accuracy = found["bytes"] / 1e6, found["accuracy"]
        axes.errorbar(size, accuracy["mean"], yerr=accuracy["std"], marker=marker, color=colour, capsize=3)
        axes.annotate(TITLES.get(name, name).replace("**", ""), (size, accuracy["mean"]), (6, 4), textcoords="offset points", fontsize=8)
    axes.set_xscale("log")
    axes.margins(x=0.25)
    axes.set(xlabel="what learning keeps, MB", ylabel="final accuracy, %")
    axes.set_title(f"NICv2-{result['protocol']} on {result['source']}")
    return _saved(figure, path)


def _canvas() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    axes.grid(alpha=0.3)
    return figure, axes


def _saved(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
    return path
