"""The text model, lesson after lesson: packed documents, and exchanges about a sentence instead of a sound.

The sentence is read as sound will be: as embeddings in front of the text, without token ids. So the GPT
learns to find words in vectors without value embeddings and smear, which is all that a projector can make.

The lessons are those of `omni_model.text.lessons`. Each opens when an exam shows that the one before is
understood, never at a fixed step: letters bind in a sudden transition whose moment no schedule knows, and a
model that reads sentences before it answers by guessing for ever. Once the last one is understood too, the
learning rate falls over a fixed number of steps, and again until the final exam is passed. A model that never
passes it fails the stage: nothing built on it could hear.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from omni_model.artifacts import TextCorpus, TokenizerFiles
from omni_model.config import JSON, BadInput, LessonsRecipe, Runtime
from omni_model.hardware import speed_up_products
from omni_model.model.gpt import GPT
from omni_model.model.weights import new_gpt, save_gpt
from omni_model.storage import Workspace
from omni_model.text.lessons import LESSONS, Document, exam, read_documents
from omni_model.text.packing import pack, tokenize_document
from omni_model.text.tokenizer import Tokenizer, load_tokenizer
from omni_model.training.exchanges import NOT_SCORED, ExchangeRows
from omni_model.training.loop import Objective, train
from omni_model.training.optim import MuonAdamW, parameter_groups, set_lr, set_muon
from omni_model.training.schedule import lr_multiplier
from omni_model.training.setup import WIDE

EXAM_SEED = 20_260_401  # apart from every corpus, whatever its seed
GATE_QUESTIONS, FINAL_QUESTIONS = 100, 400
EXAMINE_EVERY = 25
MUON_MOMENTUM = 0.95
BLEND_SHARE = 0.5
BLEND_SHARPNESS = (0.5, 1.0, 2.0, 4.0)


@dataclass(frozen=True)
class Plan:
    """One lesson: shares of the exchanges by their lesson, the packed rows, and the share of the latter."""

    exchanges: dict[str, float]
    packed: str
    packed_share: float


PLANS = {
    "letters": Plan({}, "letters", 1.0),
    # Without drills beside them, words take five times as long.
    "words": Plan({"words": 1.0}, "letters", 0.3),
    "questions": Plan({"questions": 0.5, "sentences": 0.3, "words": 0.2}, "letters", 0.1),
    "sentences": Plan({"questions": 0.6, "sentences": 0.35, "words": 0.05}, "sentences", 0.1),
}


def learn_lessons(
    recipe: LessonsRecipe, text: TextCorpus, tokenizer: TokenizerFiles, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: train a GPT from scratch.

    Raises:
        BadInput: the corpus lacks a lesson.
        RuntimeError: letters did not bind within `max_steps`, or the final exam is below `min_accuracy`.
    """
    words = load_tokenizer(tokenizer.out)
    gpt = new_gpt(recipe.gpt, words.vocab_size, work.seed)
    if recipe.match_at_start:
        match_at_start(gpt)
    if gpt.config.n_embd >= WIDE:
        speed_up_products(work.partial / "products.json")
    objective = Pretraining(recipe, gpt, read_documents(text.out), words, work.seed)
    curve = train(
        objective,
        steps=recipe.max_steps,
        partial=work.partial,
        metrics=work.metrics,
        checkpoint_every_s=runtime.checkpoint_every_s,
        evaluate_every=EXAMINE_EVERY,
    )
    accuracy = objective.final_exam()
    work.metrics.summary(loss=curve.tail_mean(), text_multiple_choice=accuracy, steps=curve.steps)
    if accuracy < recipe.min_accuracy:
        raise RuntimeError(
            f"after {curve.steps} steps the text model answers {accuracy:.0%} of its multiple-choice exam, "
            f"below lessons.min_accuracy {recipe.min_accuracy:.0%} (lessons, and then falling rates, began "
            f"at steps {objective.opened}); raise lessons.max_steps, or try another seed"
        )
    save_gpt(gpt, work.out)
    curve.write(work.out)
    shape = {"n_embd": gpt.config.n_embd, "vocab_size": gpt.config.vocab_size}
    return {"num_parameters": gpt.num_params(), "steps": curve.steps, **shape}


@torch.no_grad()
def match_at_start(gpt: GPT) -> None:
    """Set every key matrix to its query matrix, where heads allow: a token then attends to its own copies.

    With q and k normed, equal inputs have the largest dot product there is, so finding an earlier copy of a
    word, the step on which letter binding waits, needs no learning.
    """
    for block in gpt.transformer["h"]:
        if block.attn.c_k.weight.shape == block.attn.c_q.weight.shape:
            block.attn.c_k.weight.copy_(block.attn.c_q.weight)


