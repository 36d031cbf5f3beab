"""What a run would do, and why, without doing it: the runner behind `omni plan` and before every `omni run`.

Standard library only, so that looking costs a fraction of a second.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from omni_model.artifacts import MANIFEST, Manifest
from omni_model.storage import Store
from tasks.identity import Identifier, Identity, differences, only_code_changed, without_inputs
from tasks.stage import H, P, Stage, stage_of

CURRENT, WILL_RUN, UNDECIDED = "current", "will run", "undecided"


@dataclass(frozen=True)
class Step:
    """One stage of a planned run.

    Attributes:
        identity: its key, or None while an input is not known.
        manifest: of the finished artifact if it is current, else of the nearest earlier result, if any.
    """

    stage: Stage
    recipe: Any
    inputs: tuple["Step", ...]
    status: str
    why: tuple[str, ...]
    identity: Identity | None
    manifest: Manifest | None
    costly: bool = False
    label: str = ""

    @property
    def digest(self) -> str | None:
        """Content digest of the result, known only while it is current."""
        return self.manifest.digest if self.status == CURRENT and self.manifest else None

    @property
    def predicted_s(self) -> float | None:
        """Seconds the nearest earlier result took to compute."""
        return self.manifest.timings["seconds"] if self.manifest else None

    @property
    def predicted_bytes(self) -> int | None:
        """Payload bytes of the nearest earlier result."""
        return sum(file.size for file in self.manifest.files) if self.manifest else None

    @property
    def predicted_memory_bytes(self) -> int | None:
        """Peak memory of the nearest earlier computation."""
        return int(self.manifest.timings["peak_memory_bytes"]) if self.manifest else None

    def to_json(self) -> dict[str, Any]:
        """The row of `omni plan --json`."""
        return {
            "stage": self.stage.name,
            "name": self.label,
            "status": self.status,
            "key": self.identity.key if self.identity else None,
            "why": "; ".join(self.why),
            "predicted_s": self.predicted_s,
            "predicted_bytes": self.predicted_bytes,
            "predicted_memory_bytes": self.predicted_memory_bytes,
        }


class Planner:
    """A runner that only looks. Call it as a flow does, then read `steps`."""

    def __init__(self, store: Store, identifier: Identifier) -> None:
        self._store = store
        self._identifier = identifier
        self._steps: list[Step] = []

    def __call__(self, task: Callable[P, H], *args: P.args, **kwargs: P.kwargs) -> H:
        """Plan one stage; the returned step stands for its handle."""
        recipe, *inputs = args
        step = self._plan(stage_of(task), recipe, cast("tuple[Step, ...]", tuple(inputs)))
        self._steps.append(step)
        return cast(H, step)

    @property
    def steps(self) -> list[Step]:
        """Every step in order, labelled: a stage used twice is told apart by its first input."""
        uses = Counter(step.stage.name for step in self._steps)
        labels = {id(step): label(step, uses[step.stage.name] > 1) for step in self._steps}
        return [
            dataclasses.replace(step, label=labels[id(step)], why=step.why or _waits(step, labels))
            for step in self._steps
        ]

    def _plan(self, stage: Stage, recipe: Any, inputs: tuple[Step, ...]) -> Step:
        stage.check(recipe, tuple(step.stage.makes for step in inputs))
        digests = {name: step.digest for name, step in zip(stage.edges(len(inputs)), inputs, strict=True)}
        identity = self._identifier.identify(stage, recipe, digests)
        if None in digests.values():
            return self._plan_unkeyed(stage, recipe, inputs, identity)
        manifest = self._store.find(stage.name, identity.key)
        if manifest is None:
            why, nearest = self._explain(stage, identity)
            costly = nearest is not None and only_code_changed(nearest.components, identity.components)
            return Step(stage, recipe, inputs, WILL_RUN, why, identity, nearest, costly)
        directory = self._store.directory(stage.name, identity.key)
        found = self._store.damages(directory, manifest, trust=True)
        if found:
            why = tuple(f"damaged: {damage}" for damage in found)
            return Step(stage, recipe, inputs, WILL_RUN, why, identity, manifest)
        return Step(stage, recipe, inputs, CURRENT, (), identity, manifest)

    def _plan_unkeyed(self, stage: Stage, recipe: Any, inputs: tuple[Step, ...], identity: Identity) -> Step:
        """An input will be made anew: if nothing else changed, equal bytes would make this stage current."""
        own = without_inputs(identity.components)
        for manifest in self._store.manifests(stage.name):
            if without_inputs(manifest.components) == own:
                return Step(stage, recipe, inputs, UNDECIDED, (), None, manifest)
        why, nearest = self._explain(stage, identity, ignore_inputs=True)
        return Step(stage, recipe, inputs, WILL_RUN, why, None, nearest)

    def _explain(
        self, stage: Stage, identity: Identity, ignore_inputs: bool = False
    ) -> tuple[tuple[str, ...], Manifest | None]:
        """How this key differs from the nearest earlier result's."""
        nearest: Manifest | None = None
        fewest: list[str] = []
        for manifest in self._store.manifests(stage.name):
            old = manifest.components | ({"inputs": identity.components["inputs"]} if ignore_inputs else {})
            words = differences(old, identity.components)
            if nearest is None or len(words) < len(fewest):
                nearest, fewest = manifest, words
        directory = self._store.directory(stage.name, identity.key)
        if (directory / MANIFEST).exists():
            return (f"damaged: {directory / MANIFEST} cannot be read",), nearest
        if (directory / "partial").exists():
            return ("continues an unfinished run",), nearest
        if nearest is None:
            return ("never run",), None
        return tuple(fewest) or ("not in this store any more",), nearest


def label(step: Step, used_twice: bool) -> str:
    """The name that the tables show: `extract_features:speech` where features are extracted twice.

    Uses are told apart by a field of the recipe, if it names one, else by what they are of.
    """
    subject = _told_by(step) or (_source(step) if step.inputs else "")
    return f"{step.stage.name}:{subject}" if used_twice and subject else step.stage.name


def _source(step: Step) -> str:
    source = step.inputs[0]
    while source.inputs and source.inputs[0].stage.makes is source.stage.makes:  # the same clips, changed
        source = source.inputs[0]
    return _told_by(source) or re.sub(r"^[a-z]+_", "", source.stage.name)


def _told_by(step: Step) -> str:
    return str(getattr(step.recipe, step.recipe.told_by)) if step.recipe.told_by else ""


def _waits(step: Step, labels: dict[int, str]) -> tuple[str, ...]:
    """Why a step is undecided: which of its inputs will be made anew, or may be."""
    open_inputs = [labels[id(source)] for source in step.inputs if source.status != CURRENT]
    return (f"waits for {', '.join(open_inputs)}",) if open_inputs else ()
