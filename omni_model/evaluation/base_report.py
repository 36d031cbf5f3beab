"""The page about a text model: how it learned, what it writes, and what both its forms are worth.

A loss says little to a stranger, so the page shows what the model wrote while it learned, and answers it
gave, right and wrong in equal number, beside every score. Scores of the miniature tasks are called that
everywhere: they ask about a small world, and are compared with nothing else.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from omni_model.artifacts import (
    BaseScores,
    ChatScores,
    Checkpoint,
    Conversations,
    GptCheckpoint,
    TokenizerFiles,
    sha256_text,
)
from omni_model.config import JSON, ReportRecipe, Runtime
from omni_model.evaluation import page
from omni_model.evaluation.charts import Bar, curve, interval_bars, percent
from omni_model.evaluation.learning_sections import read_loss
from omni_model.evaluation.markdown import inline_curve
from omni_model.evaluation.report_sections import footer
from omni_model.evaluation.statistics import wilson_interval
from omni_model.storage import Workspace
from omni_model.telemetry import markdown_table

Task = Mapping[str, Any]
SHOWN_PROMPTS = 3
KIND_NAMES = {
    "multiple_choice": "which continuation",
    "schema": "which context",
    "language_modeling": "the exact words",
    "choice": "letter",
    "sum": "number",
    "program": "program",
}


def write_base_report(
    recipe: ReportRecipe,
    base_scores: BaseScores,
    chat_scores: ChatScores,
    gpt: GptCheckpoint,
    chat: GptCheckpoint,
    tokenizer: TokenizerFiles,
    conversations: Conversations,
    *,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: `report.html` and `report.md` of a base model and the chat model made of it."""
    base, talk = _read(base_scores.out / "scores.json"), _read(chat_scores.out / "scores.json")
    training = _read(gpt.out / "training.json")
    answers = [json.loads(line) for line in (chat_scores.out / "answers.jsonl").read_text().splitlines()]
    small = "miniature " if base["bundle"] == "miniature" else ""
    headline = (
        f"{base['val_bpb']:.3f} bits per byte, {small}CORE {base['core']:.3f}, "
        f"{small}ChatCORE {talk['chat_core']:.3f}"
    )
    meaning = meaning_of(base, talk)
    sizes = [
        ("parameters", f"{gpt.num_parameters / 1e6:,.1f} M"),
        ("text read", f"{training['tokens'] / 1e6:,.1f} M tokens"),
        ("vocabulary", f"{tokenizer.vocab_size:,}"),
        ("conversations", f"{conversations.num_conversations:,}"),
        ("work", f"{training['tokens'] * training['flops_per_token']:.2g} FLOPs"),
    ]
    hero = page.hero(
        recipe.title,
        number=f"{base['val_bpb']:.3f}",
        unit="bits per byte",
        beside=f"of text it never read ({base['train_bpb']:.3f} of text it may have read). "
        f"{small.capitalize()}CORE {base['core']:.3f}; after learning to chat, "
        f"{small}ChatCORE {talk['chat_core']:.3f}. Both are 0 for guessing and 1 for perfect.",
        meaning=meaning,
        why=_caution(bool(small)),
        below=page.facts(sizes),
    )
    sections = [
        hero,
        _learning(gpt, chat),
        _writing(gpt, base["continuations"]),
        _chatting(chat, talk, answers, recipe.listed_items, small),
        _base_tasks(base, small),
        footer(),
    ]
    (work.out / "report.html").write_text(
        page.page(f"{recipe.title}: {headline}", sections), encoding="utf-8"
    )
    told = [
        f"## {headline}",
        meaning,
        markdown_table(("task", "asks for", "right", "guessing", "items"), _task_rows(talk["tasks"])),
        markdown_table(("task", "asks for", "right", "guessing", "items"), _task_rows(base["tasks"])),
        inline_curve("Pretraining", "loss", read_loss(gpt)),
        inline_curve("Chat", "loss", read_loss(chat)),
    ]
    (work.out / "report.md").write_text("\n\n".join(told) + "\n", encoding="utf-8")
    return {"headline": headline, "meaning": meaning}


def meaning_of(base: Mapping[str, Any], talk: Mapping[str, Any]) -> str:
    """In how many tasks both forms of the model are better than guessing, by their intervals."""
    wins = sum(
        wilson_interval(round(task["accuracy"] * task["n"]), task["n"]).low > task["baseline"]
        for task in base["tasks"].values()
    )
    chat_wins = sum(task["ci95"][0] > task["baseline"] for task in talk["tasks"].values())
    return (
        f"The base model is above guessing in {wins} of {len(base['tasks'])} tasks, the chat model in "
        f"{chat_wins} of {len(talk['tasks'])}."
    )


