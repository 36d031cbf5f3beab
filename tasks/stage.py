"""What a stage is to the graph: a name, typed edges, and the function of `omni_model` that does the work.

A task is declared as a signature. The recipe comes first, then one handle per input, the last of which may
be any number (`*features: FeatureShards`); the annotation of the result is the handle it makes. Flows pass
the declared function to a runner, `run(task, recipe, *inputs)`, so a wrong edge is a type error before
anything runs.
"""

import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

from omni_model.artifacts import Artifact
from omni_model.config import BadInput

P = ParamSpec("P")
H = TypeVar("H", bound=Artifact)


@dataclass(frozen=True)
class Stage:
    """A stage as identity, the planner and the runners see it.

    Attributes:
        inputs: the names of its inputs, one each of `kinds`.
        repeats: whether the last of them may be given any number of times, but once at least.
    """

    name: str
    entrypoint: str
    summary: str
    inputs: tuple[str, ...]
    kinds: tuple[type[Artifact], ...]
    repeats: bool
    recipe: type
    makes: type[Artifact]
    packages: tuple[str, ...]
    exact_packages: tuple[str, ...]
    seeded: bool
    distributed: bool
    wide: bool
    figure: str

    def check(self, recipe: Any, kinds: tuple[type[Artifact], ...]) -> None:
        """Refuse a wrong edge: another recipe, another number of inputs, or an input of another kind."""
        if not isinstance(recipe, self.recipe):
            raise BadInput(f"{self.name} takes a {self.recipe.__name__}, not a {type(recipe).__name__}")
        for name, wanted, kind in zip(self.edges(len(kinds)), self._wanted(len(kinds)), kinds, strict=True):
            if not issubclass(kind, wanted):
                raise BadInput(
                    f"{self.name}: input {name!r} must be a {wanted.__name__}, not a {kind.__name__}"
                )

    def edges(self, count: int) -> tuple[str, ...]:
        """A name for each of `count` inputs: `speech`, `features 1`, `features 2`.

        Raises:
            BadInput: the stage does not take so many.
        """
        fixed = self.inputs[:-1] if self.repeats else self.inputs
        if count < len(self.inputs) or (count > len(self.inputs) and not self.repeats):
            more = " or more" if self.repeats else ""
            raise BadInput(
                f"{self.name} takes {len(self.inputs)}{more} inputs ({', '.join(self.inputs)}), not {count}"
            )
        return fixed + tuple(f"{self.inputs[-1]} {number + 1}" for number in range(count - len(fixed)))

    def _wanted(self, count: int) -> tuple[type[Artifact], ...]:
        return self.kinds + self.kinds[-1:] * (count - len(self.kinds))


class Runner(Protocol):
    """What a flow is given: it runs or plans one declared task and returns a promise of its handle.

    The promise stands for the handle in later calls; its facts are not there to be read inside a flow.
    """

    def __call__(self, task: Callable[P, H], *args: P.args, **kwargs: P.kwargs) -> H:
        """`run(task, recipe, *inputs)`."""


REGISTRY: dict[str, Stage] = {}


def stage(
    entrypoint: str,
    *,
    packages: tuple[str, ...] = (),
    exact_packages: tuple[str, ...] = (),
    seeded: bool = True,
    distributed: bool = False,
    wide: bool = False,
    figure: str = "",
) -> Callable[[Callable[P, H]], Callable[P, H]]:
    """Declare a task.

    Args:
        entrypoint: `package.module:function` in `omni_model`.
        packages: distributions whose major.minor version changes the result.
        exact_packages: distributions whose every release may change the result, such as a synthesizer.
        seeded: whether the stage draws random numbers; if not, the run's seed stays out of its key.
        distributed: whether `Runtime.gpus` processes may share the work.
        wide: whether it waits until nothing else runs and then gets the threads of every stage.
        figure: the fact or metric that stands for the result in the closing table.
    """

    def declare(function: Callable[P, H]) -> Callable[P, H]:
        hints = typing.get_type_hints(function)
        makes = hints.pop("return")
        (_, recipe), *inputs = hints.items()
        REGISTRY[function.__name__] = Stage(
            name=function.__name__,
            entrypoint=entrypoint,
            summary=(function.__doc__ or "").strip(),
            inputs=tuple(name for name, _ in inputs),
            kinds=tuple(kind for _, kind in inputs),
            repeats=any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(function).parameters.values()),
            recipe=recipe,
            makes=makes,
            packages=packages,
            exact_packages=exact_packages,
            seeded=seeded,
            distributed=distributed,
            wide=wide,
            figure=figure,
        )
        return function

    return declare


def stage_of(task: Callable[..., Any]) -> Stage:
    """The stage that a declared task stands for."""
    return REGISTRY[task.__name__]
