"""What came in: a page about one corpus and the features made of it, with everything that was left out.

A corpus that silently lost a tenth of its clips looks like a good one. So the first figure is how much sound
there is, and beside it stands what was dropped or changed, by reason, with names.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from omni_model.artifacts import AudioCorpus, EncoderFiles, FeatureShards, sha256_text
from omni_model.audio.corpora import read_clips, read_index
from omni_model.config import JSON, ReportRecipe, Runtime
from omni_model.evaluation import page
from omni_model.evaluation.report_sections import footer, read_wavs
from omni_model.storage import Workspace
from omni_model.telemetry import markdown_table

MUCH_SHARE = 0.01  # losing more of a corpus says that something is wrong with its source

Clip = Mapping[str, Any]


def write_sound_report(
    recipe: ReportRecipe,
    corpus: AudioCorpus,
    encoder: EncoderFiles,
    features: FeatureShards,
    *,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: `report.html` and `report.md` of a corpus and its features.

    Raises:
        BadInput: the corpus is damaged.
    """
    clips, index = read_clips(corpus), read_index(corpus)
    clips_in_words = f"{corpus.num_clips:,} clip{'' if corpus.num_clips == 1 else 's'}"
    headline = f"{duration(corpus.duration_s)} of sound in {clips_in_words}"
    left_out = sum(index["dropped"].values())
    meaning = _meaning(left_out, corpus.num_clips, index)
    frames = f"{features.num_frames:,} frames of {features.width}, {features.frame_rate_hz} a second"
    sizes = [
        ("clips", f"{corpus.num_clips:,}"),
        ("left out", f"{left_out:,}"),
        ("speakers", f"{len({clip['speaker'] for clip in clips} - {''}):,}"),
        ("encoder", encoder.weights),
        ("features", frames),
    ]
    hero = page.hero(
        recipe.title,
        number=duration(corpus.duration_s),
        unit="of sound",
        beside=f"in {clips_in_words}",
        meaning=meaning,
        why=f"The encoder turned them into {frames}.",
        below=page.facts(sizes),
    )
    sections = [hero, _losses(index), _contents(clips), _listen(corpus, clips, recipe.listed_items), footer()]
    text = page.page(f"{recipe.title}: {headline}", sections)
    (work.out / "report.html").write_text(text, encoding="utf-8")
    told = [f"## {headline}", meaning, markdown_table(("what happened", "why", "clips"), _loss_rows(index))]
    (work.out / "report.md").write_text("\n\n".join(told) + "\n", encoding="utf-8")
    return {"headline": headline, "meaning": meaning}


def duration(seconds: float) -> str:
    """12.3 s, 4.5 min or 100.6 h."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _meaning(left_out: int, kept: int, index: Mapping[str, Any]) -> str:
    if not left_out:
        return "Every recording is in it."
    reasons = ", ".join(f"{count} {reason}" for reason, count in _by_count(index["dropped"]))
    much = " That is much: look at the source." if left_out > MUCH_SHARE * (left_out + kept) else ""
    return f"{left_out:,} {'was' if left_out == 1 else 'were'} left out: {reasons}.{much}"


def _by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))


def _loss_rows(index: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    dropped = [("left out", reason, f"{count:,}") for reason, count in _by_count(index["dropped"])]
    changed = [("changed", reason, f"{count:,}") for reason, count in _by_count(index["changed"])]
    return [*dropped, *changed] or [("nothing", "every clip is as it was recorded", "0")]


def _losses(index: Mapping[str, Any]) -> str:
    body = page.table(("what happened", "why", "clips"), _loss_rows(index), numbers_from=2)
    if index["dropped_names"]:
        names = page.table(("recording", "why"), index["dropped_names"], numbers_from=2)
        body += page.details(f"The first {len(index['dropped_names'])} that were left out", names)
    return page.section(
        "What was left out, what was changed",
        "A recording that cannot be used is left out whole; one that only has to be fitted is changed.",
        f'<div class="card">{body}</div>',
    )


def _contents(clips: Sequence[Clip]) -> str:
    lengths_s = np.array([clip["duration_s"] for clip in clips])
    shortest, middle, longest = (duration(float(x)) for x in np.quantile(lengths_s, (0, 0.5, 1)))
    rows = [("length", f"{shortest} to {longest}, half below {middle}", f"{len(clips):,}")]
    for name in ("split", "licence"):
        rows += [(name, value, f"{count:,}") for value, count in _by_count(Counter(c[name] for c in clips))]
    words = sum(bool(clip["transcript"]) for clip in clips)
    rows.append(("transcript", "has one", f"{words:,}"))
    labels: dict[str, Counter[str]] = {}
    for clip in clips:
        for category, value in clip["labels"].items():
            labels.setdefault(category, Counter())[value] += 1
    for category in sorted(labels):
        rows += [(category, value, f"{count:,}") for value, count in _by_count(labels[category])]
    return page.section(
        "What is in it",
        "Labels are what questions can be asked about.",
        f'<div class="card">{page.table(("", "", "clips"), rows, numbers_from=2)}</div>',
    )


def _listen(corpus: AudioCorpus, clips: Sequence[Clip], count: int) -> str:
    """A few clips to hear, picked by a hash of their keys: the same ones every time, and from everywhere."""
    chosen = sorted(clips, key=lambda clip: sha256_text(clip["key"]))[:count]
    wavs = read_wavs(corpus, {clip["key"] for clip in chosen})
    cards = [_card(clip, wavs[clip["key"]]) for clip in chosen]
    return page.section("Hear some of it", "Picked by a fixed rule.", page.grid(cards))


def _card(clip: Clip, wav: bytes) -> str:
    told = [clip["transcript"], ", ".join(f"{k} {v}" for k, v in sorted(clip["labels"].items()))]
    told += [", ".join(clip.get("changes", []))]
    notes = "".join(f'<p class="note">{escape(text)}</p>' for text in told if text)
    body = page.player(wav, f"clip {clip['key']}") + notes
    return page.card(clip["key"], duration(clip["duration_s"]), body, "item")
