"""Where soft tokens land among text embeddings: a picture, and the numbers that a picture cannot prove.

The GPT reads rows, not sounds: a soft token is useful when it lies where the words for that sound lie. The
principal components are fitted on the embeddings of words alone, and clips are projected into them, so clips
cannot shape the axes they are judged in. Two dimensions may hide what all of them hold; therefore cluster
numbers are taken in the full space, and every clip is left out of its own centroid.

Legend: N clips, M words, C model width.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from omni_model.artifacts import AdapterCheckpoint, FeatureShards, GptCheckpoint, TokenizerFiles
from omni_model.audio.clips import clip_rng
from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON, BadInput, EmbeddingMapRecipe, Runtime
from omni_model.evaluation.map_picture import Panel, draw_map
from omni_model.model.gpt import rms_norm
from omni_model.model.omni import OmniModel
from omni_model.model.projector import NUM_MARKERS
from omni_model.model.weights import load_listener
from omni_model.storage import Workspace
from omni_model.text.questions import askable, grammar
from omni_model.text.tokenizer import Tokenizer, load_tokenizer

MAP = "map.json"
PICTURES = {"light": "map.png", "dark": "map-dark.png"}
# One category of each group, by how well its answers can be told apart in a small picture.
PICTURED = ("colour", "voice", "pitch")


@dataclass(frozen=True)
class Plane:
    """Principal components: mean (C,), axes (K, C) of unit length, shares of variance explained (K,)."""

    mean: np.ndarray
    axes: np.ndarray
    explained: np.ndarray

    def project(self, points: np.ndarray) -> np.ndarray:
        """(N, C) -> (N, K)."""
        return (points - self.mean) @ self.axes.T


def fit_plane(points: np.ndarray, components: int) -> Plane:
    """Principal components of `points` (M, C), each turned so that its largest coordinate is positive.

    Raises:
        BadInput: fewer points or dimensions than components.
    """
    if not 2 <= components <= min(len(points) - 1, points.shape[1]):
        raise BadInput(
            f"embedding_map.components is {components}; use 2 to {min(len(points) - 1, points.shape[1])}"
        )
    mean = points.mean(axis=0)
    _, singular, axes = np.linalg.svd(points - mean, full_matrices=False)
    axes = axes[:components]
    signs = np.sign(axes[np.arange(components), np.abs(axes).argmax(axis=1)])
    return Plane(mean, axes * signs[:, None], (singular**2 / (singular**2).sum())[:components])


def map_embeddings(
    recipe: EmbeddingMapRecipe,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    sounds: FeatureShards,
    speech: FeatureShards,
    *,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: `map.png` (and `map-dark.png`, the same on dark ground) and `map.json`, from test clips.

    Raises:
        BadInput: there are no test clips, or too many components were asked for.
    """
    model, features = load_listener(gpt, adapter).eval(), FeatureReader(sounds, speech)
    words = list(
        dict.fromkeys(option for category in grammar().categories.values() for option in category.options)
    )
    text = embed_words(model, load_tokenizer(tokenizer.out), words)
    clips = features.by_split("test")
    if not clips:
        raise BadInput("the features hold no test clips; make the corpora with clips.test of 1 or more")
    keys, labels = [clip["key"] for clip in clips], [askable(clip["labels"]) for clip in clips]
    audio, raw_rms = embed_clips(model, features, keys)
    plane = fit_plane(text, recipe.components)
    text_places, audio_places = plane.project(text), plane.project(audio)
    drawn = sorted(keys, key=lambda key: float(clip_rng(work.seed, key).random()))[: recipe.clips]
    rows = [row for row, key in enumerate(keys) if key in set(drawn)]
    numbers: dict[str, JSON] = {
        "schema": 1,
        "clips_measured": len(keys),
        "explained_variance": _rounded(plane.explained),
        # Before the norm both pass through; after it each row has RMS 1.
        "rms_ratio": round(raw_rms / embedding_rms(model, load_tokenizer(tokenizer.out), words), 4),
        "modality_gap": round(modality_gap(audio, text), 4),
        "categories": category_numbers(audio, labels, dict(zip(words, text, strict=True))),
        "words": [
            {"word": word, "at": _rounded(place)} for word, place in zip(words, text_places, strict=True)
        ],
        "clips": [
            {"key": keys[row], "labels": labels[row], "at": _rounded(audio_places[row])} for row in rows
        ],
    }
    (work.out / MAP).write_text(json.dumps(numbers, sort_keys=True, indent=1) + "\n", encoding="utf-8")
    panels = [
        Panel(category, grammar().category(category).options, [labels[row].get(category, "") for row in rows])
        for category in PICTURED
    ]
    for ground, name in PICTURES.items():
        picture = draw_map(panels, words, text_places, audio_places[rows], plane.explained, ground)
        (work.out / name).write_bytes(picture)
    work.metrics.summary(rms_ratio=numbers["rms_ratio"], modality_gap=numbers["modality_gap"])  # type: ignore[arg-type]
    return {"num_points": len(words) + len(rows)}