@dataclass(frozen=True)
class Heard:
    """Exchanges with what is heard before them: sounds (B, A) token ids, their lengths (B,), and the rows."""

    sounds: Tensor
    sound_lengths: Tensor
    rows: ExchangeRows

    @classmethod
    def of(cls, documents: Sequence[Document], tokenizer: Tokenizer) -> "Heard":
        """One row a document."""
        sounds = [torch.tensor(tokenizer.encode(f" {document['sound']}")) for document in documents]
        return cls(
            torch.nn.utils.rnn.pad_sequence(sounds, batch_first=True),
            torch.tensor([len(sound) for sound in sounds]),
            ExchangeRows.of(
                [(document["question"], document["answer"]) for document in documents], tokenizer
            ),
        )

    def read(self, gpt: GPT, blend: Tensor | None = None, **how: Any) -> Tensor:
        """The GPT's output for the rows, with the sounds as embeddings in front, mixed by `blend` (B,A,A)."""
        words = gpt.transformer["wte"](self.sounds)
        return gpt(
            self.rows.ids,
            audio_features=words if blend is None else blend @ words,
            audio_lengths=self.sound_lengths,
            text_lengths=self.rows.lengths,
            **how,
        )

    @torch.no_grad()
    def accuracy(self, gpt: GPT) -> float:
        """Share of answers whose first token is the GPT's first choice among all tokens."""
        place, answers = self.rows.first_answer()
        chosen = self.read(gpt)[torch.arange(len(place)), place].argmax(dim=-1)
        return round((chosen == answers).double().mean().item(), 4)


def random_blend(documents: Sequence[Document], lengths: Tensor, rng: np.random.Generator) -> Tensor:
    """Matrices (B, A, A) that turn some sounds into mixtures of their words, in no order.

    In a sound most things are heard at once, and a projector sees a fifth of a second at a time: its soft
    tokens are mixtures. Captions keep their words apart, because their order is what they teach.
    """
    size = int(lengths.max())
    logits = rng.normal(size=(len(documents), size, size)) * rng.choice(
        BLEND_SHARPNESS, size=(len(documents), 1, 1)
    )
    logits[np.arange(size)[None, None, :].repeat(size, 1) >= lengths.numpy()[:, None, None]] = -np.inf
    weights = torch.from_numpy(logits).softmax(dim=-1).float()
    apart = rng.random(len(documents)) >= BLEND_SHARE
    apart |= np.array([document["lesson"] == "sentences" for document in documents])
    return torch.where(torch.from_numpy(apart)[:, None, None], torch.eye(size), weights)


@torch.no_grad()
def packed_accuracy(gpt: GPT, rows: Tensor) -> float:
    """Share of the learned tokens of packed rows (2, B, T + 1) that are the GPT's first choice."""
    targets = _targets(rows)
    scored = targets != NOT_SCORED
    chosen = gpt(rows[0, :, :-1]).argmax(dim=-1)
    return round((chosen == targets)[scored].double().mean().item(), 4)


