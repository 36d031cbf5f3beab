"""Scoring AudioBench-mini so that the number can be believed.

Three scorers read the model's answers. Beside the score stand guesses without audio, broken versions of the
model, and a probe of the features; the lead over the best guess without audio is a paired interval over the
items.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_model import hardware
from omni_model.artifacts import (
    AdapterCheckpoint,
    Benchmark,
    EncoderFiles,
    FeatureShards,
    GptCheckpoint,
    TokenizerFiles,
)
from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON, BadInput, EvaluationRecipe, Runtime
from omni_model.evaluation import baselines
from omni_model.evaluation.answering import NOTHING_HEARD, Listener
from omni_model.evaluation.benchmark_audio import read_audio
from omni_model.evaluation.benchmark_conflict import is_silent
from omni_model.evaluation.benchmark_item import Item, read_items
from omni_model.evaluation.score_summary import (
    ABLATION,
    CEILING,
    NO_AUDIO,
    SHUFFLED,
    UNHEARD,
    Answers,
    Baseline,
    answer_lines,
    summarise,
)
from omni_model.evaluation.scorers import Verdicts, ask, likelihood_gains, written_answers
from omni_model.evaluation.statistics import Bootstrap
from omni_model.evaluation.untrained import untrained_frames
from omni_model.model.lora import merged
from omni_model.model.omni import OmniModel
from omni_model.model.weights import load_listener
from omni_model.storage import Workspace
from omni_model.text.tokenizer import load_tokenizer
from omni_model.training.teaching import check_belonging

SCORES = "scores.json"
ANSWERS = "answers.jsonl"
SILENCE = "silence"


def score_benchmark(
    recipe: EvaluationRecipe,
    benchmark: Benchmark,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    encoder: EncoderFiles,
    *features: FeatureShards,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: `scores.json` and `answers.jsonl` of a tuned listener.

    The encoder is the one that the features are of; one of its shape that never learned is a baseline.

    Raises:
        BadInput: the item file changed, a clip has no features, or the parts do not fit each other.
    """
    items, reader = read_items(benchmark), FeatureReader(*features)
    _refuse_missing(items, reader)
    check_belonging(adapter, gpt, reader)
    wavs, scratch = read_audio(benchmark), work.partial / "untrained"
    frames = untrained_frames(encoder, reader.policy, wavs, scratch, work.seed)
    tokens = load_tokenizer(tokenizer.out)
    taught = load_listener(gpt, adapter).to(hardware.device())
    listener = Listener(OmniModel(merged(taught.gpt), taught.projector), tokens, reader.frames)
    steps = 6 + 2 * recipe.shuffles
    done = iter(range(1, steps + 1))

    def told(verdicts: Verdicts) -> Verdicts:
        work.metrics.log(next(done), steps, accuracy=float(verdicts.scores.mean()))
        return verdicts

    letters = told(ask(items, listener.letters, [item.clips for item in items]))
    longest = max(len(tokens.encode(f" {option}")) for item in items for option in item.options)
    answers = Answers(letters, likelihood_gains(items, listener), written_answers(items, listener, longest))
    work.metrics.log(next(done), steps)
    heard = heard_by_others(recipe, items, reader, work.seed)
    deaf = {
        "random projector": listener.with_random_projector(work.seed),
        "random encoder": listener.with_frames(frames.__getitem__),
    }
    own = [item.clips for item in items]
    beside = {
        "chance": Baseline(NO_AUDIO, baselines.guess_blindly(items)),
        "majority": Baseline(NO_AUDIO, baselines.guess_one_letter(items)),
        "longest option": Baseline(NO_AUDIO, baselines.guess_longest(items)),
        **{
            name: _averaged(kind, [told(ask(items, listener.letters, clips)) for clips in shuffles])
            for name, (kind, shuffles) in heard.items()
        },
        **{name: Baseline.of(ABLATION, told(ask(items, other.letters, own))) for name, other in deaf.items()},
        "linear probe": _probed(items, reader),
    }
    scores = summarise(
        items, answers, beside, Bootstrap(work.seed, recipe.bootstrap_draws, recipe.confidence)
    )
    scores["confidence"] = recipe.confidence
    if SILENCE not in beside:
        scores["left_out"] = {SILENCE: "the features hold no silent test clip"}
    (work.out / SCORES).write_text(json.dumps(scores, sort_keys=True, indent=1) + "\n", encoding="utf-8")
    (work.out / ANSWERS).write_text(answer_lines(items, answers, beside), encoding="utf-8")
    work.metrics.summary(
        accuracy=scores["accuracy"],
        margin=scores["margin"],
        strict=scores["strict"],
        **{name.replace(" ", "_"): round(float(b.scores.mean()), 4) for name, b in beside.items()},
    )
    return {"accuracy": scores["accuracy"], "num_items": len(items)}


def _refuse_missing(items: Sequence[Item], reader: FeatureReader) -> None:
    there = {clip["key"] for clip in reader.clips}
    for item in items:
        for clip in item.clips:
            if clip not in there:
                raise BadInput(
                    f"item {item.id} asks about the clip {clip}, which none of the features hold; "
                    "give those of every corpus that the benchmark was made of"
                )


def heard_by_others(
    recipe: EvaluationRecipe, items: Sequence[Item], reader: FeatureReader, seed: int
) -> dict[str, tuple[str, list[list[tuple[str, ...]]]]]:
    """Baseline -> its kind, and the clips that every item hears instead of its own, once or several times."""
    heard = {UNHEARD: (NO_AUDIO, [[NOTHING_HEARD] * len(items)])}
    if silent := [clip["key"] for clip in reader.by_split("test") if is_silent(clip)]:
        heard[SILENCE] = (NO_AUDIO, [baselines.silent_clips(items, silent)])
    for name, across in ((SHUFFLED, False), ("shuffled across groups", True)):
        heard[name] = (ABLATION, baselines.shuffled_clips(items, recipe.shuffles, seed, across=across))
    return heard


def _averaged(kind: str, verdicts: Sequence[Verdicts]) -> Baseline:
    """A baseline by the mean of its scores; what it took is told of the first time it was asked."""
    first = Baseline.of(kind, verdicts[0])
    scores = np.mean([each.scores for each in verdicts], axis=0)
    return Baseline(kind, scores, first.chosen, first.first)


def _probed(items: Sequence[Item], reader: FeatureReader) -> Baseline:
    taken = baselines.probe(items, reader)
    right = taken == [item.answer for item in items]
    return Baseline(CEILING, right.astype(np.float64), taken)


def read_scores(directory: Path) -> dict[str, Any]:
    """The content of `scores.json` in a payload directory."""
    return dict(json.loads((directory / SCORES).read_text(encoding="utf-8")))


def read_answers(directory: Path) -> dict[str, Mapping[str, Any]]:
    """The verdicts in a payload directory, by item id."""
    lines = (directory / ANSWERS).read_text(encoding="utf-8").splitlines()
    return {answer["id"]: answer for answer in map(json.loads, lines)}
