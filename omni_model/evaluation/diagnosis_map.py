"""Where sounds land among words: clouds of clips and of words at several depths of the GPT.

The GPT reads rows, not sounds: a soft token is useful when it lies where the words for that sound lie, or
comes to lie there on its way through the layers. The principal components are fitted on words alone, and
clips are projected into them, so clips cannot shape the axes they are judged in; a second pair is fitted on
both, and shows what divides them.

Legend: N clips, M words, C model width, K components.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from omni_model.config import JSON
from omni_model.evaluation.diagnosis_geometry import (
    Plane,
    Word,
    category_numbers,
    fit_plane,
    modality_gap,
    retrieval,
)
from omni_model.evaluation.diagnosis_states import Cloud, read_texts, reading_of
from omni_model.evaluation.map_picture import Panel, Plot, draw_map
from omni_model.model.omni import OmniModel
from omni_model.text.questions import askable, caption, grammar
from omni_model.text.tokenizer import Tokenizer

PICTURES = {"light": "map.png", "dark": "map-dark.png"}
# The categories whose answers can be told apart best in a small picture; others where clips lack these.
PICTURED = ("colour", "voice", "pitch")
NUM_PICTURED = 3
RETRIEVED = ("transcript", "caption")
FITS = ("text", "joint")

Clip = Mapping[str, Any]


def words_of(clips: Sequence[Clip]) -> list[Word]:
    """Every answer of every category that some clip carries."""
    carried = {name for clip in clips for name in askable(clip["labels"])}
    return [
        (name, option)
        for name, category in grammar().categories.items()
        if name in carried
        for option in category.options
    ]


def word_clouds(
    model: OmniModel, tokenizer: Tokenizer, words: Sequence[Word], depths: Sequence[int]
) -> dict[int, Cloud]:
    """By depth the words, read as in "The colour is red"; several tokens of one word give their mean."""
    readings = [reading_of(tokenizer, option, carrier=f"The {name} is") for name, option in words]
    return _clouds(words, read_texts(model, readings, depths), depths)


def _clouds(
    names: Sequence[Any], read: Sequence[Mapping[int, np.ndarray]], depths: Sequence[int]
) -> dict[int, Cloud]:
    clouds = {depth: Cloud() for depth in depths}
    for name, rows in zip(names, read, strict=True):
        for depth in depths:
            clouds[depth].add(name, rows[depth])
    return clouds


def measure_depth(
    audio: Cloud,
    text: Cloud,
    words: Sequence[Word],
    clips: Sequence[Clip],
    drawn: Sequence[Clip],
    components: int,
) -> dict[str, JSON]:
    """One depth: RMS ratio before the norm, modality gap, cluster numbers, and where words and clips lie."""
    heard, read = audio.points(clip["key"] for clip in clips), text.points(words)
    shown = audio.points(clip["key"] for clip in drawn)
    return {
        "rms_ratio": round(audio.rms / max(text.rms, 1e-12), 4),
        "modality_gap": round(modality_gap(heard, read), 4),
        "categories": category_numbers(
            heard, [askable(clip["labels"]) for clip in clips], dict(zip(words, read, strict=True))
        ),
        "text": _placed(fit_plane([read], components), read, shown),
        "joint": _placed(fit_plane([read, heard], components), read, shown),
    }


def _placed(plane: Plane, words: np.ndarray, clips: np.ndarray) -> dict[str, JSON]:
    return {
        "explained": np.round(plane.explained, 4).tolist(),
        "words": np.round(plane.project(words), 4).tolist(),
        "clips": np.round(plane.project(clips), 4).tolist(),
    }


def retrievals(
    model: OmniModel,
    tokenizer: Tokenizer,
    audio: Mapping[int, Cloud],
    clips: Sequence[Clip],
    confidence: float,
) -> dict[str, dict[int, dict[str, JSON]]]:
    """For transcripts and for captions, by depth: how often a clip finds its own among all that differ.

    Of clips with the same text the first is taken. Kinds with fewer than two texts are left out.
    """
    found: dict[str, dict[int, dict[str, JSON]]] = {}
    limit = model.gpt.config.sequence_len
    for kind in RETRIEVED:
        owners: dict[str, str] = {}
        for clip in clips:
            said, labels = clip.get("transcript", ""), askable(clip["labels"])
            text = said if kind == "transcript" else caption(labels, said) if labels or said else ""
            if text:
                owners.setdefault(text, clip["key"])
        if len(owners) < 2:
            continue
        readings = [reading_of(tokenizer, text, limit=limit) for text in owners]
        texts = _clouds(list(owners), read_texts(model, readings, list(audio)), list(audio))
        found[kind] = {
            depth: retrieval(cloud.points(owners.values()), texts[depth].points(owners), confidence)
            for depth, cloud in audio.items()
        }
    return found


def draw_maps(
    depths: Sequence[Mapping[str, Any]], words: Sequence[Word], drawn: Sequence[Clip]
) -> dict[str, bytes]:
    """File name -> PNG, from what `measure_depth` told of each depth (with its `name`)."""
    labels = [askable(clip["labels"]) for clip in drawn]
    names = list(dict.fromkeys([*PICTURED, *grammar().categories]))
    pictured = [name for name in names if sum(name in label for label in labels) > 1][:NUM_PICTURED]
    panels = [
        Panel(name, grammar().category(name).options, [label.get(name, "") for label in labels])
        for name in pictured
    ]
    plots = [
        {fit: Plot(*(np.array(depth[fit][part]) for part in ("words", "clips", "explained"))) for fit in FITS}
        for depth in depths
    ]
    columns = {depth["name"]: plot for depth, plot in zip(depths, plots, strict=True)}
    return {name: draw_map(panels, words, columns, ground) for ground, name in PICTURES.items()}
