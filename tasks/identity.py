"""The key of a stage: what would have to change for its result to change.

A key is the sha256 of the canonical JSON of its *components*: the stage's name, the recipe, the content
digests of the inputs (never where they lie), the code it reaches, the versions of the packages that matter,
and the seed where the stage draws random numbers. Components are stored in the manifest, so that any two
keys can be compared in words.
"""

import functools
import hashlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from omni_model.artifacts import canonical_json, sha256_text
from omni_model.config import BadInput
from omni_model.plain import identity
from tasks.fingerprint import CodeBase
from tasks.stage import Stage

EXTRAS = {"espeakng-loader": "espeak"}  # distributions that only an optional extra installs


@dataclass(frozen=True)
class Identity:
    """A key and what it was made of."""

    key: str
    components: dict[str, Any]
    seed: int


class Identifier:
    """Computes keys for one run.

    Args:
        code: the source tree whose definitions count.
        seed: the run's seed; each stage draws from its own, derived by name.
        version: installed version of a distribution; another function only in tests.
    """

    def __init__(
        self, code: CodeBase, seed: int, version: Callable[[str], str] = importlib.metadata.version
    ) -> None:
        self._code = code
        self._seed = seed
        self._version = functools.cache(version)
        self._components: dict[str, dict[str, Any]] = {}

    def identify(self, stage: Stage, recipe: Any, digests: dict[str, str | None]) -> Identity:
        """The stage's key for this recipe and these inputs (name -> content digest, None while unknown)."""
        seed = derive_seed(self._seed, stage.name)
        components = self._own(stage) | {"recipe": identity(recipe), "inputs": digests}
        if stage.seeded:
            components["seed"] = seed
        return Identity(sha256_text(canonical_json(components)), components, seed)

    def _own(self, stage: Stage) -> dict[str, Any]:
        if stage.name not in self._components:
            self._components[stage.name] = {
                "stage": stage.name,
                "code": self._code.fingerprint(stage.entrypoint),
                "packages": {name: self._release(name) for name in stage.packages}
                | {name: self._installed(name) for name in stage.exact_packages},
            }
        return self._components[stage.name]

    def _release(self, package: str) -> str:
        """major.minor, without the part after `+` that only says how it was built."""
        return ".".join(self._installed(package).split("+")[0].split(".")[:2])

    def _installed(self, package: str) -> str:
        try:
            return self._version(package)
        except importlib.metadata.PackageNotFoundError:
            wanted = f"nanochat-omni[{EXTRAS[package]}]" if package in EXTRAS else package
            raise BadInput(f"the package {package} is not installed; run: pip install '{wanted}'") from None


def derive_seed(seed: int, name: str) -> int:
    """A 63-bit seed for one purpose, by hash, so that no two purposes share random numbers."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """In words, what the `new` components have that the `old` ones had not, most telling first."""
    words = [
        f"{n} {_short(b)} -> {_short(a)}"
        for n, b, a in _changes(_leaves(old["recipe"]), _leaves(new["recipe"]))
    ]
    words += [f"input {name} has other bytes" for name, _, _ in _changes(old["inputs"], new["inputs"])]
    for name, before, after in _changes(old["code"], new["code"]):
        words.append(f"{name} {'is new' if before is None else 'is gone' if after is None else 'changed'}")
    words += [f"{name} {b} -> {a}" for name, b, a in _changes(old["packages"], new["packages"])]
    words += ["another seed"] if old.get("seed") != new.get("seed") else []
    return words


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    names = sorted(old.keys() | new.keys())
    return [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]


def _leaves(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """A nested recipe as dotted path -> literal."""
    leaves: dict[str, Any] = {}
    for name, value in tree.items():
        leaves |= _leaves(value, f"{path}{name}.") if isinstance(value, dict) else {path + name: value}
    return leaves


def _short(value: Any) -> str:
    text = "unset" if value is None else str(value)
    return text if len(text) <= 24 else text[:21] + "..."


def without_inputs(components: dict[str, Any]) -> dict[str, Any]:
    """Components that are known before the inputs are."""
    return {name: value for name, value in components.items() if name != "inputs"}


def only_code_changed(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Whether nothing but code separates two keys."""
    return {n for n in old.keys() | new.keys() if old.get(n) != new.get(n)} == {"code"}
