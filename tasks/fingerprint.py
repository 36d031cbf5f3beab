"""The code fingerprint: which definitions of `omni_model` a stage reaches, and a hash of each.

The unit is the symbol: a function, class or constant at the top level of a module. From a stage's entry
point every name is followed through imports to the symbols it stands for; a name that leads to a module as
a whole takes in all of it. A symbol's hash covers its syntax tree without positions, comments, docstrings
and formatting, so only a change of meaning changes it, and the same source gives the same hash under every
Python. Data files opened through `Path(__file__).with_name("...")` count by their bytes.

Left out on purpose: what every room shares (`NEUTRAL`). What it carries is either in the recipe or must not
count. Nothing here imports what it reads.
"""

import ast
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from omni_model.artifacts import sha256_file, sha256_text, write_atomically

PACKAGE = "omni_model"
NEUTRAL = frozenset(
    ("config", "plain", "artifacts", "storage", "hardware", "telemetry", "downloads", "outside")
)
BODY = ""  # the symbol name of a module's own statements: what runs at import besides definitions


@dataclass
class Symbol:
    """One top-level definition: hashes of its statements, the names it uses, and imports inside it."""

    hashes: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    imports: dict[str, str] = field(default_factory=dict)
    data_files: list[str] = field(default_factory=list)


@dataclass
class Module:
    """The symbols of one module, and what its import statements bind: name -> `module` or `module:name`."""

    symbols: dict[str, Symbol]
    imports: dict[str, str]


def serialise(node: ast.AST) -> list[object]:
    """A syntax tree as nested lists of type and field names, without whatever carries no meaning."""
    plain: list[object] = [type(node).__name__]
    for name, value in ast.iter_fields(node):
        if name in ("ctx", "kind", "type_comment") or value is None or value == []:
            continue
        if isinstance(node, ast.Constant):
            literal = value if isinstance(value, str) else repr(value)
            plain.append([type(value).__name__, literal])
        elif isinstance(value, list):
            kept = [v for v in value if not _is_docstring(v) and not _is_empty_text(v, node)]
            plain.append([name, [serialise(v) if isinstance(v, ast.AST) else v for v in kept]])
        else:
            plain.append([name, serialise(value) if isinstance(value, ast.AST) else value])
    return plain


def _is_docstring(node: object) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _is_empty_text(node: object, parent: ast.AST) -> bool:
    """An empty piece of an f-string: Python 3.12.1 has one after a nested format, other releases have not."""
    return isinstance(parent, ast.JoinedStr) and isinstance(node, ast.Constant) and node.value == ""


def read_module(source: str) -> Module:
    """The symbols and imports of a module's source."""
    module = Module(symbols={}, imports={})
    for node in ast.parse(source).body:
        if _is_docstring(node):
            continue
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module.imports.update(_bindings(node))
            continue
        names = _defined_names(node)
        for name in names or [BODY]:
            _add(module.symbols.setdefault(name, Symbol()), node)
        if not names:  # an import inside `if` or `try` binds a name for the whole module
            module.imports.update(module.symbols[BODY].imports)
    return module


def _defined_names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return [node.name]
    targets: list[ast.expr] = []
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, (ast.AnnAssign, ast.AugAssign)):
        targets = [node.target]
    names = [leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)]
    plain = all(isinstance(target, (ast.Name, ast.Tuple)) for target in targets)
    return names if plain else []


def _add(symbol: Symbol, node: ast.stmt) -> None:
    text = json.dumps(serialise(node), separators=(",", ":"))
    symbol.hashes.append(sha256_text(text)[:16])
    symbol.names = sorted({*symbol.names, *_names(node)})
    for part in ast.walk(node):
        if isinstance(part, (ast.Import, ast.ImportFrom)):
            symbol.imports.update(_bindings(part))
        if isinstance(part, ast.Call) and (data_file := _data_file(part)):
            symbol.data_files.append(data_file)


def _names(node: ast.AST) -> Iterator[str]:
    """Every name a tree uses, with the attributes taken from it: `a.b.c` once, not `a` and `a.b` as well."""
    if isinstance(node, (ast.Name, ast.Attribute)) and (dotted := _dotted(node)):
        yield dotted
        return
    for child in ast.iter_child_nodes(node):
        yield from _names(child)


def _bindings(node: ast.Import | ast.ImportFrom) -> dict[str, str]:
    if any(alias.name == "*" for alias in node.names):
        raise ValueError(f"line {node.lineno}: import names, not *, so that it can be seen which are used")
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name: f"{node.module}:{alias.name}" for alias in node.names}
    return {
        alias.asname or alias.name.split(".")[0]: alias.name if alias.asname else alias.name.split(".")[0]
        for alias in node.names
    }


