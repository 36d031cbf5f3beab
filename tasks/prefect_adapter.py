"""The runner that lets Prefect carry a flow out: the only place that configures `prefect.task`.

Keys, damage and leases are ours; Prefect schedules, records and shows. Its cache key is the path of a record
inside the artifact's own directory, so that deleting an artifact deletes the record with it, and a stage
whose artifact is whole shows as Cached.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from prefect import task as prefect_task
from prefect.cache_policies import CachePolicy
from prefect.client.schemas.objects import State
from prefect.context import TaskRunContext
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.states import Completed

from omni_model.artifacts import Artifact
from omni_model.plain import to_plain
from omni_model.storage.local import DIRECTORY_HEX, Store
from tasks.execute import Executor, Outcome
from tasks.planner import Step
from tasks.stage import H, P, Stage, stage_of

RECORD = "prefect.json"
Reference = dict[str, str]  # what Prefect keeps of a result: enough to find the artifact in a moved store too


def record_path(stage: str, key: str) -> str:
    """Where Prefect's record of a stage lies, relative to the store: this is the Prefect cache key."""
    return f"{stage}/{key[:DIRECTORY_HEX]}/{RECORD}"


class StagePolicy(CachePolicy):
    """Prefect's view of our identity: a hit is a record beside a whole artifact."""

    def __init__(self, executor: Executor, store: Store, stage: Stage, recipe: Any) -> None:
        self.executor = executor
        self.store = store
        self.stage = stage
        self.recipe = recipe

    def compute_key(
        self, task_ctx: TaskRunContext, inputs: dict[str, Any], flow_parameters: dict[str, Any], **kwargs: Any
    ) -> str:
        """The record's path. A record beside a missing or damaged artifact is removed, so that it misses."""
        identity = self.executor.identify(self.stage, self.recipe, resolve(self.store, inputs["inputs"]))
        path = record_path(self.stage.name, identity.key)
        if self.executor.find(self.stage, identity.key) is None:
            (self.store.root / path).unlink(missing_ok=True)
        return path

    def __deepcopy__(self, memo: dict[int, Any]) -> "StagePolicy":
        return self  # Prefect copies policies; the executor's locks and children are one per run


def resolve(store: Store, references: dict[str, Reference]) -> tuple[Artifact, ...]:
    """The handles behind Prefect's references."""
    handles = []
    for reference in references.values():
        manifest = store.find(reference["stage"], reference["key"])
        if manifest is None:
            name = f"{reference['stage']} {reference['key'][:8]}"
            raise FileNotFoundError(f"{name} has gone from the store during the run")
        handles.append(Artifact.from_manifest(manifest, store.directory(manifest.stage, manifest.key)))
    return tuple(handles)


class PrefectRunner:
    """A runner that submits each stage as a Prefect task; call `finish` for what came of them.

    Args:
        steps: the plan of the same flow, in the order of its calls.
    """

    def __init__(self, store: Store, executor: Executor, steps: list[Step]) -> None:
        self._store = store
        self._executor = executor
        self._steps: Iterator[Step] = iter(steps)
        self._futures: list[tuple[Step, PrefectFuture[Reference]]] = []
        self._computed: set[str] = set()

    def __call__(self, task: Callable[P, H], *args: P.args, **kwargs: P.kwargs) -> H:
        """Submit one stage; the returned future stands for its handle."""
        recipe, *inputs = args
        stage, step = stage_of(task), next(self._steps)
        named = dict(zip(stage.edges(len(inputs)), inputs, strict=True))
        future = self._as_task(stage, recipe, step.label).submit(to_plain(recipe), named)
        self._futures.append((step, future))
        return cast(H, future)

    def _as_task(self, stage: Stage, recipe: Any, label: str) -> Any:
        def make(recipe_values: Any, inputs: dict[str, Reference]) -> Reference | State[Reference]:
            outcome = self._executor.make(stage, recipe, resolve(self._store, inputs), label)
            reference = {"stage": stage.name, "key": outcome.manifest.key, "digest": outcome.manifest.digest}
            get_run_logger().info("%s: %s", label, outcome.manifest.metrics or outcome.manifest.facts)
            if outcome.computed:
                self._computed.add(label)
                return reference
            # Made by another run while this one waited, or before Prefect kept a record of it.
            return Completed(name="Cached", data=reference)

        configure = prefect_task(
            name=stage.name,
            description=stage.summary,
            task_run_name=label,
            cache_policy=StagePolicy(self._executor, self._store, stage, recipe),
            persist_result=True,
            result_serializer="json",
            result_storage=Path(self._store.root),
        )
        return configure(make)

    def finish(self) -> list[tuple[Step, Outcome]]:
        """Wait for every stage; what each came to, in order.

        Raises:
            The first stage's own error, once those that were running beside it have ended.
        """
        for _, future in self._futures:
            future.wait()
        if self._executor.failure is not None:
            raise self._executor.failure
        for _, future in self._futures:
            if future.state.is_failed() or future.state.is_crashed():  # not those whose input failed
                future.result()
        return [(step, self._outcome(step, future)) for step, future in self._futures]

    def _outcome(self, step: Step, future: PrefectFuture[Reference]) -> Outcome:
        reference = future.result()
        found = self._executor.find(step.stage, reference["key"])
        if found is None:
            raise FileNotFoundError(f"{step.label} has gone from the store during the run")
        return Outcome(found.handle, found.manifest, computed=step.label in self._computed)
