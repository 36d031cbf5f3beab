"""Anybody's recordings put to a listener: what it answers, and whether it may be sure.

A file is decoded as a corpus would take it in, cut where it is quiet if it is longer than the listener can
read, and encoded exactly as the features were that the listener was taught on. Each piece is asked. The
answer to a file is what its pieces say together; it is only as near to training as its farthest piece.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from omni_model import hardware
from omni_model.artifacts import (
    AdapterCheckpoint,
    EncoderFiles,
    Familiarity,
    GptCheckpoint,
    TokenizerFiles,
    canonical_json,
    sha256_text,
)
from omni_model.audio import ingest
from omni_model.audio.clips import Dropped
from omni_model.audio.encoder import DTYPES, Encoder, load_encoder
from omni_model.audio.features import encode_samples, policy
from omni_model.audio.folder import AUDIO_SUFFIXES, read_metadata
from omni_model.audio.waveform import SAMPLE_RATE_HZ
from omni_model.config import BadInput, FeatureRecipe, FolderRecipe
from omni_model.evaluation.answering import Asked, Listener
from omni_model.evaluation.benchmark_item import Item
from omni_model.evaluation.familiarity_known import Judged, Known, load_known
from omni_model.evaluation.labelled import questions_about, score_labelled
from omni_model.evaluation.scorers import ask
from omni_model.model.lora import merged
from omni_model.model.omni import OmniModel
from omni_model.model.weights import load_listener
from omni_model.text.questions import LETTERS
from omni_model.text.tokenizer import load_tokenizer

COIN_TOSS = 0.5  # what is no likelier than this may as well be another answer
ANSWER_TOKENS = 48
SPARE_TOKENS = 32  # of what the GPT reads at a time, beside question, answer and sound
LEAST_PIECE_S = 1.0


@dataclass(frozen=True)
class Parts:
    """All that a listener is made of, as finished artifacts; `features` is how its frames were made."""

    gpt: GptCheckpoint
    adapter: AdapterCheckpoint
    tokenizer: TokenizerFiles
    encoder: EncoderFiles
    features: FeatureRecipe
    familiarity: Familiarity | None


@dataclass(frozen=True)
class Piece:
    """A piece of a recording: where it lies in it, its frames (T, D), and how far it is from training."""

    key: str
    start_s: float
    duration_s: float
    frames: np.ndarray
    judged: Judged | None


class Ear:
    """A listener that takes files."""

    def __init__(self, parts: Parts) -> None:
        """Raises BadInput where the parts were not made for each other."""
        way = _way(parts)
        self._encoder: Encoder = load_encoder(
            parts.encoder, tuple(way["layers"]), way["mix"], way["dtype"], hardware.device().type
        )
        self._known: Known | None = load_known(parts.familiarity) if parts.familiarity else None
        if self._known and self._known.policy != way:
            raise BadInput(
                f"{parts.familiarity.uri if parts.familiarity else ''} was learned on other features than "
                f"{parts.adapter.uri}; learn familiarity on those of the listener."
            )
        if parts.adapter.gpt_digest != parts.gpt.digest:
            raise BadInput(
                f"{parts.adapter.uri} was taught with another GPT than {parts.gpt.uri}; name its own."
            )
        model = load_listener(parts.gpt, parts.adapter).to(hardware.device())
        self._tokenizer = load_tokenizer(parts.tokenizer.out)
        self._frames: dict[str, np.ndarray] = {}
        self.listener = Listener(
            OmniModel(merged(model.gpt), model.projector), self._tokenizer, self._frames.__getitem__
        )
        self._positions = len(model.gpt.cos)
        self._tokens_per_s = self._encoder.frame_rate_hz / model.projector.stack

    def longest_s(self, words: str) -> float:
        """How long a piece may be for the GPT to read it with these words and answer."""
        free = self._positions - len(self._tokenizer.encode(words)) - ANSWER_TOKENS - SPARE_TOKENS
        longest = min(ingest.MAX_CLIP_S, free / self._tokens_per_s)
        if longest < LEAST_PIECE_S:
            raise BadInput("the question is too long for this listener; ask it in fewer words.")
        return float(int(longest))

    def hear(self, path: Path, longest_s: float) -> list[Piece]:
        """The pieces of a file, ready to be asked about.

        Raises:
            BadInput: it cannot be read as audio, or nothing in it can be heard.
        """
        pieces: list[Piece] = []
        at_s = 0.0
        for number, clip in enumerate(ingest.clips(path, str(path), max_clip_s=longest_s)):
            if isinstance(clip, Dropped):
                continue
            at_s = float(clip.provenance.get("start_s", 0.0))
            frames = encode_samples(clip.samples, self._encoder)
            judged = self._known.judge([frames])[0] if self._known else None
            key = f"{path}#{number}"
            self._frames[key] = frames
            pieces.append(Piece(key, at_s, len(clip.samples) / SAMPLE_RATE_HZ, frames, judged))
        return pieces

    def forget(self) -> None:
        """Let go of all frames that were heard."""
        self._frames.clear()


class _Open(Asked):
    """An item that is asked without options."""

    @property
    def words(self) -> str:
        return self.item.question


def _way(parts: Parts) -> dict[str, Any]:
    """How the listener's frames are made.

    Raises:
        BadInput: no precision of this recipe gives the frames that the listener was taught on.
    """
    for dtype in DTYPES if parts.features.dtype == "auto" else (parts.features.dtype,):
        way = policy(dataclasses.replace(parts.features, dtype=dtype), parts.encoder)
        if sha256_text(canonical_json(way)) == parts.adapter.policy_digest:
            return way
    raise BadInput(
        f"{parts.adapter.uri} was taught on other features than {parts.encoder.uri} gives by its recipe; "
        "name the listener together with its own run."
    )


# --- answers -------------------------------------------------------------------------------------


def score_file(ear: Ear, path: Path, question: str, options: Sequence[str]) -> dict[str, Any]:
    """What a listener answers about one recording, in plain JSON.

    Raises:
        BadInput: the file cannot be heard.
    """
    longest_s = ear.longest_s(" ; ".join([question, *options]))
    pieces = ear.hear(path, longest_s)
    if not pieces:
        raise BadInput(f"{path} is silent in every piece; record it again.")
    items = [_item(piece.key, question, options) for piece in pieces]
    if options:
        shown = ask(items, ear.listener.letters, [item.clips for item in items]).options.mean(axis=0)
        answer, likely = options[int(shown.argmax())], float(shown.max())
        probabilities = {option: round(float(p), 4) for option, p in zip(options, shown, strict=True)}
    else:
        asked = [_Open(item, item.options, item.clips) for item in items]
        said = [text.strip() for text in ear.listener.says(asked, ANSWER_TOKENS)]
        answer, probabilities = "; ".join(dict.fromkeys(said)), {}
        spoken = [(question, text) for text in said if text]
        heard = [item.clips for item, text in zip(items, said, strict=True) if text]
        likelihoods = ear.listener.log_likelihoods(spoken, heard) if spoken else np.array([-np.inf])
        likely = float(np.exp(likelihoods).min())
    ear.forget()
    farthest = max((p.judged for p in pieces if p.judged), key=lambda each: each.distance, default=None)
    reasons = [farthest.why] if farthest and farthest.why else []
    if likely <= COIN_TOSS:
        reasons.append("the answer is a coin toss")
    told: dict[str, Any] = {
        "file": str(path),
        "question": question,
        "answer": answer,
        "probabilities": probabilities,
        "distance": farthest.distance if farthest else None,
        "sure": not reasons,
        "why": f"not sure: {'; '.join(reasons)}" if reasons else "",
    }
    if len(pieces) > 1:
        told["cut"] = (
            f"cut in quiet places into {len(pieces)} pieces of at most {longest_s:g} s; the answer is of all"
        )
        told["pieces"] = [
            {
                "start_s": round(piece.start_s, 3),
                "duration_s": round(piece.duration_s, 3),
                "distance": piece.judged.distance if piece.judged else None,
            }
            for piece in pieces
        ]
    return told


def _item(key: str, question: str, options: Sequence[str]) -> Item:
    shown = tuple(options) or ("",)
    return Item(key, "", "", (key,), question, shown, 0, "", "")


def score(parts: Parts, place: Path, question: str | None, options: Sequence[str]) -> dict[str, Any]:
    """What a listener makes of a file, or of every audio file below a folder.

    A folder without a question is asked about the labels in its `metadata.jsonl`.

    Raises:
        BadInput: nothing is there, nothing is asked, or there are not four options.
    """
    if options and len({*options}) != len(LETTERS):
        raise BadInput(f"--options takes {len(LETTERS)} different answers, not {len({*options})}.")
    if not place.exists():
        raise BadInput(f"{place}: No such file or directory")
    if not place.is_dir():
        if not question:
            raise BadInput(
                f'say with --question what is to be asked about {place}, as in "What do you hear?"'
            )
        return score_file(Ear(parts), place, question, options)
    paths = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    files = [path for path in paths if PurePosixPath(path).suffix.lower() in AUDIO_SUFFIXES]
    if not files:
        raise BadInput(f"{place} holds no audio files; name a folder that does.")
    labels = {path: known.labels for path, known in read_metadata(place, FolderRecipe(), paths).items()}
    if not question and not any(labels.values()):
        raise BadInput(
            f"say with --question what is to be asked about the files in {place}, or give them labels in its "
            f"{FolderRecipe.metadata}."
        )
    ear = Ear(parts)
    if question:
        return _ask_all(ear, place, files, question, options)
    return _ask_labels(ear, place, {path: labels[path] for path in files if labels.get(path)})


def _ask_all(
    ear: Ear, place: Path, files: Sequence[str], question: str, options: Sequence[str]
) -> dict[str, Any]:
    told: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for path in files:
        try:
            told.append(score_file(ear, place / path, question, options))
        except BadInput as error:
            refused.append({"file": str(place / path), "why": str(error)})
    return {
        "files": told,
        "refused": refused,
        "summary": _summary([each["distance"] for each in told], len(refused))
        | {"sure": sum(each["sure"] for each in told)},
    }


def _ask_labels(ear: Ear, place: Path, labels: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    items: list[Item] = []
    taught: dict[str, bool] = {}
    told: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for path, known in labels.items():
        asked = questions_about(path, known)
        if not asked:
            continue
        try:
            pieces = ear.hear(place / path, max(ear.longest_s(item.question) for item in asked))
            if len(pieces) != 1:
                raise BadInput(
                    f"{place / path} is too long to be asked about whole; cut it, or ask with --question."
                )
        except BadInput as error:
            refused.append({"file": str(place / path), "why": str(error)})
            continue
        key, judged = pieces[0].key, pieces[0].judged
        items += [dataclasses.replace(item, clips=(key,)) for item in asked]
        taught[key] = judged is None or judged.is_taught
        told.append(
            {
                "file": str(place / path),
                "distance": judged.distance if judged else None,
                "sure": taught[key],
                "why": f"not sure: {judged.why}" if judged and judged.why else "",
            }
        )
    if not items:
        raise BadInput(f"no file in {place} has a label that can be asked about; ask with --question.")
    return {
        "files": told,
        "refused": refused,
        "categories": score_labelled(ear.listener, items, taught),
        "summary": _summary([each["distance"] for each in told], len(refused))
        | {"sure": sum(each["sure"] for each in told)},
    }


def _summary(distances: Sequence[float | None], refused: int) -> dict[str, Any]:
    """How far recordings lie from training; 1 is the limit."""
    known = [distance for distance in distances if distance is not None]
    return {
        "files": len(distances),
        "refused": refused,
        "median_distance": round(float(np.median(known)), 4) if known else None,
        "too_far": sum(distance > 1 for distance in known),
    }