def _dotted(node: ast.AST) -> str:
    """`a.b.c` for a chain of attributes that starts at a name, else nothing."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _data_file(call: ast.Call) -> str:
    """The file name in `Path(__file__).with_name("name")`."""
    function = call.func
    if not (isinstance(function, ast.Attribute) and function.attr == "with_name"):
        return ""
    if not any(isinstance(part, ast.Name) and part.id == "__file__" for part in ast.walk(function.value)):
        return ""
    argument = call.args[0] if call.args else None
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        return argument.value
    raise ValueError(
        f"line {call.lineno}: name the file next to the code literally, so that its bytes can count"
    )


def _stamp(path: Path) -> list[int]:
    stat = path.stat()
    return [stat.st_mtime_ns, stat.st_size, stat.st_ino]


class CodeBase:
    """Modules of the package below `root`, parsed at most once per change of a file.

    Args:
        root: the directory that holds `omni_model/`.
        memo: a file to keep what was parsed between processes; optional.
    """

    def __init__(self, root: Path, memo: Path | None = None) -> None:
        self._root = root
        self._memo = memo
        self._modules: dict[str, Module | None] = {}
        self._paths: dict[str, Path | None] = {}
        self._remembered = self._load_memo()
        self._parsed_anew = False

    def fingerprint(self, entrypoint: str) -> dict[str, str]:
        """`module.symbol` -> hash of everything the entry point `module:function` reaches."""
        found: dict[str, str] = {}
        module, _, name = entrypoint.partition(":")
        waiting = [(module, name)]
        seen = set(waiting)
        while waiting:
            module, name = waiting.pop()
            symbol = self._symbol(module, name)
            found.update(self._hashes(module, name, symbol))
            for reached in self._reached(module, symbol):
                if reached not in seen:
                    seen.add(reached)
                    waiting.append(reached)
        self._save_memo()
        return dict(sorted(found.items()))

    def _symbol(self, module: str, name: str) -> Symbol:
        loaded = self._module(module)
        if loaded is None or (name != BODY and name not in loaded.symbols):
            raise ValueError(f"{module} defines no {name!r}")
        return loaded.symbols.get(name, Symbol())

    def _hashes(self, module: str, name: str, symbol: Symbol) -> Iterator[tuple[str, str]]:
        label = f"{module.removeprefix(PACKAGE + '.')}.{name or '(module)'}"
        if symbol.hashes:
            yield label, hashlib.sha256("".join(symbol.hashes).encode()).hexdigest()[:16]
        for data_file in symbol.data_files:
            path = self._path(module)
            assert path is not None
            yield data_file, sha256_file(path.with_name(data_file))[:16]

    def _reached(self, module: str, symbol: Symbol) -> Iterator[tuple[str, str]]:
        yield (module, BODY)
        parts = module.split(".")
        yield from ((".".join(parts[:i]), BODY) for i in range(1, len(parts)))
        loaded = self._module(module)
        assert loaded is not None
        for dotted in symbol.names:
            head, *rest = dotted.split(".")
            target = symbol.imports.get(head) or loaded.imports.get(head)
            if target is not None:
                yield from self._follow(target, rest)
            elif head in loaded.symbols:
                yield (module, head)

    def _follow(self, target: str, rest: list[str]) -> Iterator[tuple[str, str]]:
        """The symbols behind an imported name and the attributes taken from it."""
        module, _, name = target.partition(":")
        rest = [name, *rest] if name else rest
        if module.split(".")[0] != PACKAGE:
            return
        while rest and self._path(f"{module}.{rest[0]}"):
            module, *rest = f"{module}.{rest[0]}", *rest[1:]
        if module.removeprefix(f"{PACKAGE}.").split(".")[0] in NEUTRAL:
            return
        loaded = self._module(module)
        if loaded is None:
            return
        if rest and rest[0] in loaded.symbols:
            yield (module, rest[0])
        elif rest and rest[0] in loaded.imports:
            yield from self._follow(loaded.imports[rest[0]], rest[1:])
        else:
            yield from ((module, symbol) for symbol in loaded.symbols)

    def _path(self, module: str) -> Path | None:
        if module not in self._paths:
            base = self._root.joinpath(*module.split("."))
            places = (base.with_suffix(".py"), base / "__init__.py")
            self._paths[module] = next((path for path in places if path.exists()), None)
        return self._paths[module]

    def _module(self, name: str) -> Module | None:
        if name not in self._modules:
            path = self._path(name)
            self._modules[name] = self._parse(path) if path else None
        return self._modules[name]

    def _parse(self, path: Path) -> Module:
        stamp = _stamp(path)
        known = self._remembered.get(str(path))
        if known and known["stamp"] == stamp:
            symbols = {name: Symbol(**symbol) for name, symbol in known["symbols"].items()}
            return Module(symbols, known["imports"])
        try:
            module = read_module(path.read_text())
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        self._remembered[str(path)] = {"stamp": stamp, **asdict(module)}
        self._parsed_anew = True
        return module

    def _load_memo(self) -> dict[str, dict]:  # type: ignore[type-arg]
        try:
            memo = json.loads(self._memo.read_text()) if self._memo else {}
            return dict(memo["modules"]) if memo["walker"] == _stamp(Path(__file__)) else {}
        except (OSError, ValueError, KeyError, TypeError):  # a memo only saves time
            return {}

    def _save_memo(self) -> None:
        if self._memo and self._parsed_anew:
            write_atomically(
                self._memo, json.dumps({"walker": _stamp(Path(__file__)), "modules": self._remembered})
            )
            self._parsed_anew = False
