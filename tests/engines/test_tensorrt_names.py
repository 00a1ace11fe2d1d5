"""Every TensorRT name in latentd's source exists in the versions for which its branch runs: read from the syntax trees.

The code tells versions apart by `hasattr` alone. A walk over each function keeps the set of versions that can be there: the body of
`if hasattr(X, "name")` belongs to those where X's class has the name, its else to the others; a function belongs to the versions of its
callers. What a value is follows from its name: a call of the stand-in's life fails where that is wrong.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, FrozenSet, Iterator, List, NamedTuple, Optional, Set, Tuple

import pytest

from latentd import engines
from standin.strict import KINDS, VERSIONS, names

ALL = frozenset(VERSIONS)
FOLDER = Path(engines.__file__).parent
SOURCES = ("tensorrt.py", "tensorrt_build.py", "calibrating.py")
MODULE = ""
# What a variable or attribute of this name holds, in those files.
HELD = {
    "trt": MODULE,
    "builder": "Builder",
    "network": "INetworkDefinition",
    "config": "IBuilderConfig",
    "parser": "OnnxParser",
    "layer": "ILayer",
    "profile": "IOptimizationProfile",
    "cache": "ITimingCache",
    "engine": "ICudaEngine",
    "_engine": "ICudaEngine",
    "_context": "IExecutionContext",
    "_runtime": "Runtime",
}
# What a call of this member gives; the rest gives values of Python's own.
GIVEN = {"get_layer": "ILayer", "get_output": "ITensor", "get_input": "ITensor"}
# Ours or Python's, though TensorRT has members of these names as well.
OWN = {"name", "shape", "engine", "log", "errors", "path", "serialize", "parse", "reset", "precision"}
OURS = {"self", "log", "key"}


class Use(NamedTuple):
    where: str
    kind: str
    name: str
    versions: FrozenSet[str]

    def missing(self) -> FrozenSet[str]:
        return frozenset(version for version in self.versions if self.name not in names(version, self.kind))


def kind_of(node: ast.expr) -> Optional[str]:
    """The class of an expression ("" for the module), None where it is nothing of TensorRT's."""
    if isinstance(node, ast.Name):
        return HELD.get(node.id)
    if isinstance(node, ast.Attribute):
        if isinstance(node.value, ast.Name) and node.value.id == "self":
            return HELD.get(node.attr)
        return node.attr if kind_of(node.value) == MODULE and node.attr in KINDS else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        owner = kind_of(node.func.value)
        if owner == MODULE:
            return node.func.attr if node.func.attr in KINDS else None
        return GIVEN.get(node.func.attr) if owner else None
    return None


