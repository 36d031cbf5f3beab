"""Planning a named run, and its plan as a table for a terminal or the UI. Standard library only."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import omni_model
from flows import foresight, hearing_foresight
from flows.cards import GIB, Card, Machine, find_card, speed
from flows.foresight import Forecast
from flows.foresight import seconds as seconds
from flows.recipes import Run
from omni_model.artifacts import Manifest
from omni_model.config import GptShape, Runtime
from omni_model.config.depth import GptSize, vocabulary
from omni_model.plain import identity
from omni_model.storage import Store
from omni_model.telemetry import markdown_table
from tasks.fingerprint import CodeBase
from tasks.identity import Identifier
from tasks.planner import CURRENT, UNDECIDED, WILL_RUN, Planner, Step

MARKS = {CURRENT: "✓", WILL_RUN: "▸", UNDECIDED: "?"}
PRETRAINING = ("pretrain_gpt", "continue_gpt")
MODELS = (*PRETRAINING, "tune_chat")
TOLD_REASONS = 4
HEARING = ("align_projector", "finetune_lora")
ON_A_CARD = (*MODELS, "evaluate_base", "evaluate_chat", *HEARING)


def plan(run: Run, store: Store) -> tuple[list[Step], Identifier]:
    """What the run would do, and the identifier that carrying it out must use."""
    code = CodeBase(Path(omni_model.__file__).parent.parent, memo=store.root / ".fingerprints.json")
    identifier = Identifier(code, run.recipe.seed)
    planner = Planner(store, identifier)
    run.flow(planner, run.recipe)
    return planner.steps, identifier


def nothing_to_do(steps: list[Step]) -> bool:
    """Whether every stage is current."""
    return all(step.status == CURRENT for step in steps)


def foresee(steps: Sequence[Step], card_name: str, store: Store, runtime: Runtime) -> dict[str, Forecast]:
    """What each stage that is not current will take on a named card, by its label.

    Raises:
        BadInput: no card is called so.
    """
    card = find_card(card_name)
    models = [manifest for stage in MODELS for manifest in store.manifests(stage)]
    return {step.label: _foresee(step, card, models, runtime) for step in steps if step.status != CURRENT}


def _foresee(step: Step, card: Card, models: Sequence[Manifest], runtime: Runtime) -> Forecast:
    forecast = _calculate(step, card, models, runtime)
    made = step.manifest
    if made is None or not _same_recipe(step, made):
        return forecast
    if step.stage.name in ON_A_CARD and not (card.computed(made) and _same_model(step, made, models)):
        return forecast
    sized = forecast.kept_bytes is not None
    return dataclasses.replace(
        forecast,
        seconds=made.timings["seconds"],
        rows=forecast.rows or None,  # what ran did fit
        disk_bytes=forecast.disk_bytes if sized else step.predicted_bytes,
        kept_bytes=forecast.kept_bytes if sized else step.predicted_bytes,
        assumed=("as long as before",),
    )


def _calculate(step: Step, card: Card, models: Sequence[Manifest], runtime: Runtime) -> Forecast:
    """From shapes and FLOPs, without looking for an earlier run of the stage itself."""
    name = step.stage.name
    edges = step.stage.edges(len(step.inputs))
    recipes = {edge: source.recipe for edge, source in zip(edges, step.inputs, strict=True)}
    shape, vocab_size = _shape_of(step)
    if name not in ON_A_CARD or shape is None or vocab_size is None:
        size = foresight.disk_bytes(step.recipe) or hearing_foresight.disk_bytes(step.recipe, recipes)
        return Forecast(disk_bytes=size, kept_bytes=size)
    trained = speed(card, models, shape.n_layer)
    machine = Machine(card, trained, runtime.gpus if step.stage.distributed else 1, runtime.microbatch_rows)
    if name in PRETRAINING:
        return foresight.pretraining(step.recipe, vocab_size, machine)
    if name == "tune_chat":
        return foresight.chat_tuning(step.recipe, shape, vocab_size, recipes["conversations"], machine)
    if name in HEARING:
        projector = recipes.get("projector", step.recipe).projector
        return hearing_foresight.teaching(step.recipe, projector, shape, vocab_size, machine)
    if name == "evaluate_base":
        return foresight.base_evaluation(step.recipe, shape, vocab_size, recipes["core"], machine)
    return foresight.chat_evaluation(step.recipe, shape, vocab_size, recipes["sets"], machine)


def _shape_of(step: Step) -> tuple[GptShape | None, int | None]:
    """Shape and vocabulary of the GPT that a stage trains or uses; None where it was not made here."""
    shape = next((each.recipe.gpt for each in _sources(step) if each.stage.name in PRETRAINING), None)
    recipes = (each.recipe for each in _sources(step) if each.stage.name == "train_tokenizer")
    return shape, next((vocabulary(recipe) for recipe in recipes), None)


def _sources(step: Step) -> Iterator[Step]:
    """A step and all that it comes from."""
    yield step
    for source in step.inputs:
        yield from _sources(source)


def _same_recipe(step: Step, made: Manifest) -> bool:
    """But for the dtype, which is up to the machine that plans and not to the card it plans for."""
    recipe = identity(step.recipe)
    assert isinstance(recipe, dict)
    return bool(made.components.get("recipe", {}) | {"dtype": None} == recipe | {"dtype": None})


def _same_model(step: Step, made: Manifest, models: Sequence[Manifest]) -> bool:
    """Whether an earlier result is of a model as large as the one that is planned."""
    shape, vocab_size = _shape_of(step)
    digest = made.components.get("inputs", {}).get("gpt")
    tried = next((model.facts for model in models if model.digest == digest), {})
    parameters = made.facts.get("num_parameters", tried.get("num_parameters"))
    return shape is not None and parameters == GptSize.of(shape, vocab_size or 0).parameters


def plan_summary(steps: list[Step], forecasts: Mapping[str, Forecast] | None = None) -> str:
    """The plan in one line, and with forecasts a second one: their sum, and what they rest on."""
    if nothing_to_do(steps):
        return "nothing to do"
    running, open_still = (sum(step.status == status for step in steps) for status in (WILL_RUN, UNDECIDED))
    follow = f", {open_still} more unless their inputs come out the same" if open_still else ""
    will = f"{running} of {len(steps)} stages will run{follow}"
    if forecasts:
        return f"{will}; {_total(forecasts)}"
    known_s = sum(step.predicted_s or 0 for step in steps if step.status != CURRENT)
    before = f"; all of them took {seconds(known_s)} before" if known_s else ""
    return f"{will}{before}"


def _total(forecasts: Mapping[str, Forecast]) -> str:
    known = [each.seconds for each in forecasts.values() if each.seconds is not None]
    some = "" if len(known) == len(forecasts) else f" for {len(known)} of them"
    total = f"about {seconds(sum(known))}{some}" if known else "how long they take is not known"
    grounds = [f"{name}: {'; '.join(each.assumed)}" for name, each in forecasts.items() if each.assumed]
    return "\n  ".join([total, *grounds])


def plan_json(steps: list[Step], forecasts: Mapping[str, Forecast] | None = None) -> list[dict[str, Any]]:
    """The rows of `omni plan --json`, with the figures of what is foreseen."""
    told = {label: forecast.to_json() for label, forecast in (forecasts or {}).items()}
    return [step.to_json() | told.get(step.label, {}) for step in steps]


def plan_rows(steps: list[Step], forecasts: Mapping[str, Forecast] | None = None) -> list[list[str]]:
    """Mark, stage, status, key, prediction and reason of every step."""
    foreseen = forecasts or {}
    return [
        [
            MARKS[step.status],
            step.label,
            step.status,
            step.identity.key[:8] if step.identity else "",
            _foretold(foreseen[step.label]) if step.label in foreseen else _earlier(step),
            _reasons(step),
        ]
        for step in steps
    ]


def _foretold(forecast: Forecast) -> str:
    if forecast.rows == 0:
        return "does not fit"
    words = [] if forecast.seconds is None else [f"about {seconds(forecast.seconds)}"]
    if forecast.gpu_bytes is not None:
        count = forecast.rows
        rows = "" if count is None else f" with {count} {'row' if count == 1 else 'rows'} at once"
        words.append(f"{forecast.gpu_bytes / GIB:.1f} GiB of the card{rows}")
    if forecast.disk_bytes is not None:
        words.append(f"{_size(forecast.disk_bytes)} disk")
    return ", ".join(words)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:.1f} MiB"


def _earlier(step: Step) -> str:
    if step.predicted_s is None or step.status == CURRENT:
        return ""
    memory, size = step.predicted_memory_bytes or 0, step.predicted_bytes or 0
    return f"about {seconds(step.predicted_s)}, {memory / 2**30:.1f} GiB memory, {size / 2**20:.1f} MiB disk"


def _reasons(step: Step) -> str:
    """The first few; a stage that was last made long ago has dozens."""
    left_out = len(step.why) - TOLD_REASONS
    more = f"; and {left_out} more (omni why {step.label})" if left_out > 0 else ""
    return "; ".join(step.why[:TOLD_REASONS]) + more


def plan_markdown(steps: list[Step]) -> str:
    """The plan as a Markdown table."""
    return markdown_table(["", "stage", "status", "key", "earlier run", "why"], plan_rows(steps))


def text_table(head: list[str], rows: list[list[str]]) -> str:
    """Columns padded to their widest cell; the last one is left ragged, empty columns are left out."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    table = [[line[i] for i in kept] for line in (head, *rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(kept))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in table
    )
