"""The rules that hold the code together, read from its syntax trees: who may import whom, and what may stand where."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path
from typing import Iterator, List, NamedTuple, Set, Tuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "daemon" / "latentd"
MAX_LINES = 400

# A part may import from itself, from parts of a lower rank, and from config and errors; parts of one rank do not know each other.
RANK = {
    "": 0,
    "config": 0,
    "configtext": 0,
    "files": 0,
    "headroom": 0,
    "trouble": 0,
    "errors": 0,
    "vision": 1,
    "engines": 2,
    "energy": 2,
    "replay": 3,
    "learning": 4,
    "service": 5,
    "cli": 6,
    "__main__": 7,
}
TORCH = ("learning/", "engines/", "vision/vit.py")
HTTP = {"fastapi", "starlette", "uvicorn", "httpx", "http", "urllib", "multipart", "python_multipart"}
HTTP_PARTS = ("service/", "cli/")
# The borders where anything may arrive, and how many broad excepts each file needs for it.
BORDERS = {
    "service/security.py": 1,  # a request
    "service/pipeline.py": 2,  # an image of a request; a result or failure handed to the one who awaits it
    "service/batcher.py": 2,  # a batch in the engine; the end of the inference thread, announced before the process ends
    "engines/upgrade.py": 1,  # a better engine, built beside the one that serves
    "learning/learner.py": 1,  # a learner step
    "energy/meter_thread.py": 1,  # a meter tick
    "energy/meters/choose.py": 1,  # one candidate of several meters: a driver's library may raise anything while it is loaded
}


class Import(NamedTuple):
    importer: str  # path inside the package
    line: int
    module: str  # dotted, absolute


def sources() -> List[str]:
    return sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def tree(name: str) -> ast.Module:
    """The file's syntax tree as Python 3.8 reads it."""
    return ast.parse((PACKAGE / name).read_text(encoding="utf-8"), name, feature_version=(3, 8))


def imports(name: str, node: ast.AST) -> Iterator[Import]:
    for found in ast.walk(node):
        if isinstance(found, ast.Import):
            yield from (Import(name, found.lineno, alias.name) for alias in found.names)
        elif isinstance(found, ast.ImportFrom):
            assert found.level == 0, f"{name}:{found.lineno}: a relative import hides which part it reaches"
            yield from (Import(name, found.lineno, f"{found.module}.{alias.name}") for alias in found.names)


def every_import() -> List[Import]:
    return [found for name in sources() for found in imports(name, tree(name))]


def part(dotted: str) -> str:
    """latentd.vision.vit -> vision; latentd.__version__ and latentd itself -> ""."""
    name = [*dotted.split("."), ""][1]
    return name if name in RANK else ""


def upward(found: Import) -> bool:
    here, there = found.importer.split("/")[0].replace(".py", "").replace("__init__", ""), part(found.module)
    return here != there and RANK[there] >= RANK[here] and not (RANK[here] == RANK[there] == 0)


def outside(found: Import, names: Set[str], allowed: Tuple[str, ...]) -> bool:
    parts = found.module.split(".")
    return (parts[0] in names or parts[:2] == ["safetensors", "torch"]) and not found.importer.startswith(allowed)


def test_every_part_of_the_package_has_a_rank() -> None:
    parts = {name.split("/")[0].replace(".py", "").replace("__init__", "") for name in sources()}
    assert parts <= set(RANK)


def test_imports_point_down_only() -> None:
    assert [found for found in every_import() if found.module.split(".")[0] == "latentd" and upward(found)] == []


def test_torch_is_imported_only_where_tensors_live() -> None:
    assert [found for found in every_import() if outside(found, {"torch"}, TORCH)] == []


def test_nothing_below_the_service_knows_http() -> None:
    assert [found for found in every_import() if found.module.split(".")[0] in HTTP and not found.importer.startswith(HTTP_PARTS)] == []


@pytest.mark.parametrize("statement", ["import torch", "from torch import nn", "from safetensors.torch import load_file"])
def test_a_torch_import_in_the_service_would_be_found(statement: str) -> None:
    (found,) = imports("service/app.py", ast.parse(statement))
    assert outside(found, {"torch"}, TORCH)


@pytest.mark.parametrize(
    ("importer", "statement"),
    [
        ("vision/vit.py", "from latentd.engines import stage"),
        ("engines/onnx.py", "from latentd.energy.ledger import EnergyLedger"),
        ("config.py", "import latentd.vision.images"),
        ("service/app.py", "from latentd import cli"),
    ],
)
def test_an_import_that_points_up_or_aside_would_be_found(importer: str, statement: str) -> None:
    (found,) = imports(importer, ast.parse(statement))
    assert upward(found)


