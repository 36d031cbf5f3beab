"""Scoring AudioBench-mini so that the number can be believed.

Every item is asked four times, with its options rotated, and its score is the mean of the four verdicts: a
model that always says A gets exactly 25 %. The answer is read from the logits of the four letters alone, so
nothing has to be parsed. Beside the score stand guesses without audio, broken versions of the model, and a
probe of the features; the lead over the best guess without audio is a paired interval over the items.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.artifacts import (
    AdapterCheckpoint,
    Benchmark,
    FeatureShards,
    GptCheckpoint,
    TokenizerFiles,
    canonical_json,
)
from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON, EvaluationRecipe, Runtime
from omni_model.evaluation import baselines
from omni_model.evaluation.answering import Answerer, Asked, Listener
from omni_model.evaluation.benchmark import PASS_MARK, Item, read_items
from omni_model.evaluation.statistics import Bootstrap, mcnemar_exact
from omni_model.model.weights import load_listener
from omni_model.storage import Workspace
from omni_model.text.questions import LETTERS
from omni_model.text.tokenizer import load_tokenizer

SCORES = "scores.json"
ANSWERS = "answers.jsonl"
NO_AUDIO, ABLATION, CEILING = "no_audio", "ablation", "ceiling"


@dataclass(frozen=True)
class Verdicts:
    """What was answered: letter probabilities as shown (items, rotations, letters), and the right letters."""

    shown: np.ndarray
    right: np.ndarray

    @property
    def correct(self) -> np.ndarray:
        """(items, rotations) booleans."""
        return self.shown.argmax(axis=2) == self.right

    @property
    def scores(self) -> np.ndarray:
        """Mean correctness of each item over its rotations, (items,)."""
        return self.correct.mean(axis=1)

    @property
    def strict(self) -> np.ndarray:
        """Whether an item was answered right in every rotation, (items,)."""
        return self.correct.all(axis=1)

    @property
    def options(self) -> np.ndarray:
        """Probabilities (items, options) in the item's own order, averaged over the rotations."""
        turns = range(len(LETTERS))
        return np.mean([np.roll(self.shown[:, turn], turn, axis=1) for turn in turns], axis=0)

    @property
    def letters(self) -> dict[str, int]:
        """How often each letter was answered, over all rotations."""
        counts = np.bincount(self.shown.argmax(axis=2).ravel(), minlength=len(LETTERS))
        return {letter: int(count) for letter, count in zip(LETTERS, counts, strict=True)}


def ask(items: Sequence[Item], answer: Answerer, clips: Sequence[str | None]) -> Verdicts:
    """Put every item in the four cyclic rotations of its options, hearing `clips` (one per item)."""
    turns = range(len(LETTERS))
    asked = [
        Asked(item, item.options[turn:] + item.options[:turn], clip)
        for item, clip in zip(items, clips, strict=True)
        for turn in turns
    ]
    shown = np.asarray(answer(asked), dtype=np.float64).reshape(len(items), len(LETTERS), len(LETTERS))
    right = np.array([one.right for one in asked]).reshape(len(items), len(LETTERS))
    return Verdicts(shown, right)


@dataclass(frozen=True)
class Baseline:
    """One score per item, (items,), and how much it may know."""

    kind: str
    scores: np.ndarray


