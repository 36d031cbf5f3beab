"""The smoke run's lesson: five clips, five captions, learned by heart.

Projector and GPT train together from random weights; with the GPT frozen the projector would get no gradient
at all, because the output matrices of a fresh GPT are zero. A falling loss proves that sound reaches the text
through every part. It does not prove that anything is understood.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from omni_model.artifacts import FeatureShards
from omni_model.audio.reader import FeatureReader
from omni_model.config import JSON, OverfitRecipe, Runtime
from omni_model.model.omni import OmniModel, Sounds
from omni_model.model.projector import Projector
from omni_model.model.weights import new_gpt, save_gpt, save_projector
from omni_model.storage import Workspace
from omni_model.text.questions import askable, caption
from omni_model.text.tokenizer import ByteTokenizer
from omni_model.training.exchanges import NOT_SCORED
from omni_model.training.loop import Objective, train
from omni_model.training.optim import plain_adamw

CAPTIONS_FILE = "captions.json"
MAX_CAPTION_BYTES = 64


def overfit(
    recipe: OverfitRecipe, features: FeatureShards, *, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: learn the captions of every clip by heart, and write what the model then says of each.

    Raises:
        RuntimeError: the loss fell by less than `min_loss_drop`.
    """
    reader, tokenizer = FeatureReader(features), ByteTokenizer()
    gpt = new_gpt(recipe.gpt, tokenizer.vocab_size, work.seed)
    projector = Projector(reader.width, gpt.config.n_embd, recipe.projector.stack, recipe.projector.hidden)
    projector.init_weights(work.seed % 2**63)
    objective = Overfitting(recipe, OmniModel(gpt, projector), reader, tokenizer)
    curve = train(
        objective,
        steps=recipe.steps,
        partial=work.partial,
        metrics=work.metrics,
        checkpoint_every_s=runtime.checkpoint_every_s,
    )
    losses = curve.values
    drop = losses[0] - losses[-1]
    work.metrics.summary(
        first_loss=round(losses[0], 4), last_loss=round(losses[-1], 4), loss_drop=round(drop, 4)
    )
    if drop < recipe.min_loss_drop:
        raise RuntimeError(
            f"the loss fell by {drop:.3f} nats from {losses[0]:.3f}, less than overfit.min_loss_drop "
            f"{recipe.min_loss_drop}: sound does not reach the text"
        )
    said = dict(zip(objective.keys, objective.speak(), strict=True))
    told = [{"key": key, "taught": objective.captions[key], "said": text} for key, text in said.items()]
    (work.out / CAPTIONS_FILE).write_text(json.dumps(told, sort_keys=True, indent=1) + "\n")
    save_gpt(gpt, work.out)
    save_projector(projector, work.out / "projector")
    curve.write(work.out)
    return {
        "num_parameters": sum(tensor.numel() for tensor in objective.tensors().values()),
        "steps": curve.steps,
    }


class Overfitting(Objective):
    """All clips in every step: soft tokens, `<|bos|>`, the caption, `<|bos|>` again as its end."""

    def __init__(
        self, recipe: OverfitRecipe, model: OmniModel, reader: FeatureReader, tokenizer: ByteTokenizer
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.captions = {clip["key"]: caption_of(clip) for clip in reader.clips}
        self.keys = list(self.captions)
        frames = [torch.from_numpy(reader.frames(key)).float() for key in self.keys]
        lengths = torch.tensor([len(each) for each in frames])
        self.sounds = Sounds.in_front(torch.nn.utils.rnn.pad_sequence(frames, batch_first=True), lengths)
        end = tokenizer.bos_id
        rows = [torch.tensor([end, *tokenizer.encode(text), end]) for text in self.captions.values()]
        self.text_lengths = torch.tensor([len(row) - 1 for row in rows])
        pad = torch.nn.utils.rnn.pad_sequence
        self.ids = pad([row[:-1] for row in rows], batch_first=True, padding_value=end)
        self.targets = pad([row[1:] for row in rows], batch_first=True, padding_value=NOT_SCORED)
        self.optimizer = plain_adamw(model.parameters(), recipe.lr)

    def tensors(self) -> Mapping[str, Tensor]:
        return dict(self.model.named_parameters())

    def set_schedule(self, step: int) -> None:
        """The rate is constant."""

    def loss(self, step: int) -> Tensor:
        return self.model(self.ids, self.targets, sounds=self.sounds, text_lengths=self.text_lengths)

    @torch.no_grad()
    def speak(self) -> list[str]:
        """The caption of each clip, by the likeliest byte each time."""
        gpt, end = self.model.gpt, self.tokenizer.bos_id
        rows, lengths = self.model.projector(self.sounds.frames, self.sounds.lengths)
        cache = gpt.new_cache(len(rows), rows.size(1) + MAX_CAPTION_BYTES + 1)
        chosen = torch.full((len(rows), 1), end)
        logits = gpt(chosen, audio_features=rows, audio_lengths=lengths, cache=cache, logits="last")
        said: list[Tensor] = []
        for _ in range(MAX_CAPTION_BYTES):
            chosen = logits[:, -1].argmax(dim=-1, keepdim=True)
            said.append(chosen)
            logits = gpt(chosen, cache=cache, logits="last")
        spoken = torch.cat(said, dim=1).tolist()
        return [self.tokenizer.decode([*ids, end][: [*ids, end].index(end)]) for ids in spoken]


def caption_of(clip: dict[str, Any]) -> str:
    """A clip's transcript where nothing is labelled, as with the smoke clips; else the grammar's sentence."""
    labels = askable(clip["labels"])
    return caption(labels, clip["transcript"]) if labels else str(clip["transcript"])
