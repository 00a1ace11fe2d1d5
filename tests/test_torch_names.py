"""Every name of torch that latentd uses is one that torch 2.0 has, as NVIDIA built it for JetPack 5.

Methods and attributes of tensors and modules are not seen, since a syntax tree does not tell whose they are.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Dict, Iterator, Optional, Set, Tuple

PACKAGE = Path(__file__).parents[1] / "daemon" / "latentd"
LIST = Path(__file__).with_name("torch_2_0.txt")


def in_torch_2_0() -> Set[str]:
    """The public names of torch 2.0.1, module by module; a line that is indented goes on with the one above."""
    text = LIST.read_text(encoding="utf-8").replace("\n ", " ")
    found = {}
    for line in text.splitlines():
        module, names = line.split(":", 1)
        found[module] = names.split()
    return set(found) | {f"{module}.{name}" for module, names in found.items() for name in names}


def bound(tree: ast.Module) -> Iterator[Tuple[str, str]]:
    """Each name that an import binds to torch or to a part of it, and what it stands for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield (alias.asname, alias.name) if alias.asname else ("torch", "torch")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            yield from ((alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names)


def dotted(node: ast.AST, names: Dict[str, str]) -> Optional[str]:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    owner = dotted(node.value, names) if isinstance(node, ast.Attribute) else None
    return f"{owner}.{node.attr}" if owner and isinstance(node, ast.Attribute) else None


def used(source: str) -> Set[str]:
    tree = ast.parse(source)
    names = dict(bound(tree))
    found = {dotted(node, names) for node in ast.walk(tree) if isinstance(node, (ast.Name, ast.Attribute))}
    return {_class_of(name) for name in found | set(names.values()) if name}


def _class_of(name: str) -> str:
    """torch.nn.Module.__init__ -> torch.nn.Module: what a class has is not listed."""
    parts = name.split(".")
    classes = [at for at, each in enumerate(parts) if each[:1].isupper()]
    return ".".join(parts[: classes[0] + 1]) if classes else name


def test_names_are_found_however_torch_was_imported() -> None:
    source = "import torch\nimport torch.nn.functional as F\nfrom torch import nn, cat\nF.gelu(nn.Linear(1, torch.cuda.device_count()))"
    assert used(source) == {
        "torch",
        *("torch.nn", "torch.nn.functional", "torch.nn.functional.gelu", "torch.nn.Linear"),
        *("torch.cat", "torch.cuda", "torch.cuda.device_count"),
    }


def test_the_list_is_that_of_torch_2_0() -> None:
    names = in_torch_2_0()
    assert {
        "torch.inference_mode",
        "torch.compile",
        "torch.nn.functional.scaled_dot_product_attention",
        "torch.cuda.OutOfMemoryError",
    } < names
    assert not {"torch.export", "torch.nn.attention", "torch.nn.RMSNorm", "torch.get_default_device"} & names, "they came later"


def test_torch_2_0_has_every_name_that_is_used() -> None:
    has = in_torch_2_0()
    every = {name for path in PACKAGE.rglob("*.py") for name in used(path.read_text(encoding="utf-8"))}
    assert len(every) > 20
    assert sorted(every - has) == []
