"""What a listener says it heard: error rates of its transcripts, and the words nearest to its soft tokens.

Error rates are totals over clips (errors by words or characters that were said), so long clips count more;
the interval comes from drawing clips. Beside them stands what the same answers score against other clips: a
model that only knows what people tend to say gets that far without listening.

Legend: N clips, n soft tokens, C model width, V vocabulary.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jiwer
import numpy as np
import torch

from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON
from omni_model.evaluation.diagnosis_geometry import cosines
from omni_model.evaluation.diagnosis_states import BATCH_FRAMES, batches, load_frames, normed
from omni_model.evaluation.statistics import Bootstrap
from omni_model.model.omni import OmniModel
from omni_model.serving.engine import Engine
from omni_model.serving.sampling import Sampling
from omni_model.serving.segments import Audio, Segment, Text
from omni_model.text.conversation import render_prompt
from omni_model.text.questions import grammar
from omni_model.text.tokenizer import Tokenizer

NUM_EXAMPLES = 8
NEAREST = 5
SPARE_TOKENS = 8  # what an answer may be longer than one and a half times the longest transcript

PLAIN = jiwer.Compose(
    [
        jiwer.ToLowerCase(),
        jiwer.SubstituteRegexes({r"[-\u2010-\u2015]": " "}),
        jiwer.RemovePunctuation(),
        jiwer.RemoveMultipleSpaces(),
        jiwer.Strip(),
    ]
)


@dataclass(frozen=True)
class Errors:
    """Edits and length of each clip's transcript, (N,) each, in words and in characters."""

    words: np.ndarray
    num_words: np.ndarray
    characters: np.ndarray
    num_characters: np.ndarray

    @classmethod
    def between(cls, said: Sequence[str], heard: Sequence[str]) -> "Errors":
        """Of texts that `PLAIN` has made comparable; nothing of what was said is empty."""
        pairs = list(zip(said, heard, strict=True))
        words = [jiwer.process_words(*pair) for pair in pairs]
        characters = [jiwer.process_characters(*pair) for pair in pairs]
        return cls(*_edits(words), *_edits(characters))

    def of(self, rows: Sequence[int]) -> "Errors":
        """Those of some clips."""
        return Errors(*(getattr(self, field.name)[list(rows)] for field in dataclasses.fields(self)))

    def rates(self, bootstrap: Bootstrap) -> dict[str, JSON]:
        """WER and CER with their intervals."""
        found: dict[str, JSON] = {}
        for name, edits, lengths in (
            ("wer", self.words, self.num_words),
            ("cer", self.characters, self.num_characters),
        ):
            found[name] = round(float(edits.sum() / lengths.sum()), 4)
            found[f"{name}_ci95"] = list(bootstrap.ratio(edits, lengths).rounded())
        return found


def _edits(measured: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    edits = [one.substitutions + one.deletions + one.insertions for one in measured]
    lengths = [one.hits + one.substitutions + one.deletions for one in measured]
    return np.array(edits, dtype=np.float64), np.array(lengths, dtype=np.float64)


def transcription(
    model: OmniModel,
    tokenizer: Tokenizer,
    features: FeatureReader,
    clips: Sequence[Mapping[str, Any]],
    bootstrap: Bootstrap,
    seed: int,
) -> dict[str, JSON] | None:
    """Error rates of greedy answers about `clips`, and some answers; None where fewer than two have words."""
    clips = [clip for clip in clips if PLAIN(clip["transcript"])]
    if len(clips) < 2:
        return None
    keys = [clip["key"] for clip in clips]
    said = [PLAIN(clip["transcript"]) for clip in clips]
    question = grammar().transcript_prompts[0]
    longest = max(len(tokenizer.encode(clip["transcript"])) for clip in clips)
    answers = answer(model, tokenizer, features, clips, question, longest * 3 // 2 + SPARE_TOKENS)
    heard = [PLAIN(answers[key]) for key in keys]
    errors = Errors.between(said, heard)
    # In a ring in random order each hears the next one's clip, so none hears its own.
    ring = np.random.default_rng(seed).permutation(len(keys))
    shuffled = Errors.between([said[row] for row in ring], [heard[row] for row in np.roll(ring, -1)])
    examples: list[JSON] = [
        {"key": key, "said": said[row], "heard": heard[row], "word_errors": int(errors.words[row])}
        for row, key in enumerate(keys[:NUM_EXAMPLES])
    ]
    return {
        "question": question,
        "n": len(keys),
        "words": int(errors.num_words.sum()),
        **errors.rates(bootstrap),
        "sources": {
            name: {"n": len(rows), **errors.of(rows).rates(bootstrap)}
            for name, rows in _by_source(clips).items()
        },
        "shuffled": shuffled.rates(bootstrap),
        "flawless": round(float((errors.words == 0).mean()), 4),
        "examples": examples,
    }


def _by_source(clips: Sequence[Mapping[str, Any]]) -> dict[str, list[int]]:
    """Numbers of the clips by where they come from: a part of a set, or what made them."""
    found: dict[str, list[int]] = {}
    for number, clip in enumerate(clips):
        made = clip.get("provenance", {})
        found.setdefault(str(made.get("part") or made.get("generator") or "unknown"), []).append(number)
    return dict(sorted(found.items()))


@torch.inference_mode()
def answer(
    model: OmniModel,
    tokenizer: Tokenizer,
    features: FeatureReader,
    clips: Sequence[Mapping[str, Any]],
    question: str,
    max_tokens: int,
) -> dict[str, str]:
    """The likeliest answer to one question about each clip, by key."""
    engine, prompt = Engine(model.gpt, tokenizer), Text(render_prompt(tokenizer, question))
    found: dict[str, str] = {}
    for keys in batches({clip["key"]: clip["num_frames"] for clip in clips}, BATCH_FRAMES):
        _, padded, lengths = load_frames(features, keys, model.gpt.cos.device)
        rows, counts = model.projector(padded, lengths)
        prompts: list[list[Segment]] = [
            [Audio(row[:count]), prompt] for row, count in zip(rows, counts.tolist(), strict=True)
        ]
        replies = engine.generate(prompts, sampling=Sampling(temperature=0.0), max_tokens=max_tokens)
        found.update((key, reply.text) for key, reply in zip(keys, replies, strict=True))
    return found


def nearest_words(
    model: OmniModel, tokenizer: Tokenizer, soft_tokens: Sequence[np.ndarray]
) -> list[list[list[JSON]]]:
    """For each soft token of each clip (n, C) the nearest rows of the vocabulary, by cosine, normed."""
    table = model.gpt.transformer["wte"].weight[: model.gpt.config.vocab_size].detach()
    vocabulary = normed(table.float().cpu().numpy())
    found: list[list[list[JSON]]] = []
    for rows in soft_tokens:
        near = cosines(normed(rows), vocabulary)
        best = np.argsort(-near, axis=1, kind="stable")[:, :NEAREST]
        found.append(
            [
                [{"text": tokenizer.decode([int(i)]), "cosine": round(float(near[row, i]), 3)} for i in ids]
                for row, ids in enumerate(best)
            ]
        )
    return found
