"""The sections of a report, each from what a stage has measured: comparison, clips, map and curves."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from omni_model.artifacts import AudioCorpus, Checkpoint, EmbeddingMap, EncoderFiles, sha256_text
from omni_model.audio.corpora import read_shard, shard_paths
from omni_model.audio.probe import PROBES
from omni_model.evaluation import page
from omni_model.evaluation.benchmark import CHANCE, GROUPS, Item
from omni_model.evaluation.charts import Bar, curve, interval_bars, percent
from omni_model.evaluation.embedding_map import PICTURES, read_map

CURVE = "curve.json"
KINDS = {
    "model": "the listener",
    "no_audio": "hears nothing (to beat)",
    "ablation": "hears something broken (to beat)",
    "ceiling": "reads the features directly, trained per question (what is there to hear)",
}


def comparison(scores: Mapping[str, Any]) -> str:
    groups: list[tuple[str, str, Mapping[str, Any]]] = [("All questions", "", scores)]
    groups += [
        (name, f"{found['n']} questions", found) for name in GROUPS if (found := scores["groups"].get(name))
    ]
    cards = []
    for name, aside, group in groups:
        bars = [Bar("this model", group["accuracy"], tuple(group["ci95"]), "model")]
        for baseline, one in sorted(
            scores["baselines"].items(), key=lambda pair: list(KINDS).index(pair[1]["kind"])
        ):
            found = one if group is scores else one["groups"][name]
            interval = None if baseline == "chance" else tuple(found["ci95"])
            bars.append(Bar(baseline, found["accuracy"], interval, one["kind"]))
        cards.append(page.card(name.capitalize(), aside, interval_bars(name, bars, chance=CHANCE)))
    rows = [
        (
            f"{group}: {category}",
            str(one["n"]),
            percent(one["accuracy"]),
            f"{100 * one['ci95'][0]:.1f} to {100 * one['ci95'][1]:.1f}",
        )
        for group, _, by_category in groups[1:]
        for category, one in by_category["categories"].items()
    ]
    table = page.table(("what was asked", "questions", "right", "interval"), rows)
    second = scores["second"]
    letters = ", ".join(f"{letter} {count}" for letter, count in scores["letters"].items())
    notes = (
        f"Right in all four option orders: {percent(scores['strict'])}. Letters answered: {letters}. "
        f"Scored by {second['scorer']} instead of letters: {percent(second['accuracy'])}. "
        f"Exact McNemar test against no audio: p = {scores['mcnemar_p']:.3g}. Silence was not measured."
    )
    return page.section(
        "The score beside what it must beat",
        "A score means little alone. The thin line on a bar is its interval, the dashed mark is chance.",
        page.legend(KINDS.items())
        + page.grid(cards, wide=True)
        + page.details("Every category, letters and tests", table + f'<p class="note">{escape(notes)}</p>'),
    )


def choose_items(items: Sequence[Item], answers: Mapping[str, Mapping[str, Any]], count: int) -> list[Item]:
    """`count` items, half of them answered right if there are so many, from all groups, in a fixed order."""

    def spread(candidates: list[Item]) -> list[Item]:
        by_hash = sorted(candidates, key=lambda item: sha256_text(item.id))
        turns: dict[str, int] = {}
        places = {}
        for item in by_hash:
            turns[item.group] = turns.get(item.group, -1) + 1
            places[item.id] = (turns[item.group], item.group)
        return sorted(by_hash, key=lambda item: places[item.id])

    right = spread([item for item in items if answers[item.id]["right"]])
    wrong = spread([item for item in items if not answers[item.id]["right"]])
    num_right = min(len(right), max(count - count // 2, count - len(wrong)))
    picked = right[:num_right] + wrong[: count - num_right]
    return [item for pair in _alternate(picked[:num_right], picked[num_right:]) for item in pair]


def _alternate(first: Sequence[Item], second: Sequence[Item]) -> list[list[Item]]:
    longest = max(len(first), len(second))
    return [[*first[place : place + 1], *second[place : place + 1]] for place in range(longest)]


def heard(
    items: Sequence[Item],
    answers: Mapping[str, Mapping[str, Any]],
    corpora: Mapping[str, AudioCorpus],
    count: int,
) -> str:
    chosen = choose_items(items, answers, count)
    wavs = {
        source: read_wavs(corpus, {item.clip for item in chosen if item.source == source})
        for source, corpus in corpora.items()
    }
    cards = []
    for item in chosen:
        answer = answers[item.id]
        badge = (
            '<span class="badge right">right</span>'
            if answer["right"]
            else '<span class="badge false">wrong</span>'
        )
        bars = page.option_bars(
            [(option, answer["probabilities"][option]) for option in item.options],
            truth=item.key,
            picked=str(answer["chosen"]),
        )
        said = f"The clip says “{item.transcript}”. " if item.transcript else ""
        note = f"{said}Right in {answer['right_rotations']} of 4 option orders."
        body = (
            f"{page.player(wavs[item.source][item.clip], f'clip of item {item.id}')}"
            f'<p class="ask">{escape(item.question)} {badge}</p>{bars}<p class="note">{escape(note)}</p>'
        )
        cards.append(page.card(item.group, item.category, body, "item"))
    return page.section(
        "Hear what it heard",
        "Right and wrong answers in equal number where there are enough, picked by a fixed rule. Bars are "
        "the model's probabilities; the bold option is right, ◂ marks the one it chose.",
        page.grid(cards),
    )


def read_wavs(corpus: AudioCorpus, keys: set[str]) -> dict[str, bytes]:
    """WAV bytes of some clips of a corpus."""
    return (
        {key: sound for path in shard_paths(corpus) for key, sound, _ in read_shard(path) if key in keys}
        if keys
        else {}
    )


def carried(encoder: EncoderFiles) -> list[str]:
    """What a linear classifier finds in the encoder's frames, before and after it was taught, if it was."""
    path = encoder.out / PROBES
    if not path.exists():
        return []
    probes: dict[str, dict[str, float]] = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (name, *(percent(found[column]) for column in ("chance", "before", "after")), f"{found['clips']:,}")
        for name, found in sorted(probes.items(), key=lambda pair: -pair[1]["after"])
    ]
    heads = ("what is asked", "guessing", "random weights", "taught", "clips")
    return [
        page.section(
            "What the ear carries",
            "A linear classifier reads the encoder's frames of voices and sounds that neither has met.",
            f'<div class="card">{page.table(heads, rows)}</div>',
        )
    ]


