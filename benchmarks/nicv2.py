"""NICv2 (79, 196 or 391 batches) through latentd's own learner, beside the field on the same latents.

Ten objects come first, then a few videos of one object at a time; after every batch all 50 classes are asked. CORe50 where its folder and
official lists are given, otherwise Objects-50. Frames pass the frozen stage once and are cached; then every method streams every order,
one run a core. Written: a JSON result, a Markdown table and plots. With --validation the sessions 5 and 9 are held out instead of learned
and the test sessions are left alone: that is where settings are chosen (--choose), and where --codecs and --stress look by default.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

import core50
import harness
import joules
import nicv2_codecs
import nicv2_report
import nicv2_run
import nicv2_stress
import objects50
import orders
import streams
from core50_latents import bar, say
from latentd import config
from latentd.errors import LatentdError
from methods import registry
from nicv2_run import Job, mean_std

# A worker's own, given once when it starts.
_worker: List[Tuple[streams.Source, config.Config]] = []


class Call(NamedTuple):
    """One run for a worker. title: for the progress bar; function: of a module, takes (*arguments, source, settings)."""

    title: str
    function: Callable[..., Dict[str, Any]]
    arguments: Tuple[Any, ...]


def main(argv: Optional[Sequence[str]] = None) -> int:
    arguments = _arguments(argv)
    settings = config.load(os.environ, {})
    try:
        source = _source(arguments, settings)
    except (LatentdError, core50.Incomplete) as cause:
        say(f"[red]{cause}[/red]")
        return 2
    metered = joules.reads(settings.energy)
    workers = arguments.workers or (1 if metered else os.cpu_count() or 1)
    if metered and workers == 1:
        say("A meter reads: one run at a time, so that its joules are its own.")
    result = _facts(arguments, source, workers)
    planned = list(_parts(arguments, source, settings))
    found = iter(_perform([call for _, calls in planned for call in calls], source, settings, workers))
    for part, calls in planned:
        result[part] = _GATHER[part](calls, [next(found) for _ in calls])
    if "codecs" in result:
        result["codecs"] = nicv2_codecs.table(*result["codecs"])
    return _write(arguments, result)


def _arguments(argv: Optional[Sequence[str]]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--protocol", type=int, choices=sorted(orders.VIDEOS_A_BATCH), default=391, help="batches of the stream")
    parser.add_argument("--orders", type=int, nargs="+", help="runs of the protocol; default 0 1 2 3 4")
    parser.add_argument(
        "--methods", nargs="+", choices=registry.NAMES, default=None, help="default: all, or none with --codecs or --stress"
    )
    parser.add_argument("--validation", action="store_true", help="hold out and ask sessions 5 and 9; leave the test sessions alone")
    parser.add_argument("--stream", choices=sorted(objects50.STREAMS), default="standard", help="of Objects-50")
    parser.add_argument("--core50", type=Path, metavar="DIR", help="the unpacked core50_128x128")
    parser.add_argument("--filelists", type=Path, metavar="DIR", help="the unpacked batches_filelists_NICv2")
    parser.add_argument("--choose", action="store_true", help="try the settings of each method instead; asks the validation sessions")
    parser.add_argument("--codecs", action="store_true", help="accuracy against bits")
    parser.add_argument("--kinds", nargs="+", choices=nicv2_codecs.KINDS, default=nicv2_codecs.KINDS, help="rows of --codecs besides fp32")
    parser.add_argument("--closed-form", action="store_true", help="--codecs or --stress with the floor alone: minutes instead of hours")
    parser.add_argument("--stress", action="store_true", help="label noise, imbalance, long absence, unknown classes, order")
    parser.add_argument("--test-sessions", action="store_true", help="let --codecs and --stress ask the test sessions")
    parser.add_argument("--quick", action="store_true", help=f"{streams.QUICK_FRAMES} frames a video and order 0: a trial of the program")
    parser.add_argument("--workers", type=int, default=0, help="runs at a time; default: one a core, or 1 where a meter reads")
    parser.add_argument("--out", type=Path, help="default out/nicv2-PROTOCOL.json")
    found = parser.parse_args(argv)
    if (found.core50 is None) != (found.filelists is None):
        parser.error("--core50 and --filelists belong together")
    if found.closed_form and not (found.codecs or found.stress):
        parser.error("--closed-form says which head --codecs and --stress teach")
    extra = found.codecs or found.stress
    found.validation = found.validation or found.choose or (extra and not found.test_sessions)
    if extra and found.methods and found.validation and not found.test_sessions:
        say("--codecs and --stress ask the validation sessions, and so do the methods beside them")
    found.orders = found.orders or ([0] if found.quick else [0, 1, 2, 3, 4])
    found.methods = found.methods or ([] if extra else list(registry.NAMES))
    found.out = found.out or Path(f"out/nicv2-{found.protocol}.json")
    return found


def _source(arguments: argparse.Namespace, settings: config.Config) -> streams.Source:
    if arguments.core50 is None:
        return streams.open_objects50(settings, objects50.STREAMS[arguments.stream], arguments.quick)
    return streams.open_core50(settings, arguments.core50, arguments.filelists, arguments.protocol, arguments.orders)


def _facts(arguments: argparse.Namespace, source: streams.Source, workers: int) -> Dict[str, Any]:
    return {
        "command": " ".join(["nicv2.py", *sys.argv[1:]]),
        "machine": harness.machine(),
        "source": source.name,
        "protocol": arguments.protocol,
        "orders": arguments.orders,
        "validation": arguments.validation,
        "asked_sessions": list(source.held(arguments.validation)),
        "classes": len(source.classes),
        "class_names": list(source.classes),
        "quick": arguments.quick,
        "closed_form": arguments.closed_form,
        "workers": workers,
    }


# --- what is run ------------------------------------------------------------------------------------------------------


def _parts(arguments: argparse.Namespace, source: streams.Source, settings: config.Config) -> Iterator[Tuple[str, List[Call]]]:
    """Part of the result -> its runs."""
    if arguments.choose:
        tried = [(name, changes) for name in arguments.methods for changes in registry.GRIDS.get(name, [])]
        yield "choices", [_method_call(arguments, name, order, changes, ask=False) for name, changes in tried for order in arguments.orders]
    elif arguments.methods:
        yield "methods", [_method_call(arguments, name, order, {}) for name in arguments.methods for order in arguments.orders]
    if arguments.codecs:
        width = settings_width(source, arguments)
        rules = nicv2_codecs.RULES[:1] if arguments.closed_form else nicv2_codecs.RULES
        make = nicv2_codecs.features_codec(source.tokens, width // source.tokens, settings.learn.seed)
        planned = nicv2_codecs.cases(make, rules=rules, kinds=arguments.kinds)
        yield "codecs", [_codec_call(arguments, case, order) for case in planned for order in arguments.orders]
    if arguments.stress:
        names = [(name, arguments.protocol) for name in nicv2_stress.NAMES]
        names += [
            ("clean", protocol) for protocol in (79, 196, 391) if protocol != arguments.protocol and isinstance(source, streams.Objects50)
        ]
        yield "stress", [_stress_call(arguments, name, protocol, order) for name, protocol in names for order in arguments.orders]


def settings_width(source: streams.Source, arguments: argparse.Namespace) -> int:
    """F of a feature vector."""
    return int(source.course(arguments.protocol, arguments.orders[0], arguments.validation).features.shape[1])


def _method_call(arguments: argparse.Namespace, name: str, order: int, changes: Dict[str, Any], ask: bool = True) -> Call:
    job = Job(name, order, arguments.protocol, arguments.validation, changes, ask)
    return Call(f"{name}, order {order}", nicv2_run.run, (job,))


def _codec_call(arguments: argparse.Namespace, case: nicv2_codecs.Case, order: int) -> Call:
    title = f"{case.name} {case.kind}, {case.rule}, order {order}"
    return Call(title, nicv2_codecs.run, (case, order, arguments.protocol, arguments.validation, arguments.closed_form))


def _stress_call(arguments: argparse.Namespace, name: str, protocol: int, order: int) -> Call:
    return Call(
        f"{name}, {protocol}, order {order}", nicv2_stress.run, (name, order, protocol, arguments.validation, arguments.closed_form)
    )


def _perform(calls: Sequence[Call], source: streams.Source, settings: config.Config, workers: int) -> List[Dict[str, Any]]:
    """The results, in the order of the calls."""
    found: Dict[int, Dict[str, Any]] = {}
    with bar() as progress:
        task = progress.add_task("runs", total=len(calls))
        for index, result in _results(calls, source, settings, workers):
            found[index] = result
            progress.update(task, advance=1, description=f"{calls[index].title}: {result['accuracy']:.2f} %")
    return [found[index] for index in range(len(calls))]


def _results(calls: Sequence[Call], source: streams.Source, settings: config.Config, workers: int) -> Iterator[Tuple[int, Dict[str, Any]]]:
    """(place, result) as they come."""
    if workers == 1:
        for index, call in enumerate(calls):
            yield index, call.function(*call.arguments, source, settings)
        return
    context = multiprocessing.get_context("spawn")  # a forked torch may hang
    with ProcessPoolExecutor(workers, context, _start_worker, (source, settings)) as pool:
        futures = {pool.submit(_in_worker, call): index for index, call in enumerate(calls)}
        for future in as_completed(futures):
            yield futures[future], future.result()


def _start_worker(source: streams.Source, settings: config.Config) -> None:
    _worker[:] = [(source, settings)]


def _in_worker(call: Call) -> Dict[str, Any]:
    source, settings = _worker[0]
    return call.function(*call.arguments, source, settings)


# --- what comes of it -------------------------------------------------------------------------------------------------


def _grouped(calls: Sequence[Call], runs: Sequence[Dict[str, Any]], key: Callable[[Call], Any]) -> List[Tuple[Any, List[Dict[str, Any]]]]:
    """Runs that differ in nothing but the order, in the order of the calls."""
    groups: List[Tuple[Any, List[Dict[str, Any]]]] = []
    for call, found in zip(calls, runs):
        if not groups or groups[-1][0] != key(call):
            groups.append((key(call), []))
        groups[-1][1].append(found)
    return groups


def _methods(calls: Sequence[Call], runs: Sequence[Dict[str, Any]]) -> Dict[str, Any]:
    return {name: _method_summary(found) for name, found in _grouped(calls, runs, lambda call: call.arguments[0].method)}


def _method_summary(runs: List[Dict[str, Any]]) -> Dict[str, Any]:
    forgot = [run["forgetting"] for run in runs if run["forgetting"] is not None]
    spent = [run["energy"]["per_sample_j"] for run in runs if run["energy"]["per_sample_j"] is not None]
    return {
        "accuracy": mean_std([run["accuracy"] for run in runs]),
        "accuracy_watched": mean_std([run["accuracy_watched"] for run in runs]),
        "per_class": np.mean([run["per_class"] for run in runs], axis=0).round(2).tolist(),
        "forgetting": float(np.mean(forgot)) if forgot else None,
        "bytes": int(np.mean([run["bytes"] for run in runs])),
        "seconds_an_order": float(np.mean([run["learn_s"] + run["settle_s"] for run in runs])),
        "energy": {"per_sample_j": float(np.mean(spent)) if spent else None, "reason": runs[0]["energy"]["reason"]},
        "runs": runs,
    }


def _choices(calls: Sequence[Call], runs: Sequence[Dict[str, Any]]) -> Dict[str, List[Dict[str, Any]]]:
    tried: Dict[str, List[Dict[str, Any]]] = {}
    for (name, changes), found in _grouped(calls, runs, lambda call: (call.arguments[0].method, call.arguments[0].changes)):
        tried.setdefault(name, []).append({"changes": changes, "accuracy": mean_std([run["accuracy"] for run in found])})
    return tried


def _codecs(calls: Sequence[Call], runs: Sequence[Dict[str, Any]]) -> Any:
    groups = _grouped(calls, runs, lambda call: call.arguments[0])
    return [case for case, _ in groups], [found for _, found in groups]


def _stress(calls: Sequence[Call], runs: Sequence[Dict[str, Any]]) -> List[Dict[str, Any]]:
    groups = _grouped(calls, runs, lambda call: (call.arguments[0], call.arguments[2]))
    return [{"name": name, "protocol": protocol, "figures": nicv2_stress.summary(found)} for (name, protocol), found in groups]


_GATHER: Dict[str, Callable[[Sequence[Call], Sequence[Dict[str, Any]]], Any]] = {
    "methods": _methods,
    "choices": _choices,
    "codecs": _codecs,
    "stress": _stress,
}


def _write(arguments: argparse.Namespace, result: Dict[str, Any]) -> int:
    text = nicv2_report.markdown(result)
    harness.save_json(arguments.out, result)
    arguments.out.with_suffix(".md").write_text(text)
    pictures = nicv2_report.plots(result, arguments.out.parent)
    say(text)
    say("Written: " + ", ".join(str(path) for path in (arguments.out, arguments.out.with_suffix(".md"), *pictures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
