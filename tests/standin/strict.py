"""Which names each version of the real tensorrt bindings has, and classes that have no others.

inventory.json: class ("" is the module itself) -> versions -> names; operators.json: what the ONNX parser of each version imports.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Type

VERSIONS = {"8.5": "8.5.2.2", "8.6": "8.6.1", "10": "10.3.0", "11": "11.4.0.106"}
_HERE = Path(__file__).parent


def _words(lines: List[str]) -> List[str]:
    return " ".join(lines).split()


_INVENTORY = {
    kind: {versions: _words(lines) for versions, lines in groups.items()}
    for kind, groups in json.loads((_HERE / "inventory.json").read_text()).items()
}
KINDS = frozenset(_INVENTORY) - {""}


def names(version: str, kind: str = "") -> FrozenSet[str]:
    """The members of a class, or of the module, in this version; none where the class is not among those recorded."""
    groups = _INVENTORY.get(kind, {})
    return frozenset(name for versions, found in groups.items() if version in versions.split() for name in found)


def operators(table: str) -> FrozenSet[str]:
    """The ONNX operators that the parser of 8.5-GA, 8.6-GA, 10.1-GA or main, the newest, imports."""
    return frozenset(_words(json.loads((_HERE / "operators.json").read_text())[table]))


def strict(implementation: Type[Any], version: str) -> Type[Any]:
    """The class with exactly this version's members: others can be neither read nor set, and what is not imitated says so."""
    kind = implementation.__name__
    allowed = names(version, kind)

    def check(name: str) -> None:
        if not name.startswith("_") and name not in allowed:
            raise AttributeError(f"'tensorrt.tensorrt.{kind}' object has no attribute '{name}' in TensorRT {version}")

    def read(self: Any, name: str) -> Any:
        check(name)
        if not name.startswith("_") and not hasattr(implementation, name):
            raise NotImplementedError(f"the stand-in has no {kind}.{name}")
        return object.__getattribute__(self, name)

    def write(self: Any, name: str, value: Any) -> None:
        check(name)
        object.__setattr__(self, name, value)

    members: Dict[str, Any] = {"__getattribute__": read, "__setattr__": write, "_version": version}
    return type(kind, (implementation,), members)


class Value:
    """One value of an enumeration; equal to itself only."""

    def __init__(self, kind: str, name: str, number: int) -> None:
        self._kind, self.name, self._number = kind, name, number

    def __int__(self) -> int:
        return self._number

    def __repr__(self) -> str:
        return f"<{self._kind}.{self.name}: {self._number}>"


def enumeration(kind: str, version: str) -> Type[Any]:
    """The enumeration with this version's values."""
    values = sorted(names(version, kind) - {"name", "value", "itemsize"})
    return type(kind, (), {name: Value(kind, name, number) for number, name in enumerate(values)})
