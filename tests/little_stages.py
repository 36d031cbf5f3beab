"""Stages small enough to kill, damage and rerun many times, declared like the real ones.

They borrow existing recipes and handles: what they compute does not matter, how they are run does.
"""

import json
import time

from omni_model.artifacts import Report, TextCorpus
from omni_model.config import JSON, BadInput, ReportRecipe, Runtime, TokenizerRecipe
from omni_model.storage import Workspace
from tasks.stage import stage

LINES = 20


def write_lines(recipe: TokenizerRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Writes one line per step and can be killed between any two; resumes from `partial/`."""
    if recipe.vocab_size == 13:
        raise BadInput("13 is refused; choose another vocab_size")
    if recipe.vocab_size == 14:
        raise ArithmeticError("14 goes wrong")
    work.partial.mkdir(exist_ok=True)
    done = work.partial / "lines"
    pause_s = 0.1 if recipe.vocab_size == 1000 else 0.0
    for number in range(len(done.read_text().splitlines()) if done.exists() else 0, LINES):
        time.sleep(pause_s)
        with done.open("a") as file:
            file.write(f"{number * recipe.vocab_size}\n")
        work.metrics.log(number + 1, LINES)
    (work.out / "documents.jsonl").write_text(done.read_text())
    work.metrics.summary(lines=float(LINES))
    return {"num_documents": LINES, "num_bytes": len(done.read_text())}


def parity(number: int) -> int:
    """0 or 1."""
    return number % 2


def summarise(
    recipe: ReportRecipe, text: TextCorpus, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Its bytes depend on the parity of the lines alone, so that many inputs give the same result."""
    lines = (text.out / "documents.jsonl").read_text().splitlines()
    (work.out / "report.html").write_text(json.dumps([parity(int(line)) for line in lines]))
    return {"headline": recipe.title, "meaning": ""}


def finish(recipe: ReportRecipe, report: Report, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Copies its input."""
    (work.out / "report.html").write_text((report.out / "report.html").read_text())
    return {"headline": recipe.title, "meaning": ""}


def share(recipe: ReportRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Several ranks agree on what the first one writes. 13 listed items: the second refuses; 14: all wait."""
    from omni_model import hardware
    from omni_model.training.ranks import Ranks

    ranks = Ranks(*hardware.join_ranks())
    if recipe.listed_items == 13 and not ranks.first:
        raise BadInput("13 is refused by the second rank; choose another")
    work.metrics.log(ranks.rank, ranks.world)
    if recipe.listed_items == 14:
        time.sleep(60)
    told = ranks.agree({"rank": ranks.rank, "world": ranks.world})
    if ranks.first:
        (work.out / "report.html").write_text(json.dumps(told))
    return {"headline": f"{told['world']} ranks", "meaning": ""}


def join(recipe: ReportRecipe, *texts: TextCorpus, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Notes when it ran, and with how many threads."""
    began = time.monotonic()
    time.sleep(0.4)
    (work.out / "report.html").write_text(json.dumps([began, time.monotonic(), runtime.threads]))
    return {"headline": f"{len(texts)} inputs", "meaning": ""}


@stage("tests.little_stages:write_lines", figure="lines")
def little_text(recipe: TokenizerRecipe) -> TextCorpus:
    """Lines."""


@stage("tests.little_stages:summarise", seeded=False)
def little_summary(recipe: ReportRecipe, text: TextCorpus) -> Report:
    """Parities."""


@stage("tests.little_stages:finish", seeded=False)
def little_finish(recipe: ReportRecipe, report: Report) -> Report:
    """A copy."""


@stage("tests.little_stages:share", distributed=True)
def little_share(recipe: ReportRecipe) -> Report:
    """What several ranks agree on."""


@stage("tests.little_stages:join", wide=True)
def little_wide(recipe: ReportRecipe, *texts: TextCorpus) -> Report:
    """Alone on the machine."""


@stage("tests.little_stages:join")
def little_join(recipe: ReportRecipe, *texts: TextCorpus) -> Report:
    """One beside another."""