def embed_words(model: OmniModel, tokenizer: Tokenizer, words: Sequence[str]) -> np.ndarray:
    """Normed embeddings (M, C) of words as inside a sentence; several tokens of one word give their mean."""
    return np.stack([_rows(model, tokenizer, word, normed=True).mean(axis=0) for word in words])


def embedding_rms(model: OmniModel, tokenizer: Tokenizer, words: Sequence[str]) -> float:
    """Root mean square of the words' embeddings before the norm."""
    rows = np.concatenate([_rows(model, tokenizer, word, normed=False) for word in words])
    return float(np.sqrt(np.square(rows).mean()))


@torch.inference_mode()
def _rows(model: OmniModel, tokenizer: Tokenizer, word: str, *, normed: bool) -> np.ndarray:
    table = model.gpt.transformer["wte"]
    ids = torch.tensor(tokenizer.encode(f" {word}"), device=table.weight.device)
    rows = table(ids).float()
    return (rms_norm(rows) if normed else rows).double().cpu().numpy()


@torch.inference_mode()
def embed_clips(model: OmniModel, features: FeatureReader, keys: Sequence[str]) -> tuple[np.ndarray, float]:
    """Mean normed soft token of each clip, (N, C), and the RMS of all soft tokens before the norm."""
    device = next(model.projector.parameters()).device
    means, squares, count = [], 0.0, 0
    for key in keys:
        frames = torch.from_numpy(features.frames(key).astype(np.float32))[None].to(device)
        rows, _ = model.projector(frames, torch.tensor([frames.size(1)], device=device))
        tokens = rows[0, NUM_MARKERS // 2 : -(NUM_MARKERS // 2)]
        means.append(rms_norm(tokens).mean(dim=0).double().cpu().numpy())
        squares, count = squares + float(tokens.double().square().sum()), count + tokens.numel()
    return np.stack(means), float(np.sqrt(squares / count))


def modality_gap(audio: np.ndarray, text: np.ndarray) -> float:
    """Distance of the two centroids over the mean distance of points to their own centroid."""
    centres = [points.mean(axis=0) for points in (audio, text)]
    radii = [np.linalg.norm(p - c, axis=1).mean() for p, c in zip((audio, text), centres, strict=True)]
    return float(np.linalg.norm(centres[0] - centres[1]) / max(np.mean(radii), 1e-12))


def category_numbers(
    audio: np.ndarray, labels: Sequence[Mapping[str, str]], words: Mapping[str, np.ndarray]
) -> dict[str, JSON]:
    """Cluster numbers per category, in the full space, over the clips that carry its label."""
    found: dict[str, JSON] = {}
    for name, category in grammar().categories.items():
        rows = [row for row, label in enumerate(labels) if name in label]
        truth = np.array([category.options.index(labels[row][name]) for row in rows], dtype=np.int64)
        if len(rows) < 2 or len(set(truth)) < 2 or np.bincount(truth)[truth].min() < 2:
            continue
        points = audio[rows]
        vocabulary = np.stack([words[option] for option in category.options])
        nearest = _cosine(points - audio.mean(axis=0), vocabulary - vocabulary.mean(axis=0)).argmax(axis=1)
        found[name] = {
            "n": len(rows),
            "chance": round(1 / len(category.options), 4),
            **centroid_numbers(points, truth),
            "word_match": round(float((nearest == truth).mean()), 4),
        }
    return found


def centroid_numbers(points: np.ndarray, truth: np.ndarray) -> dict[str, JSON]:
    """How well labels `truth` (N,) part `points` (N, C); every label needs at least two points.

    `centroid_accuracy`: share of points nearest to the centroid of their own label, itself left out.
    `separation`: mean of (b - a) / max(a, b) with a the distance to the own centroid and b to the nearest
    other one, in -1..1 (a silhouette on centroids; P. Rousseeuw, J. Comput. Appl. Math. 20, 1987).
    """
    names, own = np.unique(truth, return_inverse=True)
    members = np.eye(len(names))[own]
    counts = members.sum(axis=0)
    sums = members.T @ points
    distances = np.linalg.norm(points[:, None] - (sums / counts[:, None])[None], axis=2)
    left_out = (sums[own] - points) / (counts[own] - 1)[:, None]
    rows = np.arange(len(points))
    distances[rows, own] = np.linalg.norm(points - left_out, axis=1)
    inside = distances[rows, own].copy()
    accuracy = float((distances.argmin(axis=1) == own).mean())
    distances[rows, own] = np.inf
    outside = distances.min(axis=1)
    separation = float(((outside - inside) / np.maximum(np.maximum(inside, outside), 1e-12)).mean())
    return {"centroid_accuracy": round(accuracy, 4), "separation": round(separation, 4)}


def _cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(first, axis=1)[:, None] * np.linalg.norm(second, axis=1)[None]
    return first @ second.T / np.maximum(lengths, 1e-12)


def _rounded(values: np.ndarray) -> list[JSON]:
    return [round(float(value), 4) for value in values]


def read_map(directory: Path) -> dict[str, Any]:
    """The content of `map.json` in a payload directory."""
    return dict(json.loads((directory / MAP).read_text(encoding="utf-8")))
