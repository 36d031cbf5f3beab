"""Learning what is familiar, and measuring how well strange sounds are told from it.

The strange sounds that are judged, and the words and tones of a foreign synthesizer, come from
`audio.strange`; nothing of them is learned from.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_model import hardware
from omni_model.artifacts import AdapterCheckpoint, FeatureShards, GptCheckpoint, TokenizerFiles
from omni_model.audio.reader import FeatureReader
from omni_model.audio.strange import NONSENSE_KIND, STRANGE, TAUGHT
from omni_model.config import JSON, BadInput, FamiliarityRecipe, Runtime
from omni_model.evaluation.answering import Listener
from omni_model.evaluation.familiarity_known import (
    NUM_TAUGHT,
    Known,
    familiarity,
    fit,
    has_words,
    pool,
    write_known,
)
from omni_model.evaluation.labelled import score_foreign
from omni_model.evaluation.statistics import wilson_interval
from omni_model.model.lora import merged
from omni_model.model.omni import OmniModel
from omni_model.model.weights import load_listener
from omni_model.storage import Workspace
from omni_model.text.tokenizer import load_tokenizer
from omni_model.training.teaching import check_belonging

MEASURED = "familiarity.json"
MOST_FAMILIAR = 0.98  # of a limit; nearer to 1, distances would mean nothing


def learn_familiarity(
    recipe: FamiliarityRecipe,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    strange: FeatureShards,
    *features: FeatureShards,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: what is known (`familiarity.safetensors`), and how well it tells (`familiarity.json`).

    Args:
        strange: features of a corpus by `synthesize_strange`.
        features: what the listener is taught and judged by.

    Raises:
        BadInput: no clips to learn or to calibrate on, features that differ in the way they were made, or a
            listener that was taught on others.
    """
    reader, others = FeatureReader(*features), FeatureReader(strange)
    if reader.policy != others.policy:
        raise BadInput(f"{strange.uri} holds other features than {features[0].uri}; extract both in one way.")
    check_belonging(adapter, gpt, reader)
    known = learn(recipe, reader, others, work.seed)
    write_known(known, work.out)
    model = load_listener(gpt, adapter).to(hardware.device())
    listener = Listener(
        OmniModel(merged(model.gpt), model.projector), load_tokenizer(tokenizer.out), others.frames
    )
    told = measure_familiarity(known, reader, others) | {"foreign": score_foreign(listener, others, known)}
    (work.out / MEASURED).write_text(json.dumps(told, sort_keys=True, indent=1) + "\n", encoding="utf-8")
    marked = {f"{kind}_marked": numbers["marked"] for kind, numbers in told["strange"].items()}
    work.metrics.summary(in_range_marked=told["in_range"].get("marked", 0.0), **marked)
    return {"words_limit": round(known.limits[0], 6), "sounds_limit": round(known.limits[1], 6)}


def learn(recipe: FamiliarityRecipe, reader: FeatureReader, strange: FeatureReader, seed: int) -> Known:
    """What is known from both, with its limits from the validation split of `reader`.

    Raises:
        BadInput: no nonsense, or nothing to calibrate on.
    """
    nonsense = _of_kind(strange, NONSENSE_KIND)
    validation = reader.by_split("validation")
    for name, clips in (("nonsense clips", nonsense), ("clips of the validation split", validation)):
        if not clips:
            raise BadInput(f"there are no {name} to learn familiarity from; make the corpora larger.")
    taught = [(reader, clip) for clip in _drawn(reader.by_split("train"), recipe.taught_clips, seed)]
    examples = [*taught, *((strange, clip) for clip in (*_of_kind(strange, TAUGHT), *nonsense))]
    pooled = np.stack([pool(source.frames(clip["key"])) for source, clip in examples])
    known = fit(pooled, [vote_of(clip) for _, clip in examples], recipe.components, seed)
    votes = known.votes_for(_pooled(reader, validation))
    words, heard = has_words(votes), familiarity(votes)
    limits = [
        min(float(np.quantile(heard[own], recipe.marked_share)), MOST_FAMILIAR)
        if own.any()
        else MOST_FAMILIAR
        for own in (words, ~words)
    ]
    return dataclasses.replace(known, limits=(limits[0], limits[1]), policy=reader.policy)


def _of_kind(reader: FeatureReader, kind: str) -> list[dict[str, Any]]:
    return [clip for clip in reader.clips if clip["provenance"].get("kind") == kind]


def _drawn(clips: Sequence[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """At most `count` clips, half of them with words and half without where there are enough."""
    rng = np.random.default_rng(seed)
    parts = [[clip for clip in clips if bool(clip["transcript"]) is spoken] for spoken in (True, False)]
    return [part[place] for part in parts for place in sorted(rng.permutation(len(part))[: count // 2])]


def vote_of(clip: Mapping[str, Any]) -> int:
    """The place in VOTES of a known clip."""
    first = NUM_TAUGHT if clip["provenance"].get("kind") == NONSENSE_KIND else 0
    return first if clip["transcript"] else first + 1


def _pooled(reader: FeatureReader, clips: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.stack([pool(reader.frames(clip["key"])) for clip in clips])


# --- measuring -----------------------------------------------------------------------------------


def measure_familiarity(known: Known, reader: FeatureReader, strange: FeatureReader) -> dict[str, Any]:
    """What share is marked "not sure": of test clips, and of strange sounds by kind and style.

    Every share has its Wilson interval (95 %), every group the median distance from training.
    """
    told: dict[str, Any] = {"schema": 1, "limits": [round(limit, 6) for limit in known.limits]}
    for name, split in (("in_range", "test"), ("calibrated_on", "validation")):
        clips = reader.by_split(split)
        told[name] = dict(_marked(known, reader, clips)) if clips else {}
        groups = {"words": True, "sounds": False}
        told[name]["parts"] = {
            part: _marked(known, reader, own)
            for part, spoken in groups.items()
            if (own := [clip for clip in clips if bool(clip["transcript"]) is spoken])
        }
    told["strange"] = {}
    for kind in STRANGE:
        if clips := _of_kind(strange, kind):
            styles = sorted({clip["provenance"]["style"] for clip in clips})
            of_style = {style: [c for c in clips if c["provenance"]["style"] == style] for style in styles}
            told["strange"][kind] = _marked(known, strange, clips) | {
                "styles": {style: _marked(known, strange, some) for style, some in of_style.items()}
            }
    return told


def _marked(known: Known, reader: FeatureReader, clips: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    distances = known.distances(known.votes_for(_pooled(reader, clips)))
    marked = int((distances > 1).sum())
    return {
        "clips": len(clips),
        "marked": round(marked / len(clips), 4),
        "ci95": wilson_interval(marked, len(clips)).rounded(),
        "median_distance": round(float(np.median(distances)), 4),
    }


def read_familiarity(directory: Path) -> dict[str, Any]:
    """The content of `familiarity.json` in a payload directory."""
    return dict(json.loads((directory / MEASURED).read_text(encoding="utf-8")))