class Walk:
    """One file: the uses of TensorRT's names and, of each of its functions, the versions that reach it."""

    def __init__(self, source: str, where: str) -> None:
        tree = ast.parse(source)
        self.where = where
        self.functions: Dict[str, List[ast.FunctionDef]] = {}  # several classes have an __init__; nested ones belong to theirs
        for node in [inner for outer in tree.body for inner in (outer.body if isinstance(outer, ast.ClassDef) else [outer])]:
            if isinstance(node, ast.FunctionDef):
                self.functions.setdefault(node.name, []).append(node)
        self.reached: Dict[str, Set[str]] = {}
        self.uses: Set[Use] = set()
        self.unknown: Set[str] = set()
        inside = [node for functions in self.functions.values() for function in functions for node in ast.walk(function)]
        called = {node.func.id for node in inside if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
        for name in set(self.functions) - called:  # methods, main, and what other files call
            self.enter(name, ALL)

    def enter(self, name: str, versions: FrozenSet[str]) -> None:
        known = self.reached.setdefault(name, set())
        if not versions <= known:
            known |= versions
            for function in self.functions[name]:
                self.block(function.body, versions)

    def block(self, body: List[ast.stmt], versions: FrozenSet[str]) -> None:
        for statement in body:
            if isinstance(statement, ast.If):
                inside, outside = self.test(statement.test, versions)
                self.block(statement.body, inside)
                self.block(statement.orelse, outside)
                if isinstance(statement.body[-1], (ast.Return, ast.Raise)):
                    versions = outside
                continue
            if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                for base in getattr(statement, "bases", ()):
                    self.expression(base, versions)
                self.block(statement.body, versions)
                continue
            for inner in ast.iter_child_nodes(statement):
                if isinstance(inner, ast.expr):
                    self.expression(inner, versions)
            for part in ("body", "orelse", "finalbody"):
                self.block(getattr(statement, part, []), versions)
            for handler in getattr(statement, "handlers", ()):
                self.block(handler.body, versions)

    def test(self, condition: ast.expr, versions: FrozenSet[str]) -> Tuple[FrozenSet[str], FrozenSet[str]]:
        """The versions for which the condition can be true, and those for which it can be false."""
        if isinstance(condition, ast.BoolOp) and isinstance(condition.op, ast.And):
            inside, sure = versions, True
            for value in condition.values:
                inside, outside = self.test(value, inside)
                sure = sure and not outside & inside
            return inside, versions if len(condition.values) > 1 else versions - inside
        if isinstance(condition, ast.UnaryOp) and isinstance(condition.op, ast.Not):
            inside, outside = self.test(condition.operand, versions)
            return outside, inside
        asked = self.asked(condition)
        if asked is not None:
            kind, name = asked
            have = frozenset(version for version in versions if name in names(version, kind))
            return have, versions - have
        self.expression(condition, versions)
        return versions, versions

    def asked(self, node: ast.expr) -> Optional[Tuple[str, str]]:
        """The class and the name of `hasattr(X, "name")` on something of TensorRT's."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"):
            return None
        kind, name = kind_of(node.args[0]), node.args[1]
        assert kind is not None, f"{self.where}:{node.lineno}: hasattr of something unknown"
        assert isinstance(name, ast.Constant)
        return kind, str(name.value)

    def expression(self, node: ast.expr, versions: FrozenSet[str]) -> None:
        for found in ast.walk(node):
            if isinstance(found, ast.Attribute):
                self.attribute(found, versions)
            elif isinstance(found, ast.Call) and isinstance(found.func, ast.Name) and found.func.id in self.functions:
                self.enter(found.func.id, versions)

    def attribute(self, node: ast.Attribute, versions: FrozenSet[str]) -> None:
        kind = kind_of(node.value)
        if kind is not None and node.attr != "__init__":  # every class has that one
            self.uses.add(Use(f"{self.where}:{node.lineno}", kind, node.attr, versions))
        elif kind is None and node.attr in MEMBERS - OWN and not (isinstance(node.value, ast.Name) and node.value.id in OURS):
            self.unknown.add(f"{self.where}:{node.lineno}: {node.attr} of what?")


MEMBERS = frozenset(name for kind in KINDS for version in ALL for name in names(version, kind))


def walked(file: str, old: str = "", new: str = "") -> Walk:
    source = (FOLDER / file).read_text(encoding="utf-8")
    assert old in source
    return Walk(source.replace(old, new, 1), file)


def wrong(walk: Walk) -> List[str]:
    return sorted(
        f"{use.where}: {use.kind or 'tensorrt'}.{use.name} is not in {sorted(use.missing())}" for use in walk.uses if use.missing()
    )


@pytest.mark.parametrize("file", SOURCES)
def test_every_name_exists_in_every_version_that_comes_by(file: str) -> None:
    walk = walked(file)
    assert wrong(walk) == []
    assert sorted(walk.unknown) == []


def test_the_walk_sees_what_the_code_does() -> None:
    found = {(use.kind, use.name) for file in SOURCES for use in walked(file).uses}
    assert {
        ("Runtime", "deserialize_cuda_engine"),
        ("IExecutionContext", "execute_async_v3"),
        ("ICudaEngine", "num_io_tensors"),
        ("ITensor", "dtype"),
        ("BuilderFlag", "OBEY_PRECISION_CONSTRAINTS"),
        ("IBuilderConfig", "progress_monitor"),
        ("", "IProgressMonitor"),
        ("", "IInt8EntropyCalibrator2"),
        ("IBuilderConfig", "int8_calibrator"),
        ("IBuilderConfig", "set_calibration_profile"),
        ("Builder", "platform_has_fast_int8"),
        ("ILogger", "INTERNAL_ERROR"),
    } <= found


def test_every_function_that_uses_tensorrt_is_reached() -> None:
    for file in SOURCES:
        walk = walked(file)
        assert set(walk.functions) == set(walk.reached), file


@pytest.mark.parametrize(
    ("file", "old", "new", "missing"),
    [
        ("tensorrt.py", "execute_async_v3", "execute_async_v4", "IExecutionContext.execute_async_v4 is not in ['10', '11', '8.5', '8.6']"),
        ("tensorrt.py", "engine.num_io_tensors", "engine.num_bindings", "ICudaEngine.num_bindings is not in ['10', '11']"),
        ("tensorrt.py", "trt.float32", "trt.int64", "tensorrt.int64 is not in ['8.5', '8.6']"),
        (
            "tensorrt_build.py",
            "config.set_memory_pool_limit(",
            "config.builder_optimization_level = int(",
            "IBuilderConfig.builder_optimization_level is not in ['8.5']",
        ),
        (
            "tensorrt_build.py",
            "config.set_flag(trt.BuilderFlag.FP16)",
            "config.set_flag(trt.BuilderFlag.BF16)",
            "BF16 is not in ['8.5', '8.6']",
        ),
        (
            "tensorrt_build.py",
            'if order.key.precision != "fp32" and hasattr(trt.BuilderFlag, "FP16"):',
            'if order.key.precision != "fp32":',
            "Builder.platform_has_fast_fp16 is not in ['11']",
        ),
        (
            "tensorrt_build.py",
            'if order.key.precision == "int8" and hasattr(trt.BuilderFlag, "INT8"):',
            'if order.key.precision == "int8":',
            "Builder.platform_has_fast_int8 is not in ['11']",
        ),
        (
            "calibrating.py",
            'if not hasattr(trt, "IInt8EntropyCalibrator2"):',
            "if not len(images):",
            "tensorrt.IInt8EntropyCalibrator2 is not in ['11']",
        ),
        (
            "tensorrt_build.py",
            'if hasattr(config, "progress_monitor"):',
            "if order.fresh:",
            "tensorrt.IProgressMonitor is not in ['8.5', '8.6']",
        ),
        ("tensorrt_build.py", "layer.precision = ", "layer.presicion = ", "ILayer.presicion is not in ['10', '8.5', '8.6']"),
        ("tensorrt_build.py", "layer.get_output(each).dtype", "layer.get_output(each).dtyp", "ITensor.dtyp is not in ['10', '8.5', '8.6']"),
    ],
)
def test_a_name_that_a_version_lacks_would_be_found(file: str, old: str, new: str, missing: str) -> None:
    assert any(missing in line for line in wrong(walked(file, old, new)))


def test_a_value_that_the_walk_does_not_know_would_be_found() -> None:
    walk = walked("tensorrt_build.py", "plan = builder.build_serialized_network", "plan = smith.build_serialized_network")
    assert [line.split(": ")[1] for line in walk.unknown] == ["build_serialized_network of what?"]


def uses_of_tensorrt() -> Iterator[str]:
    for path in FOLDER.parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import) and any(alias.name == "tensorrt" for alias in node.names):
                yield path.relative_to(FOLDER).as_posix()


def test_no_other_file_uses_tensorrt_but_for_its_version() -> None:
    assert set(uses_of_tensorrt()) == {"tensorrt.py", "tensorrt_build.py", "compiling.py"}
    tree = ast.parse((FOLDER / "compiling.py").read_text(encoding="utf-8"))
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and ast.dump(node.value) == ast.dump(ast.Name("tensorrt", ast.Load()))
    }
    assert used == {"__version__"}
