"""The page a stranger reads: one score, what it means, what stands beside it, and sounds to judge by ear.

One self-contained file. It says plainly when a score cannot be told from guessing, and it shows right and
wrong answers in equal number, picked by a fixed rule. It holds no clock: a table of stages and times is put
in place of its one comment, outside the payload.
"""

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from omni_model.artifacts import (
    AdapterCheckpoint,
    AudioCorpus,
    Benchmark,
    Checkpoint,
    Diagnosis,
    EncoderFiles,
    Familiarity,
    GptCheckpoint,
    ProjectorCheckpoint,
    Scores,
)
from omni_model.config import JSON, ReportRecipe, Runtime
from omni_model.evaluation import page
from omni_model.evaluation.benchmark_audio import read_audio
from omni_model.evaluation.benchmark_card import read_card
from omni_model.evaluation.benchmark_item import CHANCE, PASS_MARK, read_items
from omni_model.evaluation.benchmark_page import BENCHMARK_PAGE, write_benchmark_page
from omni_model.evaluation.charts import curve, gauge, percent
from omni_model.evaluation.diagnosis_map import PICTURES
from omni_model.evaluation.diagnosis_sections import map_section, probes_section, words_section
from omni_model.evaluation.familiarity_section import out_of_range
from omni_model.evaluation.learning_sections import curves, listening, read_loss
from omni_model.evaluation.markdown import inline_curve, inline_png, score_table
from omni_model.evaluation.report_sections import (
    carried,
    comparison,
    footer,
    heard,
    read_wavs,
)
from omni_model.evaluation.scoring import read_answers, read_scores
from omni_model.storage import Workspace
from omni_model.telemetry import markdown_table

REPORT, MARKDOWN = "report.html", "report.md"
CAPTIONS = "captions.json"
MEMORISED = (
    "The drop proves plumbing, not alignment: a random GPT memorised {} strings. Gradients flow from the "
    "caption to the projector; nothing shows that a sound found its words."
)
# From this share of one letter on, the page says that the model hardly chose.
STUCK_SHARE = 0.9
EARS = {
    "random": "The ear is a Whisper-shaped encoder with random weights, which nothing has trained: "
    "every step from sound to score runs, but a score near chance is expected.",
    "micro": "The ear is a micro encoder of Whisper's architecture with a closed vocabulary, taught here on "
    "synthetic sounds and voices: it knows the kinds of labels that are asked about, and no others.",
}


