"""What goes on inside a listener: where textures live, where sounds land among words, what it writes down.

A score says whether a model hears, and not why. Here everything is measured along the way of a sound, from
the encoder's layers through the projector into the GPT: whoever wants it to hear more sees where to work.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omni_model import hardware
from omni_model.artifacts import AdapterCheckpoint, FeatureShards, GptCheckpoint, TokenizerFiles
from omni_model.audio.clips import SPLITS
from omni_model.audio.probe import pool
from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON, BadInput, DiagnosisRecipe, Runtime
from omni_model.evaluation.diagnosis_map import draw_maps, measure_depth, retrievals, word_clouds, words_of
from omni_model.evaluation.diagnosis_probes import (
    Place,
    choose_clips,
    encoder_places,
    pool_layers,
    probe_places,
)
from omni_model.evaluation.diagnosis_states import (
    Cloud,
    depth_name,
    depths_of,
    hear_clips,
    middle_of,
    normed,
)
from omni_model.evaluation.diagnosis_words import nearest_words, transcription
from omni_model.evaluation.statistics import Bootstrap
from omni_model.model.omni import OmniModel
from omni_model.model.weights import load_listener
from omni_model.storage import Workspace
from omni_model.text.tokenizer import Tokenizer, load_tokenizer

DIAGNOSIS = "diagnosis.json"
LENS_CLIPS = 8
PROJECTED, HALF_WAY = "projector", "GPT, half-way"
STEPS = 6

Clip = Mapping[str, Any]


def diagnose(
    recipe: DiagnosisRecipe,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    *features: FeatureShards,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: `diagnosis.json` and `map.png` (`map-dark.png`, the same on dark ground).

    Raises:
        BadInput: there are no test clips, or too many components were asked for.
    """
    reader, tokens = FeatureReader(*features), load_tokenizer(tokenizer.out)
    if not reader.by_split("test"):
        raise BadInput("the features hold no test clips; make the corpora with clips.test of 1 or more")
    model = load_listener(gpt, adapter).eval().to(hardware.device())
    num_layers = model.gpt.config.n_layer
    depths = {depth: depth_name(depth, num_layers) for depth in depths_of(num_layers)}
    chosen = {s: choose_clips(reader.by_split(s), recipe.probe_clips, work.seed) for s in SPLITS}
    tested, words = chosen["test"], words_of(reader.clips)
    spoken = [clip for clip in reader.by_split("test") if clip.get("transcript")]
    transcribed = choose_clips(spoken, recipe.transcribed_clips, work.seed)
    drawn = choose_clips(tested, recipe.clips, work.seed)
    bootstrap = Bootstrap(work.seed, recipe.bootstrap_draws, recipe.confidence)
    done = iter(range(1, STEPS + 1))

    def told(figure: Any) -> Any:
        work.metrics.log(next(done), STEPS)
        return figure

    places, audio = told(listen(model, reader, chosen))
    ears = encoder_places(reader.policy)
    text = told(word_clouds(model, tokens, words, list(depths)))
    everyone = [clip for split in SPLITS for clip in chosen[split]]
    found = retrievals(model, tokens, audio, tested, recipe.confidence)
    numbers: dict[str, Any] = {
        "schema": 1,
        "confidence": recipe.confidence,
        "clips": {split: len(clips) for split, clips in chosen.items()},
        "places": [place.name for place in places],
        "encoder_layers": ears,
        "layer_weights": layer_weights(model, ears),
        "probes": told(probe_places(everyone, places, ears, recipe.confidence)),
        "words": [{"category": category, "word": word} for category, word in words],
        "drawn": [{"key": clip["key"], "labels": clip["labels"]} for clip in drawn],
        "depths": [
            {
                "name": name,
                **measure_depth(audio[depth], text[depth], words, tested, drawn, recipe.components),
            }
            for depth, name in depths.items()
        ],
        "retrieval": told({kind: {depths[d]: one for d, one in by.items()} for kind, by in found.items()}),
        "transcription": told(transcription(model, tokens, reader, transcribed, bootstrap, work.seed)),
        "lens": lens(model, tokens, reader, choose_clips(tested, LENS_CLIPS, work.seed)),
    }
    (work.out / DIAGNOSIS).write_text(json.dumps(numbers, sort_keys=True, indent=1) + "\n", encoding="utf-8")
    for name, picture in told(draw_maps(numbers["depths"], words, drawn)).items():
        (work.out / name).write_bytes(picture)
    work.metrics.summary(**headline(numbers))
    return {"num_points": len(words) + len(drawn)}


def listen(
    model: OmniModel, reader: FeatureReader, chosen: Mapping[str, Sequence[Clip]]
) -> tuple[list[Place], dict[int, Cloud]]:
    """Every chosen clip once: its pooled rows at each place of the way, and test clips as clouds by depth."""
    ears = [Place(name) for name in encoder_places(reader.policy)]
    projected, half_way = Place(PROJECTED), Place(HALF_WAY)
    num_layers = model.gpt.config.n_layer
    middle, depths = middle_of(num_layers), depths_of(num_layers)
    clouds = {depth: Cloud() for depth in depths}
    for split, clips in chosen.items():
        for heard in hear_clips(model, reader, clips, depths if split == "test" else (0, middle)):
            for place, pooled in zip(ears, pool_layers(heard.frames, len(ears)), strict=True):
                place.pooled[heard.key] = pooled
            projected.pooled[heard.key] = pool(normed(heard.rows[0]))
            half_way.pooled[heard.key] = pool(normed(heard.rows[middle]))
            for depth in depths if split == "test" else ():
                clouds[depth].add(heard.key, heard.rows[depth])
    return [*ears, projected, half_way], clouds


def layer_weights(model: OmniModel, ears: Sequence[str]) -> dict[str, float] | None:
    """How much of each encoder layer the projector reads; None where it does not weigh whole layers."""
    weights = model.projector.layer_weights.tolist()
    if len(weights) != len(ears):
        return None
    return {name: round(weight, 4) for name, weight in zip(ears, weights, strict=True)}


def lens(
    model: OmniModel, tokenizer: Tokenizer, reader: FeatureReader, clips: Sequence[Clip]
) -> list[dict[str, Any]]:
    """Some clips, and the words nearest to each of their soft tokens."""
    rows = {heard.key: heard.rows[0] for heard in hear_clips(model, reader, clips, (0,))}
    near = nearest_words(model, tokenizer, [rows[clip["key"]] for clip in clips])
    return [
        {
            "key": clip["key"],
            "labels": clip["labels"],
            "transcript": clip.get("transcript", ""),
            "soft_tokens": tokens,
        }
        for clip, tokens in zip(clips, near, strict=True)
    ]


def headline(numbers: Mapping[str, Any]) -> dict[str, float]:
    """The figures that stand for the whole diagnosis."""
    first = numbers["depths"][0]
    told = {"rms_ratio": first["rms_ratio"], "modality_gap": first["modality_gap"]}
    for kind, by_depth in numbers["retrieval"].items():
        told[f"{kind}_r1"] = by_depth[first["name"]]["r1"]
    if said := numbers["transcription"]:
        told |= {"wer": said["wer"], "cer": said["cer"], "shuffled_wer": said["shuffled"]["wer"]}
        told |= {f"wer_{name}": one["wer"] for name, one in said["sources"].items()}
    return told


def read_diagnosis(directory: Path) -> dict[str, Any]:
    """The content of `diagnosis.json` in a payload directory."""
    return dict(json.loads((directory / DIAGNOSIS).read_text(encoding="utf-8")))
