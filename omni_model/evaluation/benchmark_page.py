"""Every question of the benchmark to hear and to read, with what each scorer and each baseline took.

One self-contained page like the report. Sounds travel as FLAC, which browsers play and which loses nothing:
two hundred clips are 5 MB. Filters are radio buttons and CSS; there is no script.
"""

import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import soundfile

from omni_model.audio.waveform import SAMPLE_RATE_HZ
from omni_model.evaluation import page
from omni_model.evaluation.benchmark_item import GROUPS, Item
from omni_model.evaluation.charts import waveform
from omni_model.evaluation.score_summary import SHUFFLED, UNHEARD

BENCHMARK_PAGE = "benchmark.html"
PLACES = ("first clip", "second clip")
WAVE_BARS = 40
SHOWN_BESIDE = (UNHEARD, SHUFFLED)  # the other baselines are folded away

Answer = Mapping[str, Any]


def write_benchmark_page(
    title: str, items: Sequence[Item], answers: Mapping[str, Answer], wavs: Mapping[str, bytes]
) -> str:
    """The page as HTML.

    Args:
        answers: of every item, as `read_answers` gives them.
        wavs: of every clip, as `read_audio` gives them.
    """
    right = sum(bool(answers[item.id]["right"]) for item in items)
    flacs = {key: flac_of(wav) for key, wav in wavs.items()}
    cards = [_card(item, answers[item.id], wavs, flacs) for item in items]
    lead = (
        "Each with its sound, its options, and what was answered. Bars are the model's probabilities of the "
        "letters, averaged over four orders of the options; the bold option is right, ◂ marks the chosen one."
    )
    hero = (
        f'<header class="hero">\n<h1>{escape(title)} · AudioBench-mini</h1>\n<p class="meaning">{right} of '
        f'{len(items)} questions answered right.</p>\n<p class="why">{escape(lead)}</p>\n</header>'
    )
    body = f'<div class="browse">\n{_filters(items, right)}\n{page.grid(cards)}\n</div>'
    foot = "<footer><p>This page is one file: its sounds travel inside it, and it loads nothing.</p></footer>"
    listed = page.section("Every question", "Choose a group, and right or wrong answers.", body)
    return page.page(f"{title}: every question of AudioBench-mini", [hero, listed, foot])


def flac_of(wav: bytes) -> bytes:
    """The same samples as a FLAC file."""
    target = io.BytesIO()
    samples = np.frombuffer(_pcm(wav), dtype="<i2")
    soundfile.write(target, samples, SAMPLE_RATE_HZ, format="FLAC", subtype="PCM_16")
    return target.getvalue()


def _pcm(wav: bytes) -> bytes:
    start = wav.find(b"data")
    return wav[start + 8 : start + 8 + int.from_bytes(wav[start + 4 : start + 8], "little")]


def _filters(items: Sequence[Item], right: int) -> str:
    """Two rows of radio buttons, before what they filter: `report.css` says what each leaves visible."""
    groups = [group for group in GROUPS if any(item.group == group for item in items)]
    counts = [(group, sum(item.group == group for item in items)) for group in groups]
    rows = [
        ("group", [("every-group", "all groups", len(items)), *((g, g, n) for g, n in counts)]),
        (
            "verdict",
            [
                ("every-verdict", "right and wrong", len(items)),
                ("right", "right", right),
                ("wrong", "wrong", len(items) - right),
            ],
        ),
    ]
    return "<hr>\n".join(
        "".join(
            f'<input type="radio" name="{name}" id="only-{key}"{"" if place else " checked"}>'
            f'<label for="only-{key}">{escape(words)} <small>{count}</small></label>\n'
            for place, (key, words, count) in enumerate(choices)
        )
        for name, choices in rows
    )


def _card(item: Item, answer: Answer, wavs: Mapping[str, bytes], flacs: Mapping[str, bytes]) -> str:
    badge = "right" if answer["right"] else "wrong"
    bars = page.option_bars(
        [(option, answer["probabilities"][option]) for option in item.options],
        truth=item.key,
        picked=str(answer["chosen"]),
    )
    beside = answer["beside"]
    others = [name for name in beside if name not in SHOWN_BESIDE]
    verdicts = [
        ("letters", answer["chosen"], f"right in {answer['right_rotations']} of 4 orders"),
        ("likelihood", answer["likelihood_chosen"], _gain(answer)),
        ("text", answer["text_chosen"], f"wrote “{answer['text']}”"),
        *((name, beside[name], "") for name in SHOWN_BESIDE if name in beside),
    ]
    told = [
        *([f"The words are “{item.transcript}”."] if item.transcript else []),
        *([f"“{item.lure}” is true of something else in it."] if item.lure else []),
        *([f"One of the pair {item.pair}: the same words with another sound."] if item.pair else []),
    ]
    return (
        f'<article class="card item {item.group} is-{badge}" id="{item.id}">'
        f"<h3>{escape(item.group)}: {escape(item.category)}<span>{item.id}</span></h3>"
        + "".join(_player(item, place, wavs[key], flacs[key]) for place, key in enumerate(item.clips))
        + f'<p class="ask">{escape(item.question)} '
        f'<span class="badge {"right" if answer["right"] else "false"}">{badge}</span></p>{bars}'
        + _verdicts(item, verdicts)
        + page.details("Other baselines", _verdicts(item, [(name, beside[name], "") for name in others]))
        + (f'<p class="note">{escape(" ".join(told))}</p>' if told else "")
        + "</article>"
    )


def _gain(answer: Answer) -> str:
    return f"{answer['likelihood'][answer['likelihood_chosen']]:+.2f} nats a token by hearing"


def _player(item: Item, place: int, wav: bytes, flac: bytes) -> str:
    """The waveform and a player of one clip; its words do not give the answer away."""
    name = PLACES[place] if len(item.clips) > 1 else "clip"
    words = f"{name} of item {item.id}"
    label = f'<p class="note">{name}</p>' if len(item.clips) > 1 else ""
    source = page.data_uri("audio/flac", flac)
    return (
        label
        + waveform(page.pcm_of(wav), words=f"Waveform of {words}", bars=WAVE_BARS)
        + f'<audio controls preload="none" aria-label="{escape(words)}" src="{source}"></audio>'
    )


def _verdicts(item: Item, verdicts: Sequence[tuple[str, str | None, str]]) -> str:
    """Who took which option, with a mark for right or wrong, and a remark."""
    rows = []
    for name, taken, remark in verdicts:
        right = taken == item.key
        mark = '<b class="yes">right</b>' if right else '<b class="no">wrong</b>'
        option = "no option" if taken is None else taken
        rows.append(
            f"<tr><td>{escape(name)}</td><td>{escape(option)} <small>{escape(remark)}</small></td>"
            f"<td>{mark}</td></tr>"
        )
    return f'<table class="verdicts"><tbody>{"".join(rows)}</tbody></table>'