def write_report(
    recipe: ReportRecipe,
    scores: Scores,
    diagnosis: Diagnosis,
    familiarity: Familiarity,
    benchmark: Benchmark,
    pretrained: GptCheckpoint,
    aligned: ProjectorCheckpoint,
    tuned: AdapterCheckpoint,
    encoder: EncoderFiles,
    *corpora: AudioCorpus,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: `report.html`, `benchmark.html` and `report.md` of a scored listener.

    Raises:
        BadInput: the benchmark's files changed.
    """
    found, items = read_scores(scores.out), read_items(benchmark)
    answers, wavs = read_answers(scores.out), read_audio(benchmark)
    learned = [
        ("The text model", "next-token loss", pretrained),
        ("The projector", "answer loss, text model frozen", aligned),
        ("The adapter", "answer loss, LoRA and projector", tuned),
    ]
    sizes = [
        ("questions", f"{len(items)}"),
        ("clips", f"{sum(corpus.num_clips for corpus in corpora):,}"),
        ("sound", f"{sum(corpus.duration_s for corpus in corpora) / 60:.0f} min"),
        ("text model", f"{pretrained.num_parameters / 1e6:.2f} M parameters"),
        ("LoRA and projector", f"{tuned.num_parameters / 1e6:.2f} M parameters"),
    ]
    sections = [
        _score_hero(recipe.title, found, encoder.weights, sizes),
        comparison(found),
        heard(items, answers, wavs, recipe.listed_items, BENCHMARK_PAGE),
        out_of_range(familiarity),
        *carried(encoder),
        probes_section(diagnosis),
        map_section(diagnosis),
        words_section(diagnosis),
        listening([("The projector", aligned), ("The adapter", tuned)]),
        curves(learned),
        page.section(
            "AudioBench-mini",
            "The benchmark card: what the score can and cannot say.",
            f'<div class="card">{page.prose(read_card(benchmark.out))}</div>',
        ),
        footer(),
    ]
    headline = headline_of(found)
    (work.out / REPORT).write_text(page.page(f"{recipe.title}: {headline}", sections), encoding="utf-8")
    questions = write_benchmark_page(recipe.title, items, answers, wavs)
    (work.out / BENCHMARK_PAGE).write_text(questions, encoding="utf-8")
    told = [
        f"## {headline}",
        *meaning_of(found, encoder.weights),
        score_table(found),
        inline_png("where sounds land among words", (diagnosis.out / PICTURES["light"]).read_bytes()),
        *[inline_curve(title, what, read_loss(checkpoint)) for title, what, checkpoint in learned],
    ]
    (work.out / MARKDOWN).write_text("\n\n".join(told) + "\n", encoding="utf-8")
    return {"headline": headline, "meaning": " ".join(meaning_of(found, encoder.weights))}


def headline_of(scores: Mapping[str, Any]) -> str:
    """`28.5 % [24.0, 33.1], chance 25 %`."""
    low, high = scores["ci95"]
    return f"{percent(scores['accuracy'])} [{100 * low:.1f}, {100 * high:.1f}], chance {100 * CHANCE:.0f} %"


def meaning_of(scores: Mapping[str, Any], weights: str) -> tuple[str, str]:
    """What a score means and why, in plain words; `weights` says where the encoder's come from."""
    low, high = (100 * end for end in scores["margin_ci95"])
    points = f"between {low:+.1f} and {high:+.1f} points"
    lead = f"its lead over the best guess without audio ({scores['margin_over']}) lies {points}"
    sure = f"{100 * scores['confidence']:g} %"
    probe = percent(scores["baselines"]["linear probe"]["accuracy"])
    ear = EARS.get(weights, f"The ear is the encoder of {weights}.")
    asked, letter = sum(scores["letters"].values()), max(scores["letters"], key=scores["letters"].get)
    most = scores["letters"][letter]
    stuck = f" It answered {letter} in {most} of {asked} askings." if most > STUCK_SHARE * asked else ""
    if low <= 0:
        return (
            "Not distinguishable from guessing.",
            f"With {sure} confidence {lead}. {ear} A linear probe of the encoder's features "
            f"reaches {probe}.{stuck}",
        )
    if not scores["passed"]:
        return (
            f"It hears something, but less than the pass mark of {100 * PASS_MARK:.0f} %.",
            f"With {sure} confidence {lead}. {ear} A linear probe of the encoder's features "
            f"reaches {probe}.{stuck}",
        )
    return (
        "It hears: it answers questions about sounds that it never met.",
        f"With {sure} confidence {lead}. {ear} A linear probe of the encoder's features reaches {probe}.",
    )


def _score_hero(title: str, scores: Mapping[str, Any], weights: str, sizes: Sequence[tuple[str, str]]) -> str:
    meaning, why = meaning_of(scores, weights)
    low, high = scores["ci95"]
    return page.hero(
        f"{title} · AudioBench-mini",
        number=f"{100 * scores['accuracy']:.1f}",
        unit="%",
        beside="of questions about unseen sounds answered right. "
        f"{100 * scores['confidence']:g} % interval {100 * low:.1f} to {100 * high:.1f}.",
        meaning=meaning,
        why=why,
        below=gauge(scores["accuracy"], (low, high), chance=CHANCE, goal=PASS_MARK) + page.facts(sizes),
    )


# --- smoke ---------------------------------------------------------------------------------------


def write_smoke_report(
    recipe: ReportRecipe, overfit: Checkpoint, corpus: AudioCorpus, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: `report.html` and `report.md` of the five-clip run.

    Raises:
        BadInput: the corpus is damaged.
    """
    points = read_loss(overfit)
    captions: list[dict[str, str]] = json.loads((overfit.out / CAPTIONS).read_text(encoding="utf-8"))
    first, last = points[0][1], points[-1][1]
    exact = sum(one["taught"] == one["said"] for one in captions)
    headline = f"loss {first:.2f} -> {last:.2f}, {exact} of {len(captions)} captions reproduced"
    sizes = [
        ("clips", str(corpus.num_clips)),
        ("sound", f"{corpus.duration_s:.0f} s"),
        ("steps", str(overfit.steps)),
        ("parameters", f"{overfit.num_parameters / 1e6:.1f} M"),
    ]
    hero = page.hero(
        recipe.title,
        number=f"{first:.2f} → {last:.2f}",
        unit="nats",
        beside=f"training loss over {overfit.steps} steps; "
        f"{exact} of {len(captions)} captions come back word for word.",
        meaning="The plumbing works, end to end. This is not yet hearing.",
        why=MEMORISED.format(len(captions)),
        below=page.facts(sizes),
    )
    wavs = read_wavs(corpus, {one["key"] for one in captions})
    cards = [_caption_card(one, wavs[one["key"]]) for one in captions]
    learned = page.section(
        "How the loss fell",
        f"{len(captions)} captions, the same batch at every step.",
        f'<div class="card">{curve("Training loss", [("loss", points)])}</div>',
    )
    said = page.section(
        "What was asked, what came out", "Greedy decoding after the last step.", page.grid(cards)
    )
    (work.out / REPORT).write_text(
        page.page(f"{recipe.title}: {headline}", [hero, said, learned, footer()]), encoding="utf-8"
    )
    heads, cells = ("clip", "taught", "said"), [(c["key"], c["taught"], c["said"]) for c in captions]
    told = [
        f"## {headline}",
        MEMORISED.format(len(captions)),
        markdown_table(heads, cells),
        inline_curve("Training loss", "loss", points),
    ]
    (work.out / MARKDOWN).write_text("\n\n".join(told) + "\n", encoding="utf-8")
    return {"headline": headline, "meaning": MEMORISED.format(len(captions))}


def _caption_card(caption: Mapping[str, str], wav: bytes) -> str:
    same = caption["taught"] == caption["said"]
    badge = f'<span class="badge {"right" if same else "false"}">{"same" if same else "differs"}</span>'
    body = (
        page.player(wav, f"clip {caption['key']}")
        + f'<p class="note">taught</p><p class="ask">{escape(caption["taught"])}</p>'
        f'<p class="note">said {badge}</p><p class="ask">{escape(caption["said"])}</p>'
    )
    return page.card(caption["key"], "", body, "item")