def score_benchmark(
    recipe: EvaluationRecipe,
    benchmark: Benchmark,
    gpt: GptCheckpoint,
    adapter: AdapterCheckpoint,
    tokenizer: TokenizerFiles,
    sounds: FeatureShards,
    speech: FeatureShards,
    *,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: `scores.json` and `answers.jsonl` of a tuned listener.

    Raises:
        BadInput: the item file changed, a clip has no features, or the checkpoints do not fit each other.
    """
    items = read_items(benchmark)
    features = FeatureReader(sounds, speech)
    listener = Listener(load_listener(gpt, adapter), load_tokenizer(tokenizer.out), features)
    steps = 5 + recipe.shuffles
    done = iter(range(1, steps + 1))

    def told(verdicts: Verdicts) -> Verdicts:
        work.metrics.log(next(done), steps, accuracy=float(verdicts.scores.mean()))
        return verdicts

    own = [item.clip for item in items]
    heard = told(ask(items, listener.letters, own))
    unheard = told(ask(items, listener.letters, [None] * len(items)))
    others = shuffled_clips(items, recipe.shuffles, work.seed)
    shuffled = np.mean([told(ask(items, listener.letters, clips)).scores for clips in others], axis=0)
    deaf = told(ask(items, listener.with_random_projector(work.seed).letters, own))
    second = second_scorer(items, listener)
    work.metrics.log(next(done), steps)
    probed = baselines.probe(items, features)
    work.metrics.log(next(done), steps)
    beside = {
        "chance": Baseline(NO_AUDIO, baselines.guess_blindly(items)),
        "majority": Baseline(NO_AUDIO, baselines.guess_one_letter(items)),
        "longest option": Baseline(NO_AUDIO, baselines.guess_longest(items)),
        "no audio": Baseline(NO_AUDIO, unheard.scores),
        "shuffled audio": Baseline(ABLATION, shuffled),
        "random projector": Baseline(ABLATION, deaf.scores),
        "linear probe": Baseline(CEILING, probed),
    }
    bootstrap = Bootstrap(work.seed, recipe.bootstrap_draws, recipe.confidence)
    scores = summarise(items, heard, beside, second, bootstrap)
    # All rotations would count an item four times, so the exact test takes the order as written.
    scores["confidence"] = recipe.confidence
    scores["mcnemar_p"] = round(mcnemar_exact(heard.correct[:, 0], unheard.correct[:, 0]), 6)
    (work.out / SCORES).write_text(json.dumps(scores, sort_keys=True, indent=1) + "\n", encoding="utf-8")
    (work.out / ANSWERS).write_text(answer_lines(items, heard), encoding="utf-8")
    accuracy = round(float(heard.scores.mean()), 6)
    work.metrics.summary(
        accuracy=accuracy,
        margin=scores["margin"],
        strict=scores["strict"],
        **{name.replace(" ", "_"): round(float(b.scores.mean()), 4) for name, b in beside.items()},
    )
    return {"accuracy": accuracy, "num_items": len(items)}


def shuffled_clips(items: Sequence[Item], shuffles: int, seed: int) -> list[list[str]]:
    """For each shuffle, the clip every item hears: not its own, but that of another item of its group."""
    drawn = []
    for number in range(shuffles):
        clips = [item.clip for item in items]
        for place, group in enumerate(dict.fromkeys(item.group for item in items)):
            rows = [row for row, item in enumerate(items) if item.group == group]
            own = [items[row].clip for row in rows]
            order = baselines.derange(own, np.random.default_rng([seed, number, place]))
            for row, source in zip(rows, order, strict=True):
                clips[row] = own[source]
        drawn.append(clips)
    return drawn


def second_scorer(items: Sequence[Item], listener: Listener) -> np.ndarray:
    """1 where the option whose words gain most from hearing the clip is the right one, (items,).

    The question is asked without options, and each option is scored as the answer, with the clip and without.
    The difference takes out how common a word is. It needs no letters: a model may know the answer and not
    its letter.
    """
    gains = np.empty((len(items), len(LETTERS)))
    for place in range(len(LETTERS)):
        answers = [(item.question, item.options[place]) for item in items]
        heard = listener.log_likelihoods(answers, [item.clip for item in items])
        gains[:, place] = heard - listener.log_likelihoods(answers, [None] * len(items))
    return (gains.argmax(axis=1) == [item.answer for item in items]).astype(np.float64)


def summarise(
    items: Sequence[Item],
    heard: Verdicts,
    beside: Mapping[str, Baseline],
    second: np.ndarray,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Everything `scores.json` holds, from per-item scores alone."""

    def measured(scores: np.ndarray, rows: Sequence[int] | None = None) -> dict[str, Any]:
        picked = scores if rows is None else scores[list(rows)]
        return {"accuracy": round(float(picked.mean()), 6), "ci95": bootstrap.interval(picked).rounded()}

    def rows_where(field: str, value: str) -> list[int]:
        return [row for row, item in enumerate(items) if getattr(item, field) == value]

    groups: dict[str, list[int]] = {
        g: rows_where("group", g) for g in dict.fromkeys(item.group for item in items)
    }
    per_group: dict[str, Any] = {}
    for group, rows in groups.items():
        names = dict.fromkeys(items[row].category for row in rows)
        categories = {
            c: measured(heard.scores, rows_where("category", c)) | {"n": len(rows_where("category", c))}
            for c in names
        }
        per_group[group] = measured(heard.scores, rows) | {"n": len(rows), "categories": dict(categories)}
    guesses = {name: baseline.scores for name, baseline in beside.items() if baseline.kind == NO_AUDIO}
    best = max(guesses, key=lambda name: (guesses[name].mean(), name))
    margin = bootstrap.margin(heard.scores, guesses[best])
    accuracy = float(heard.scores.mean())
    return {
        "schema": 1,
        **measured(heard.scores),
        "strict": round(float(heard.strict.mean()), 6),
        "margin": round(accuracy - float(guesses[best].mean()), 6),
        "margin_ci95": margin.rounded(),
        "margin_over": best,
        "passed": bool(accuracy >= PASS_MARK and margin.low > 0),
        "groups": per_group,
        "baselines": {
            name: measured(b.scores)
            | {"kind": b.kind, "groups": {g: measured(b.scores, rows) for g, rows in groups.items()}}
            for name, b in beside.items()
        },
        "letters": dict(heard.letters),
        "second": measured(second) | {"scorer": "option likelihood minus the no-audio prior"},
    }


def answer_lines(items: Sequence[Item], heard: Verdicts) -> str:
    """One JSON object a line: the probabilities per option, the choice, and how many rotations were right."""
    lines = []
    for item, probabilities, correct in zip(items, heard.options, heard.correct, strict=True):
        chosen = int(probabilities.argmax())
        plain: dict[str, JSON] = {
            "id": item.id,
            "probabilities": {
                option: round(float(p), 4) for option, p in zip(item.options, probabilities, strict=True)
            },
            "chosen": item.options[chosen],
            "key": item.key,
            "right": chosen == item.answer,
            "right_rotations": int(correct.sum()),
        }
        lines.append(canonical_json(plain))
    return "".join(f"{line}\n" for line in lines)


def read_scores(directory: Path) -> dict[str, Any]:
    """The content of `scores.json` in a payload directory."""
    return dict(json.loads((directory / SCORES).read_text(encoding="utf-8")))


def read_answers(directory: Path) -> dict[str, dict[str, Any]]:
    """The verdicts in a payload directory, by item id."""
    lines = (directory / ANSWERS).read_text(encoding="utf-8").splitlines()
    return {answer["id"]: answer for answer in map(json.loads, lines)}