def _caution(small: bool) -> str:
    if small:
        return (
            "The miniature tasks are our own, in the formats of the real ones, about the small world of the "
            "embedded corpus. They show that every part works; they say nothing about English at large."
        )
    return "CORE has 22 tasks (DCLM); ChatCORE is the mean over the chat tasks below."


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _learning(gpt: GptCheckpoint, chat: GptCheckpoint) -> str:
    cards = [_loss_card("Pretraining", "training loss", gpt)]
    validation = [(float(line["step"]), float(line["bpb"])) for line in _read(gpt.out / "validation.json")]
    if validation:
        drawn = curve("Unseen text", [("bits per byte", validation)])
        note = '<p class="note">bits per byte of text kept apart</p>'
        cards.append(page.card("Unseen text", f"{validation[-1][1]:.3f}", drawn + note))
    cards.append(_loss_card("Chat", "training loss, what the assistant says", chat))
    return page.section(
        "How it learned", "Each curve falls from guessing to what it ends in.", page.grid(cards)
    )


def _loss_card(title: str, what: str, checkpoint: Checkpoint) -> str:
    drawn = curve(title, [(what, read_loss(checkpoint))])
    note = f'<p class="note">{escape(what)}, nats per token</p>'
    return page.card(title, f"{checkpoint.steps:,} steps", drawn + note)


def _writing(gpt: GptCheckpoint, continuations: Sequence[Mapping[str, str]]) -> str:
    """What the base model wrote after a few prompts, early and late; then on every prompt at the end."""
    samples = _read(gpt.out / "samples.json")
    prompts = list(dict.fromkeys(sample["prompt"] for sample in samples))[:SHOWN_PROMPTS]
    cards = []
    for prompt in prompts:
        written = [sample for sample in samples if sample["prompt"] == prompt]
        lines = "".join(
            f'<p class="note">after {sample["step"]:,} steps</p>'
            f"<p class=said><b>{escape(prompt)}</b>{escape(sample['text'])}</p>"
            for sample in written
        )
        cards.append(page.card(prompt, "", lines, "item"))
    rest = "".join(
        f"<p class=said><b>{escape(one['prompt'])}</b>{escape(one['text'])}</p>" for one in continuations
    )
    return page.section(
        "What it writes",
        "The likeliest token each time; bold is what it was given.",
        page.grid(cards) + page.details("Every prompt, at the end", f'<div class="card">{rest}</div>'),
    )


def _chatting(
    chat: GptCheckpoint,
    scores: Mapping[str, Any],
    answers: Sequence[Mapping[str, Any]],
    count: int,
    small: str,
) -> str:
    cards = []
    for name, task in scores["tasks"].items():
        bar = Bar("the chat model", task["accuracy"], tuple(task["ci95"]), "model")
        drawn = interval_bars(name, [bar], chance=task["baseline"])
        cards.append(page.card(name, f"{task['n']:,} items", drawn))
    shown = "".join(_answer_card(answer) for answer in choose_answers(answers, count))
    talks = "".join(
        f"<p><b>{escape(sample['prompt'])}</b></p><p class=said>{escape(sample['text'])}</p>"
        for sample in _last_of_each(_read(chat.out / "samples.json"))
    )
    return page.section(
        f"What it answers: {small}ChatCORE",
        "Questions it was not taught with. A thin line is the interval, the dashed mark is guessing.",
        page.grid(cards, wide=True)
        + page.details("A short talk", f'<div class="card">{talks}</div>')
        + page.details("Answers, right and wrong", f'<div class="grid">{shown}</div>'),
    )


def _last_of_each(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({sample["prompt"]: sample for sample in samples}.values())


def choose_answers(answers: Sequence[Mapping[str, Any]], count: int) -> list[Mapping[str, Any]]:
    """`count` answers, half of them right if there are so many, by a fixed rule."""
    in_order = sorted(answers, key=lambda answer: sha256_text(f"{answer['task']} {answer['index']}"))
    right = [answer for answer in in_order if answer["right"]]
    wrong = [answer for answer in in_order if not answer["right"]]
    num_right = min(len(right), max(count - count // 2, count - len(wrong)))
    return right[:num_right] + wrong[: count - num_right]


def _answer_card(answer: Mapping[str, Any]) -> str:
    badge = ("right", "right") if answer["right"] else ("false", "wrong")
    lines = "<br>".join(escape(str(answer["question"])).splitlines())
    body = (
        f'<p class="ask">{lines}</p><p class="note">said <span class="badge {badge[0]}">{badge[1]}</span></p>'
        f'<p class="ask">{escape(str(answer["said"]))}</p>'
        f'<p class="note">expected: {escape(str(answer["expected"]))}</p>'
    )
    return page.card(str(answer["task"]), "", body, "item")


def _base_tasks(scores: Mapping[str, Any], small: str) -> str:
    heads = ("task", "asks for", "right", "guessing", "items", "0 guessing, 1 perfect")
    rows = [
        (*row, f"{task['centered']:+.3f}")
        for row, task in zip(_task_rows(scores["tasks"]), scores["tasks"].values(), strict=True)
    ]
    return page.section(
        f"What the base model knows: {small}CORE",
        f"Before it learned to chat. Their mean, {scores['core']:.3f}, is {small}CORE.",
        f'<div class="card">{page.table(heads, rows, numbers_from=2)}</div>',
    )


def _task_rows(tasks: Mapping[str, Task]) -> list[tuple[str, str, str, str, str]]:
    return [
        (
            name,
            KIND_NAMES.get(task["kind"], task["kind"]),
            percent(task["accuracy"]),
            percent(task["baseline"]),
            f"{task['n']:,}",
        )
        for name, task in tasks.items()
    ]
