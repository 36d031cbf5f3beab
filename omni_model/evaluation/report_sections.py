"""The sections of a report, each from what a stage has measured: comparison, clips and curves."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from omni_model.artifacts import AudioCorpus, EncoderFiles, sha256_text
from omni_model.audio.corpora import read_shard, shard_paths
from omni_model.audio.probe import PROBES
from omni_model.evaluation import page
from omni_model.evaluation.benchmark_item import CHANCE, GROUPS, MACRO_GROUPS, Item
from omni_model.evaluation.charts import Bar, interval_bars, percent

KINDS = {
    "model": "the listener",
    "no_audio": "hears nothing (to beat)",
    "ablation": "hears something broken (to beat)",
    "ceiling": "reads the features directly, trained per question (what is there to hear)",
}


def comparison(scores: Mapping[str, Any]) -> str:
    groups: list[tuple[str, str, Mapping[str, Any]]] = [("All questions", "", scores)]
    groups += [
        (name, f"{found['n']} questions", found)
        for name in MACRO_GROUPS
        if (found := scores["groups"].get(name))
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
    scorers, pairs, lures = scores["scorers"], scores["pairs"], scores["lures"]
    letters = ", ".join(f"{letter} {count}" for letter, count in scores["letters"].items())
    notes = (
        f"Right in all four option orders: {percent(scores['strict'])}. Letters answered: {letters}. "
        f"Scored by how much likelier an option becomes by hearing, instead of letters: "
        f"{percent(scorers['likelihood']['accuracy'])}; by what the model writes: "
        f"{percent(scorers['text']['accuracy'])}, with {scorers['text']['unreadable']} answers that name no "
        f"option and count as wrong. Exact McNemar test against no audio: p = {scores['mcnemar_p']:.3g}."
    )
    if pairs["n"]:
        notes += (
            f" Of {pairs['n']} pairs that say the same words with another sound, both are right in "
            f"{percent(pairs['accuracy'])}; guessing gets {percent(pairs['chance'])}."
        )
    if lures["n"]:
        notes += (
            f" In {lures['n']} questions a wrong option is true of something else; it was taken in "
            f"{lures['followed']}."
        )
    notes += "".join(f" Left out: {name}, because {why}." for name, why in scores.get("left_out", {}).items())
    return page.section(
        "The score beside what it must beat",
        "A score means little alone. The thin line on a bar is its interval, the dashed mark is chance.",
        page.legend(KINDS.items())
        + page.grid(cards, wide=True)
        + page.details("Every category, letters and tests", table + f'<p class="note">{escape(notes)}</p>'),
    )


def choose_items(items: Sequence[Item], answers: Mapping[str, Mapping[str, Any]], count: int) -> list[Item]:
    """`count` items, half of them answered right if there are so many, from all groups, in a fixed order."""

    def spread(candidates: list[Item], groups: Sequence[str]) -> list[Item]:
        by_hash = sorted(candidates, key=lambda item: sha256_text(item.id))
        turns: dict[str, int] = {}
        places: dict[str, tuple[int, int]] = {}
        for item in by_hash:
            turns[item.group] = turns.get(item.group, -1) + 1
            places[item.id] = (turns[item.group], groups.index(item.group))
        return sorted(by_hash, key=lambda item: places[item.id])

    # From either end of the groups, so that a dozen items leave none out.
    right = spread([item for item in items if answers[item.id]["right"]], GROUPS)
    wrong = spread([item for item in items if not answers[item.id]["right"]], GROUPS[::-1])
    num_right = min(len(right), max(count - count // 2, count - len(wrong)))
    picked = right[:num_right] + wrong[: count - num_right]
    return [item for pair in _alternate(picked[:num_right], picked[num_right:]) for item in pair]


def _alternate(first: Sequence[Item], second: Sequence[Item]) -> list[list[Item]]:
    longest = max(len(first), len(second))
    return [[*first[place : place + 1], *second[place : place + 1]] for place in range(longest)]


def heard(
    items: Sequence[Item],
    answers: Mapping[str, Mapping[str, Any]],
    wavs: Mapping[str, bytes],
    count: int,
    every: str,
) -> str:
    """`count` questions with their sounds and answers; `every` is the page that has all of them."""
    chosen = choose_items(items, answers, count)
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
            f"{''.join(page.player(wavs[clip], f'clip of item {item.id}') for clip in item.clips)}"
            f'<p class="ask">{escape(item.question)} {badge}</p>{bars}<p class="note">{escape(note)}</p>'
        )
        cards.append(page.card(item.group, item.category, body, "item"))
    return page.section(
        "Hear what it heard",
        "Right and wrong answers in equal number where there are enough, picked by a fixed rule. Bars are "
        "the model's probabilities; the bold option is right, ◂ marks the one it chose.",
        page.grid(cards)
        + f'<p class="more"><a href="{every}">All {len(items)} questions and every verdict</a></p>',
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


def footer() -> str:
    words = "This page is one file: sounds and pictures travel inside it, and it loads nothing."
    return f"<footer><p>{words}</p></footer>"
