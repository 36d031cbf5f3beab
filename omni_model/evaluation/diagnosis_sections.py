"""The sections of a report that look inside a listener, each from what `diagnose` has measured."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from omni_model.artifacts import Diagnosis
from omni_model.evaluation import page
from omni_model.evaluation.charts import percent
from omni_model.evaluation.diagnosis import read_diagnosis
from omni_model.evaluation.diagnosis_map import PICTURES
from omni_model.text.questions import grammar

FULL_HEAT = 60  # per cent of the colour where a reader is always right
SHOWN_SOFT_TOKENS = 24
SHOWN_NEIGHBOURS = 4
UNREADABLE = "·"  # for bytes that are no character of their own


def probes_section(diagnosis: Diagnosis) -> str:
    """A heat table of labels by places: what a linear reader finds on the way from the ear into the GPT."""
    numbers = read_diagnosis(diagnosis.out)
    places, probes = numbers["places"], numbers["probes"]
    names = [name for name in grammar().categories if name in probes]
    names += [name for name in probes if name not in names]
    ears = numbers["encoder_layers"]
    heads = ["label", "clips", "guessing", *places, *(["best layer"] if len(ears) > 1 else []), "lost at"]
    rows = "".join(_probe_row(name, probes[name], places, ears) for name in names)
    head = "".join(f"<th>{escape(word)}</th>" for word in heads)
    clips = numbers["clips"]
    lead = (
        "A linear classifier reads each label at each place that a sound passes: the ear's frames, the "
        "projector's soft tokens, the text model half-way. Where the colour fades, the label gets lost."
    )
    note = (
        f"Readers learn from {clips['train']:,} clips and are judged on test clips, the same at every place; "
        "guessing is always giving the commonest answer. Below each share its interval. A label counts as "
        "lost at the first place whose interval lies below an earlier one's."
    )
    if (weights := numbers["layer_weights"]) and len(weights) > 1:
        parts = ", ".join(f"{layer} {percent(weights[layer])}" for layer in ears)
        note += f" Of the layers the projector reads {parts}."
    table = f'<table class="heat"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return page.section(
        "Where each texture lives, and where it gets lost",
        lead,
        f'<div class="card"><div class="scroll">{table}</div><p class="note">{escape(note)}</p></div>',
    )


def _probe_row(name: str, probe: Mapping[str, Any], places: Sequence[str], ears: Sequence[str]) -> str:
    cells = [f"<td>{escape(name)}</td><td>{probe['n']}</td><td>{percent(probe['chance'])}</td>"]
    for place in places:
        found = probe["places"][place]
        above = (found["accuracy"] - probe["chance"]) / max(1 - probe["chance"], 1e-9)
        low, high = (100 * end for end in found["ci95"])
        cells.append(
            f'<td class="hot" style="--heat:{FULL_HEAT * max(above, 0.0):.0f}%">{percent(found["accuracy"])}'
            f"<small>{low:.0f} to {high:.0f}</small></td>"
        )
    if len(ears) > 1:
        cells.append(f"<td>{escape(probe['best_layer'])}</td>")
    heard = any(probe["places"][ear]["ci95"][0] > probe["chance"] for ear in ears)
    lost = probe["lost_at"] or ("nowhere" if heard else "never found")
    return f"<tr>{''.join(cells)}<td>{escape(lost)}</td></tr>"


def map_section(diagnosis: Diagnosis) -> str:
    """The pictures of clips among words, with the numbers that a picture cannot prove."""
    numbers = read_diagnosis(diagnosis.out)
    depths = numbers["depths"]
    light, dark = (
        page.data_uri("image/png", (diagnosis.out / PICTURES[ground]).read_bytes())
        for ground in ("light", "dark")
    )
    names = ", ".join(depth["name"] for depth in depths)
    words = f"Scatter plots of clips and words in planes of principal components, at these depths: {names}."
    caption = (
        "Dots are clips in the colour of their true answer, framed words are the answers of that category, "
        "crosses are other words; the axes are the first two principal components of the words alone, with "
        "their shares of the variance. Where hearing works, dots of one colour gather, and near their word. "
        "The last row is fitted on both: clips as dots, words as crosses."
    )
    gaps = page.table(
        ("depth", "clips' RMS over words'", "gap between the clouds, in radii"),
        [(depth["name"], f"{depth['rms_ratio']:.2f}", f"{depth['modality_gap']:.2f}") for depth in depths],
    )
    tables = "".join(
        f"<h3>{escape(depth['name'])}</h3>{_cluster_table(depth['categories'])}" for depth in depths
    )
    note = (
        f"Measured in the full space on {numbers['clips']['test']} test clips. Rows are normed as a layer "
        "reads them, RMS is taken before; separation runs from -1 to 1."
    )
    return page.section(
        "Where sounds land among words",
        "The text model reads rows of numbers. These are the rows that clips become, among those of words, "
        "as they enter and on their way through the layers.",
        '<figure class="card map"><div class="scroll"><picture>'
        f'<source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(words)}"></picture></div>'
        f'<figcaption class="note">{escape(caption)}</figcaption></figure>'
        + page.details("Cluster numbers", f'{gaps}{tables}<p class="note">{escape(note)}</p>'),
    )


def _cluster_table(categories: Mapping[str, Any]) -> str:
    rows = [
        (
            name,
            str(one["n"]),
            percent(one["centroid_accuracy"]),
            percent(one["chance"]),
            f"{one['separation']:+.2f}",
            percent(one["word_match"]),
        )
        for name, one in categories.items()
    ]
    header = ("category", "clips", "nearest own centroid", "chance", "separation", "nearest own word")
    return page.table(header, rows)


def words_section(diagnosis: Diagnosis) -> str:
    """What it writes down when asked for the words, what text a clip finds, what soft tokens resemble."""
    numbers = read_diagnosis(diagnosis.out)
    parts = []
    if said := numbers["transcription"]:
        parts.append(_transcription(said))
    if numbers["retrieval"]:
        parts.append(_retrieval(numbers["retrieval"], [depth["name"] for depth in numbers["depths"]]))
    cards = "".join(_lens_card(clip) for clip in numbers["lens"])
    note = (
        "Each box is one soft token, in the order of the clip: the vocabulary's entries nearest to it by "
        f"cosine, the nearest first. {UNREADABLE} stands for single bytes that are no character."
    )
    parts.append(page.details("The words nearest to soft tokens", f'<p class="note">{note}</p>{cards}'))
    return page.section(
        "What it says it heard",
        "Asked to write down what is said, and asked which of many texts belongs to a clip.",
        "\n".join(parts),
    )


def _transcription(said: Mapping[str, Any]) -> str:
    beside = said["shuffled"]
    figures = page.facts(
        [
            (f"words wrong, WER [{_ends(said['wer_ci95'])}]", percent(said["wer"])),
            (f"characters wrong, CER [{_ends(said['cer_ci95'])}]", percent(said["cer"])),
            (f"WER on the wrong clip [{_ends(beside['wer_ci95'])}]", percent(beside["wer"])),
            (f"of {said['n']} clips without a mistake", percent(said["flawless"])),
        ]
    )
    rows = [(one["said"], one["heard"] or "(nothing)", str(one["word_errors"])) for one in said["examples"]]
    table = page.table(("said", "heard", "words wrong"), rows, numbers_from=2)
    note = (
        f"“{said['question']}”, answered by the likeliest token each time; {said['words']:,} words of test "
        "clips, case and punctuation aside. The wrong clip is another one of the same test clips."
    )
    sources = [
        (
            name,
            str(one["n"]),
            f"{percent(one['wer'])} [{_ends(one['wer_ci95'])}]",
            f"{percent(one['cer'])} [{_ends(one['cer_ci95'])}]",
        )
        for name, one in said["sources"].items()
    ]
    apart = page.table(("source", "clips", "WER", "CER"), sources, numbers_from=1) if len(sources) > 1 else ""
    return f'{figures}{apart}<div class="card examples">{table}<p class="note">{escape(note)}</p></div>'


def _retrieval(retrieval: Mapping[str, Mapping[str, Any]], depths: Sequence[str]) -> str:
    rows = [
        (
            kind,
            depth,
            str(one["n"]),
            f"{percent(one['r1'])} [{_ends(one['r1_ci95'])}]",
            percent(one["r1_chance"]),
            f"{percent(one['r10'])} [{_ends(one['r10_ci95'])}]",
            percent(one["r10_chance"]),
        )
        for kind, by_depth in sorted(retrieval.items(), reverse=True)
        for depth in depths
        for one in [by_depth[depth]]
    ]
    header = ("own text", "depth", "clips", "found first (R@1)", "chance", "among ten (R@10)", "chance")
    note = (
        "The mean of a clip's rows looks for the mean of its own text's rows among all texts that differ, by "
        "cosine, clips and texts each seen from their own middle. Input is the depth to compare by: there "
        "soft tokens stand in for words."
    )
    table = page.table(header, rows, numbers_from=2)
    return page.details(
        "Which text a clip finds", f'<div class="card">{table}<p class="note">{escape(note)}</p></div>'
    )


def _lens_card(clip: Mapping[str, Any]) -> str:
    said = f"“{clip['transcript']}”" if clip["transcript"] else "no words"
    labels = ", ".join(f"{name} {value}" for name, value in sorted(clip["labels"].items()))
    boxes = []
    for near in clip["soft_tokens"][:SHOWN_SOFT_TOKENS]:
        first, *others = (readable(one["text"]) for one in near[:SHOWN_NEIGHBOURS])
        boxes.append(f"<li><b>{escape(first)}</b><span>{escape(' '.join(others))}</span></li>")
    if len(clip["soft_tokens"]) > SHOWN_SOFT_TOKENS:
        boxes.append("<li><b>…</b></li>")
    return page.card(said, labels, f'<ol class="lens">{"".join(boxes)}</ol>', "lensed")


def readable(text: str) -> str:
    """A vocabulary entry as a person can read it."""
    words = " ".join(text.split())
    return words if words and all(c.isprintable() and c != "\ufffd" for c in words) else UNREADABLE


def _ends(interval: Sequence[float]) -> str:
    low, high = (100 * end for end in interval)
    return f"{low:.1f}, {high:.1f}"