def test_only_the_command_line_prints() -> None:
    printing = [
        f"{name}:{node.lineno}"
        for name in sources()
        for node in ast.walk(tree(name))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print" and not name.startswith("cli/")
    ]
    assert printing == []


def broad(node: ast.AST) -> bool:
    """Catches or suppresses everything."""
    if isinstance(node, ast.ExceptHandler):
        caught = [node.type] if not isinstance(node.type, ast.Tuple) else node.type.elts
        return any(kind is None or (isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"}) for kind in caught)
    if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "suppress":
        return any(isinstance(kind, ast.Name) and kind.id in {"Exception", "BaseException"} for kind in node.args)
    return False


def test_broad_excepts_stand_only_at_the_borders() -> None:
    counted = {name: sum(broad(node) for node in ast.walk(tree(name))) for name in sources()}
    assert {name: count for name, count in counted.items() if count} == BORDERS


@pytest.mark.parametrize(
    "handler",
    [
        "except Exception: pass",
        "except: pass",
        "except (ValueError, BaseException) as cause: pass",
        "finally:\n with contextlib.suppress(Exception): pass",
    ],
)
def test_a_broad_except_would_be_found(handler: str) -> None:
    assert sum(broad(node) for node in ast.walk(ast.parse(f"try: pass\n{handler}"))) == 1


def test_every_module_postpones_its_annotations_and_says_what_it_is_for() -> None:
    for name in sources():
        module = tree(name)
        assert ast.get_docstring(module), f"{name} has no docstring"
        future = any(found.module == "__future__.annotations" for found in imports(name, module))
        assert future or len(module.body) == 1 or name == "__init__.py", f"{name} lacks from __future__ import annotations"


def evaluated(module: ast.Module) -> bool:
    """Whether pydantic, FastAPI or typer will evaluate this module's annotations, on Python 3.8 too."""
    return any(found.module.split(".")[0] in {"pydantic", "fastapi", "typer"} for found in imports("", module))


def hints(module: ast.Module) -> Iterator[ast.expr]:
    for node in ast.walk(module):
        if isinstance(node, (ast.arg, ast.AnnAssign)) and node.annotation is not None:
            yield node.annotation
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns is not None:
            yield node.returns


def newer_than_3_8(hint: ast.expr) -> bool:
    builtins = {"list", "dict", "tuple", "set", "frozenset", "type"}
    return any(
        (isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr))
        or (isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id in builtins)
        for node in ast.walk(hint)
    )


@pytest.mark.parametrize("source", ["x: int | None = 1", "def f(x: list[int]): pass", "def f() -> Optional[dict[str, int]]: pass"])
def test_an_annotation_too_new_for_python_3_8_would_be_found(source: str) -> None:
    (hint,) = hints(ast.parse(source))
    assert newer_than_3_8(hint)


def test_annotations_that_are_evaluated_can_be_evaluated_by_python_3_8() -> None:
    new = [f"{name}:{hint.lineno}" for name in sources() if evaluated(tree(name)) for hint in hints(tree(name)) if newer_than_3_8(hint)]
    assert new == []


def tracked() -> List[Path]:
    """What git has or would take; the test is skipped in a tree without git."""
    answer = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    if answer.returncode != 0:
        pytest.skip("not a git checkout")
    return [ROOT / line for line in answer.stdout.decode().splitlines() if (ROOT / line).is_file()]


def test_files_stay_short_enough_to_read() -> None:
    lengths = {path.relative_to(ROOT).as_posix(): len(path.read_bytes().splitlines()) for path in tracked() if path.suffix == ".py"}
    assert {name: length for name, length in lengths.items() if length > MAX_LINES} == {}


def test_no_file_names_the_place_where_it_was_written_or_a_registry_host() -> None:
    # Put together here, so that this file does not find itself.
    places = ["/" + r"work(?![\w-])", r"\.\./" + "shared", "shared" + r"/(facts|DESIGN|API|STYLE)"]
    hosts = ["py" + r"pi\.org", "python" + "hosted", r"registry\.npm" + "js"]
    wanted = re.compile("|".join(rf"(?<![\w.}}\"$]){place}" for place in places + hosts))
    named = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1)
        if wanted.search(line)
    ]
    assert named == []
