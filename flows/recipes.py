"""Every run that has a name: which flow, with which recipe."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flows.demo import demo
from flows.smoke import smoke
from omni_model.artifacts import Report
from omni_model.config import BadInput, DemoRecipe, Runtime, SmokeRecipe
from omni_model.plain import nearest, override
from tasks.stage import Runner

DEFAULT = "demo"


@dataclass(frozen=True)
class Run:
    """A flow and the values it is to run with."""

    name: str
    flow: Callable[[Runner, Any], Report]
    recipe: Any
    runtime: Runtime


RECIPES: dict[str, Run] = {
    run.name: run
    for run in (
        Run("demo", demo, DemoRecipe(), Runtime()),
        Run("smoke", smoke, SmokeRecipe(), Runtime()),
    )
}


def resolve(name: str, settings: list[str]) -> Run:
    """The named run with `path=value` settings applied: `runtime.*` to how, everything else to what.

    Raises:
        BadInput: unknown recipe or field (with the nearest name), or a value that does not parse.
    """
    if name not in RECIPES:
        raise BadInput(f"there is no recipe {name!r}{nearest(name, RECIPES)}")
    run = RECIPES[name]
    recipe, runtime = run.recipe, run.runtime
    for setting in settings:
        path, equals, text = setting.partition("=")
        if not equals:
            raise BadInput(f"--set {setting!r} has no value; write it as path=value")
        if path.startswith("runtime."):
            runtime = override(runtime, path.removeprefix("runtime."), text)
        else:
            recipe = override(recipe, path, text)
    return Run(name, run.flow, recipe, runtime)
