"""What a chat model is worth: its accuracy in every task, with intervals, and ChatCORE, their centred mean.

A task's accuracy is centred, (accuracy - guessing) / (1 - guessing), and ChatCORE is the mean over the tasks
that the sets hold: 0 for guessing, 1 for perfect. A task is kept as soon as it is answered, so an evaluation
that is killed goes on with the next one.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from omni_model.artifacts import GptCheckpoint, PublicSets, TokenizerFiles, canonical_json
from omni_model.config import JSON, BadInput, ChatEvaluationRecipe, Runtime
from omni_model.evaluation.base_evaluation import Kept, open_gpt
from omni_model.evaluation.chat_tasks import PROGRAM, TASKS, Examinee, examine, in_order, tasks_of
from omni_model.evaluation.sandbox import run_program
from omni_model.evaluation.statistics import Bootstrap
from omni_model.storage import Workspace
from omni_model.text.tokenizer import load_tokenizer

SCORES, ANSWERS = "scores.json", "answers.jsonl"
DECIMALS = 6


def evaluate_chat(
    recipe: ChatEvaluationRecipe,
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    sets: PublicSets,
    *,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: `scores.json` and `answers.jsonl` of a chat model.

    Raises:
        BadInput: GPT and tokenizer do not belong together, no task is among the sets, or a set is damaged.
    """
    words = load_tokenizer(tokenizer.out)
    if words.vocab_size != gpt.vocab_size:
        raise BadInput(
            f"the GPT in {gpt.uri} has {gpt.vocab_size} tokens and the tokenizer in {tokenizer.uri} "
            f"{words.vocab_size}; judge the GPT with the tokenizer it was trained with"
        )
    names = tasks_of(sets.out)
    if not names:
        raise BadInput(f"{sets.uri} holds none of {', '.join(TASKS)}; add one of them to sets.names")
    examinee = Examinee(open_gpt(gpt.out, recipe.dtype, work), words, recipe.max_answer_tokens)
    kept = Kept(work, total=len(names))
    done = {name: kept.figure(name, partial(_answered, examinee, name, recipe, sets, kept)) for name in names}
    bootstrap = Bootstrap(work.seed, recipe.bootstrap_draws, recipe.confidence)
    tasks = {name: score(TASKS[name], done[name]["answers"], bootstrap) for name in names}
    chat_core = round(sum(task["centered"] for task in tasks.values()) / len(tasks), DECIMALS)

    scores = json.dumps({"chat_core": chat_core, "tasks": tasks}, sort_keys=True, indent=1)
    (work.out / SCORES).write_text(scores + "\n", encoding="utf-8")
    with (work.out / ANSWERS).open("w", encoding="utf-8") as file:
        for name in names:
            for each in done[name]["answers"]:
                told = {key: value for key, value in each.items() if key != "chance"}
                file.write(canonical_json({"task": name, **told}) + "\n")
    work.metrics.summary(chat_core=chat_core, **{name: task["accuracy"] for name, task in tasks.items()})
    work.metrics.summary(
        left_out=", ".join(name for name in TASKS if name not in names) or "none",
        shortened=sum(done[name]["shortened"] for name in names),
    )
    if PROGRAM in (TASKS[name] for name in names):
        work.metrics.summary(programs_behind=", ".join(run_program("").layers))
    return {"chat_core": chat_core}


def _answered(
    examinee: Examinee, name: str, recipe: ChatEvaluationRecipe, sets: PublicSets, kept: Kept
) -> dict[str, Any]:
    """A task's answers, and how many of its questions were longer than the model can read."""
    before = examinee.num_shortened
    items = in_order(sets.out, name, recipe.items_per_task)
    answers = [asdict(answer) for answer in examine(examinee, name, items, kept.tell)]
    return {"answers": answers, "shortened": examinee.num_shortened - before}


def score(kind: str, answers: Sequence[dict[str, Any]], bootstrap: Bootstrap) -> dict[str, Any]:
    """A task's accuracy with its interval, what guessing gets, and the accuracy centred on that."""
    right = np.array([answer["right"] for answer in answers], dtype=np.float64)
    accuracy, baseline = float(right.mean()), float(np.mean([answer["chance"] for answer in answers]))
    return {
        "kind": kind,
        "accuracy": round(accuracy, DECIMALS),
        "ci95": bootstrap.interval(right).rounded(),
        "baseline": round(baseline, DECIMALS),
        "centered": round((accuracy - baseline) / (1 - baseline), DECIMALS),
        "n": len(answers),
    }