def map_section(embedding_map: EmbeddingMap) -> str:
    numbers = read_map(embedding_map.out)
    light, dark = (
        page.data_uri("image/png", (embedding_map.out / PICTURES[ground]).read_bytes())
        for ground in ("light", "dark")
    )
    words = (
        "Three scatter plots of clips and words in the plane of the first two principal components of the "
        "text embeddings: by colour said, by voice, by pitch."
    )
    caption = (
        "Dots are clips in the colour of their true answer, framed words are the answers of that category, "
        "crosses are other words. Where hearing works, dots of one colour gather, and near their word."
    )
    rows = [
        (
            name,
            str(one["n"]),
            percent(one["centroid_accuracy"]),
            percent(one["chance"]),
            f"{one['separation']:+.2f}",
            percent(one["word_match"]),
        )
        for name, one in numbers["categories"].items()
    ]
    header = ("category", "clips", "nearest own centroid", "chance", "separation", "nearest own word")
    summary = (
        f"Soft tokens have {numbers['rms_ratio']:.2f} times the RMS of text embeddings before both are "
        f"normed. The gap between the two clouds is {numbers['modality_gap']:.2f} times their radius. The "
        f"table is measured in the full space on {numbers['clips_measured']} test clips; "
        "separation runs from -1 to 1."
    )
    return page.section(
        "Where sounds land among words",
        "The text model reads rows of numbers. These are the rows that clips become, among those of words.",
        '<figure class="card map"><div class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(words)}"></picture></div>'
        f'<figcaption class="note">{escape(caption)}</figcaption></figure>'
        + page.details(
            "Cluster numbers", page.table(header, rows) + f'<p class="note">{escape(summary)}</p>'
        ),
    )


def curves(curves: Sequence[tuple[str, str, Checkpoint]]) -> str:
    cards = []
    for title, what, checkpoint in curves:
        points = read_loss(checkpoint)
        cards.append(
            page.card(
                title,
                f"{checkpoint.steps:,} steps",
                curve(title, [(what, points)]) + f'<p class="note">{escape(what)}, nats per token</p>',
            )
        )
    return page.section("How it learned", "Training losses of the three stages that learn.", page.grid(cards))


def read_loss(checkpoint: Checkpoint) -> list[tuple[float, float]]:
    """(step, loss) of a trained artifact's `curve.json`; lines without a loss are left out."""
    lines = json.loads((checkpoint.out / CURVE).read_text(encoding="utf-8"))
    return [(float(line["step"]), float(line["loss"])) for line in lines if "loss" in line]


def footer() -> str:
    words = "This page is one file: sounds and pictures travel inside it, and it loads nothing."
    return f"<footer><p>{words}</p></footer>"
