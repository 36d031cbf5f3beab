"""What both lessons in hearing share: rows of the mix, and early truth about whether anything is heard.

A listener that ignores its ears is the normal failure in this field, and its loss falls all the same. So a
few rows that it does not learn from are looked at again and again: is the loss higher when the clips are
exchanged, do soft tokens keep to the loudness of words, is the first token of an answer right? The gradient
is looked at too: every part that is to learn must have one, and nothing that is frozen may. A run whose loss
does not mind which clip it hears stops, instead of ending with a score that says so.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from omni_model.artifacts import (
    AdapterCheckpoint,
    GptCheckpoint,
    ProjectorCheckpoint,
    canonical_json,
)
from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON, BadInput
from omni_model.model.omni import OmniModel
from omni_model.training.instructions import Instruction
from omni_model.training.listening import EVALUATION_ROWS, Classroom, choice_accuracy, look, mean_loss
from omni_model.training.loop import Objective
from omni_model.training.loss_scale import LossScale

PROJECT = "nanochat-omni-audio"  # wandb's, of all that learns from sound
LOOKS, MIN_LOOK_STEPS = 8, 5  # at the truth in the course of a training, and how far apart at least
LOOKED_AT = 2 * EVALUATION_ROWS
HEARD_KINDS = ("caption", "question", "choice", "transcription", "public")
TRUTH = "truth.json"
VALIDATED = 400  # rows of multiple choice after the last step


class Teaching(Objective):
    """Rows of a mix; `parts` learn, each named group of parameters, and nothing else in the model.

    State: what each look found. BadInput where the mix has no rows of a single heard clip to look at.
    """

    clip_norm = 1.0

    def __init__(
        self,
        model: OmniModel,
        lessons: Classroom,
        exam: Classroom,
        parts: Mapping[str, Mapping[str, Tensor]],
        *,
        rows_per_step: int,
        steps: int,
        min_gap: float,
        field: str,
        seed: int,
    ) -> None:
        self.model, self.lessons, self.exam, self.parts = model, lessons, exam, parts
        self.rows_per_step, self.steps, self.min_gap = rows_per_step, steps, min_gap
        self.field, self.seed = field, seed
        self.loss_scale = LossScale() if model.gpt.compute_dtype == torch.float16 else None
        self.looked_at = exam.of_kind(*HEARD_KINDS)[:LOOKED_AT]
        if len(self.looked_at) < 2:
            raise BadInput(
                "the mix holds too few validation rows about clips to tell whether anything is heard; "
                "raise instructions.validation_rows"
            )
        self.truths: list[dict[str, float]] = []

    @property
    def look_every(self) -> int:
        """Steps between two looks."""
        return max(MIN_LOOK_STEPS, self.steps // LOOKS)

    def tensors(self) -> Mapping[str, Tensor]:
        return {
            f"{part}.{name}": tensor
            for part, tensors in self.parts.items()
            for name, tensor in tensors.items()
        }

    def loss(self, step: int) -> Tensor:
        rows = self.lessons.training_rows(step, self.rows_per_step, self.seed)
        return self.lessons.batch(rows).loss(self.model)

    def evaluate(self, step: int) -> dict[str, float]:
        truth = asdict(look(self.model, self.exam, self.looked_at)) | self.gradient_norms()
        self.truths.append({"step": float(step), **truth})
        if self.min_gap and 2 * step >= self.steps and truth["gap"] < self.min_gap:
            raise RuntimeError(
                f"after {step} of {self.steps} steps the loss with another's clip lies {truth['gap']:.3f} "
                f"nats above that with the right one, below {self.field}.min_gap {self.min_gap}: nothing is "
                "heard. Likely causes: an encoder whose features do not hold what is asked (see its linear "
                f"probe), a GPT that has not bound letters to options, or {self.field}.lr; with "
                f"{self.field}.min_gap=0 the run goes on all the same"
            )
        return truth

    def gradient_norms(self) -> dict[str, float]:
        """The gradient's norm of each part on rows that are looked at.

        Raises:
            RuntimeError: a part has no gradient or not a finite one, or something frozen has one.
        """
        self.exam.batch(self.looked_at[: self.rows_per_step]).loss(self.model).backward()
        learning = {id(tensor) for tensor in self.tensors().values()}
        named = dict(self.model.named_parameters())
        frozen = [name for name, p in named.items() if p.grad is not None and id(p) not in learning]
        norms = {}
        for part, tensors in self.parts.items():
            found = [t.grad.double().square().sum() for t in tensors.values() if t.grad is not None]
            norms[f"{part}_gradient"] = round(float(torch.stack(found).sum().sqrt()), 6) if found else 0.0
        for parameter in named.values():
            parameter.grad = None
        if frozen:
            raise RuntimeError(f"{frozen[0]} is to stay frozen and has a gradient")
        for part, norm in norms.items():
            if not 0 < norm < float("inf"):
                raise RuntimeError(f"the gradient of the {part.removesuffix('_gradient')} is {norm}")
        return norms

    def state(self) -> dict[str, Any]:
        return {"truths": self.truths}

    def restore(self, state: dict[str, Any]) -> None:
        self.truths = list(state["truths"])

    def conclude(self, out: Path, text_before: Mapping[str, float] | None = None) -> dict[str, float]:
        """Look once more after the last step, measure multiple choice, and write `truth.json`.

        With what text was worth before, it is measured again.
        """
        if not self.truths or self.truths[-1]["step"] < self.steps:
            self.evaluate(self.steps)
        last = self.truths[-1]
        told = {
            "validation_loss": last["own_loss"],
            "shuffled_audio_gap": last["gap"],
            "first_token_accuracy": last["first_token_accuracy"],
            "audio_text_rms_ratio": last["rms_ratio"],
        }
        if choices := self.exam.of_kind("choice")[:VALIDATED]:
            told["validation_accuracy"] = choice_accuracy(self.model, self.exam, choices)
        text = {"before": text_before, "after": text_ability(self.model, self.exam)} if text_before else {}
        for when, figures in text.items():
            told |= {f"{name}_{when}": value for name, value in (figures or {}).items()}
        content = json.dumps({"looks": self.truths, "text": text}, sort_keys=True, indent=1)
        (out / TRUTH).write_text(content + "\n")
        return told


def belonging(gpt: GptCheckpoint, features: FeatureReader) -> dict[str, JSON]:
    """Facts of what is taught with a GPT on features: it is worth nothing with others."""
    return {
        "input_width": features.width,
        "n_embd": gpt.n_embd,
        "gpt_digest": gpt.digest,
        "policy_digest": features.policy_digest,
    }


def check_belonging(
    taught: ProjectorCheckpoint | AdapterCheckpoint, gpt: GptCheckpoint, features: FeatureReader
) -> None:
    """BadInput where a projector or adapter was taught with another GPT or on other features."""
    if taught.policy_digest != features.policy_digest:
        raise BadInput(
            f"{taught.uri} was taught on other features ({taught.policy_digest[:8]}) than these "
            f"({features.policy_digest[:8]}: {canonical_json(features.policy)}); align a projector on these"
        )
    if taught.gpt_digest != gpt.digest:
        raise BadInput(
            f"{taught.uri} was taught with another GPT ({taught.gpt_digest[:8]}) than {gpt.uri} "
            f"({gpt.digest[:8]}); align a projector with this one"
        )


def text_ability(model: OmniModel, exam: Classroom) -> dict[str, float]:
    """Of rows without sound: `text_loss` in nats per learned token, and accuracy where letters answer."""
    rows: Sequence[Instruction] = exam.of_kind("replay")[:VALIDATED]
    if not rows:
        return {}
    told = {"text_loss": mean_loss(model, exam, rows)}
    letters = [row for row in rows if row.messages[-1]["content"] in ("A", "B", "C", "D")]
    if letters:
        told["text_accuracy"] = choice_accuracy(model, exam, letters)
    return told