class Pretraining(Objective):
    """Batches of the open lesson. Its state: when lessons opened and, at the end, the rate began to fall."""

    def __init__(
        self, recipe: LessonsRecipe, gpt: GPT, documents: Sequence[Document], tokenizer: Tokenizer, seed: int
    ) -> None:
        self.recipe, self.gpt, self.tokenizer, self.seed = recipe, gpt, tokenizer, seed
        row_tokens = recipe.gpt.sequence_len + 1
        self.packed = {
            lesson: _packed_rows(_of_lesson(documents, lesson, heard=False), tokenizer, row_tokens)
            for lesson in ("letters", "sentences")
        }
        self.heard = {
            lesson: _of_lesson(documents, lesson, heard=True)
            for lesson in ("words", "questions", "sentences")
        }
        self._gate = self._gates(row_tokens)
        groups = parameter_groups(
            gpt,
            matrix_lr=recipe.matrix_lr,
            embedding_lr=recipe.embedding_lr,
            unembedding_lr=recipe.unembedding_lr,
        )
        self.optimizer = MuonAdamW(groups)
        set_muon(self.optimizer, momentum=MUON_MOMENTUM, weight_decay=0.0)
        self.opened = [0]
        self.passed = False

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.gpt.named_parameters())

    def set_schedule(self, step: int) -> None:
        multiplier = min(1.0, (step + 1) / max(1, self.recipe.warmup_steps))
        if self._is_settling():
            length = self.recipe.last_lesson_steps
            multiplier *= lr_multiplier(min(step - self.opened[-1], length), length, 0, 0.8)
            multiplier *= 0.5 ** (len(self.opened) - len(LESSONS) - 1)  # a later attempt disturbs less
        set_lr(self.optimizer, multiplier)

    def loss(self, step: int) -> Tensor:
        rng = np.random.default_rng([self.seed, step])
        plan = PLANS[LESSONS[min(len(self.opened), len(LESSONS)) - 1]]
        loss = torch.zeros(())
        if plan.packed_share > 0:
            rows = self.packed[plan.packed]
            count = math.ceil(plan.packed_share * self.recipe.packed_rows_per_step)
            picked = rows[:, rng.integers(rows.size(1), size=count)]
            loss = loss + plan.packed_share * self.gpt(picked[0, :, :-1], _targets(picked))
        if plan.packed_share < 1:
            documents = self._pick(plan.exchanges, rng)
            heard = Heard.of(documents, self.tokenizer)
            blend = random_blend(documents, heard.sound_lengths, rng)
            loss = loss + (1 - plan.packed_share) * heard.read(self.gpt, blend, targets=heard.rows.targets)
        return loss

    def _pick(self, shares: Mapping[str, float], rng: np.random.Generator) -> list[Document]:
        lessons = rng.choice(list(shares), size=self.recipe.exchanges_per_step, p=list(shares.values()))
        return [self.heard[lesson][rng.integers(len(self.heard[lesson]))] for lesson in lessons]

    def _gates(self, row_tokens: int) -> dict[str, Callable[[], float]]:
        """The exam that each lesson but the last ends with."""
        drills = _packed_rows(exam("letters", GATE_QUESTIONS, EXAM_SEED), self.tokenizer, row_tokens)
        words, questions = (
            Heard.of(exam(lesson, GATE_QUESTIONS, EXAM_SEED), self.tokenizer)
            for lesson in ("words", "questions")
        )
        return {
            "letters": lambda: packed_accuracy(self.gpt, drills),
            "words": lambda: words.accuracy(self.gpt),
            "questions": lambda: questions.accuracy(self.gpt),
            "sentences": lambda: questions.accuracy(self.gpt),
        }

    def evaluate(self, step: int) -> dict[str, float]:
        lesson = min(len(self.opened), len(LESSONS))
        accuracy = self._gate[LESSONS[lesson - 1]]()
        last = lesson == len(LESSONS)
        if self._is_settling():
            if step >= self.opened[-1] + self.recipe.last_lesson_steps:
                self.passed = self.final_exam() >= self.recipe.min_accuracy
                self.opened += [] if self.passed else [step]  # then it settles once more
        elif accuracy >= (self.recipe.settling_accuracy if last else self.recipe.lesson_accuracy):
            self.opened.append(step)
        return {"lesson": float(lesson), "exam": accuracy}

    def final_exam(self) -> float:
        """Accuracy on multiple choice about sentences."""
        return Heard.of(exam("questions", FINAL_QUESTIONS, EXAM_SEED), self.tokenizer).accuracy(self.gpt)

    def finished(self) -> bool:
        return self.passed

    def _is_settling(self) -> bool:
        """Whether the last lesson is understood well enough for the learning rate to fall."""
        return len(self.opened) > len(LESSONS)

    def state(self) -> dict[str, Any]:
        return {"opened": self.opened, "passed": self.passed}

    def restore(self, state: dict[str, Any]) -> None:
        self.opened, self.passed = list(state["opened"]), state["passed"]


def _of_lesson(documents: Sequence[Document], lesson: str, *, heard: bool) -> list[Document]:
    chosen = [each for each in documents if each["lesson"] == lesson and ("sound" in each) == heard]
    if not chosen:
        raise BadInput(f"the text corpus has too few {lesson!r} documents; raise text.num_documents")
    return chosen


def _packed_rows(documents: Sequence[Document], tokenizer: Tokenizer, row_tokens: int) -> Tensor:
    """Ids and masks (2, N, T + 1) of packed documents."""
    tokens = [tokenize_document(tokenizer, document) for document in documents]
    return torch.from_numpy(np.stack(pack(tokens, row_tokens))).long()


def _targets(rows: Tensor) -> Tensor:
    """What packed rows (2, B, T + 1) teach: (B, T), -1 where nothing is learned."""
    return torch.where(rows[1, :, 1:] > 0, rows[0, :, 1:], NOT_SCORED)
