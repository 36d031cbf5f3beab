"""A micro Whisper that learns to hear: a small encoder taught by what its synthetic sounds are known to be.

A random encoder keeps sounds apart but not in a way that a language model can use. A few minutes of dense
lessons (see `hearing`) make words, voices and textures readable by a straight line, from voices never heard
in training. It hears only what it was taught: a closed vocabulary, not speech at large. The encoder is frozen
from then on; nothing that comes later can tell it from `openai/whisper-base` but by its size.

Clips are batched at their true length, with padding hidden, because that is how the frozen encoder is run.

Legend: B batch, M mel bins, F mel frames (100 Hz), T encoder frames (50 Hz), E encoder width.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from omni_model.artifacts import AudioCorpus, canonical_json, write_atomically
from omni_model.audio.encoder import new_whisper, whisper_facts, write_whisper
from omni_model.audio.probe import PROBES, pool, probe_accuracies
from omni_model.config import JSON, BadInput, MicroEncoderRecipe, Runtime
from omni_model.storage import Workspace
from omni_model.training.hearing import Answers, HeardClip, Lesson, Vocabulary, hear
from omni_model.training.loop import Objective, train
from omni_model.training.optim import MuonAdamW, set_lr
from omni_model.training.schedule import cosine

WEIGHTS = "micro"
LEARNED_FROM, JUDGED_ON = "train", "validation"  # the test split belongs to the benchmark alone
PROBE_CLIPS = 1500
BATCHES_PER_SORT = 8
EVALUATION_ROWS = 32


def pretrain_encoder(
    recipe: MicroEncoderRecipe, *corpora: AudioCorpus, work: Workspace, runtime: Runtime
) -> dict[str, JSON]:
    """Stage: train a small Whisper encoder on the train split. Returns the facts of EncoderFiles.

    Its metrics tell, per category, what share of validation clips a linear probe reads rightly from the
    random encoder (`probe_before_...`) and from the trained one (`probe_after_...`).

    Raises:
        BadInput: the encoder's width does not divide into its heads, or no train clip is labelled.
    """
    shape = recipe.shape
    model = new_whisper(shape, work.seed)
    clips = hear(corpora, (LEARNED_FROM, JUDGED_ON), shape.num_mel_bins, shape.max_audio_s)
    learned = [clip for clip in clips if clip.metadata["split"] == LEARNED_FROM]
    if not any(clip.metadata["labels"] for clip in learned):
        raise BadInput("no clip of the train split is labelled; give pretrain_encoder a synthetic corpus.")
    probed = _probed(clips, work.seed)
    before = probe(model.encoder, probed)
    objective = Hearing(recipe, model.encoder, learned, work.seed)
    curve = train(
        objective,
        steps=recipe.steps,
        partial=work.partial,
        metrics=work.metrics,
        checkpoint_every_s=runtime.checkpoint_every_s,
    )
    after = probe(model.encoder, probed)
    work.metrics.summary(
        loss=curve.tail_mean(),
        parameters=sum(p.numel() for p in model.encoder.parameters()),
        probe_before=_mean(before),
        probe_after=_mean(after),
        **{f"probe_before_{category}": share for category, share in before.items()},
        **{f"probe_after_{category}": share for category, share in after.items()},
    )
    write_whisper(model, shape.num_mel_bins, shape.max_audio_s, work.out)
    curve.write(work.out)
    write_atomically(work.out / PROBES, canonical_json(_told(before, after, probed)) + "\n")
    return whisper_facts(shape, WEIGHTS)


def encode(encoder: Any, mel: Tensor, lengths: Tensor) -> Tensor:
    """Frames (B, T, E) of spectrograms (B, M, 2 T) of which `lengths` (B,) frames are real.

    Real frames are what the clip alone would give; the others mean nothing.
    """
    hidden = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel)))).permute(0, 2, 1)
    num_frames = hidden.size(1)
    hidden = hidden + encoder.embed_positions.weight[:num_frames]
    real = torch.arange(num_frames) < lengths.unsqueeze(1)
    hidden_keys = None if bool(real.all()) else torch.where(real, 0.0, -torch.inf)[:, None, None, :]
    for layer in encoder.layers:
        hidden = layer(hidden, hidden_keys)
        if isinstance(hidden, tuple):  # transformers 4
            hidden = hidden[0]
    frames: Tensor = encoder.layer_norm(hidden)
    return frames


@torch.no_grad()
def look_around(encoder: Any) -> None:
    """Let every head begin by attending at one distance: 1, 3, ... frames before and after, doubled a layer.

    Whisper's positions are sines and cosines of time. With queries that read them, and keys that read them
    turned by the angle of some frames, products are largest just that many frames away. From random weights
    a third of all steps went by until attention had found out what lies next to what.
    """
    width, heads = encoder.config.d_model, encoder.config.encoder_attention_heads
    half, pairs = width // 2, width // heads // 2
    waves = torch.arange(pairs) * half // (2 * pairs)  # the faster half of them
    radians_per_frame = 10_000.0 ** (-waves / max(1, half - 1))
    for depth, layer in enumerate(encoder.layers):
        query, key = torch.zeros(width, width), torch.zeros(width, width)
        for head in range(heads):
            distance = (2 * (head // 2) + 1) * 2**depth * (1 if head % 2 else -1)
            sine = head * (width // heads) + torch.arange(pairs)
            cosine, turn = sine + pairs, radians_per_frame * distance
            query[sine, waves] = query[cosine, half + waves] = 1.0
            key[sine, waves] = key[cosine, half + waves] = turn.cos()
            key[sine, half + waves], key[cosine, waves] = -turn.sin(), turn.sin()
        layer.self_attn.q_proj.weight.copy_(query)
        layer.self_attn.k_proj.weight.copy_(key)


def bent(mel: Tensor, factors: Tensor) -> Tensor:
    """Spectrograms (B, M, F) with each one's frequency axis stretched by its factor (B,).

    A longer or shorter throat moves all resonances alike, so this makes voices that no synthesizer has.
    Source: Jaitly and Hinton 2013, "Vocal Tract Length Perturbation improves speech recognition".
    """
    bins = torch.arange(mel.size(1))
    place = (bins * factors.unsqueeze(1)).clamp(max=mel.size(1) - 1)
    nearness = (1 - (place.unsqueeze(-1) - bins).abs()).clamp(min=0)  # (B, M, M): linear interpolation
    return nearness.to(mel.dtype) @ mel


class Hearing(Objective):
    """Batches of clips and all that is known of them; the encoder and its readers learn."""

    clip_norm = 1.0

    def __init__(
        self, recipe: MicroEncoderRecipe, encoder: Any, clips: Sequence[HeardClip], seed: int
    ) -> None:
        look_around(encoder)
        self.recipe, self.encoder, self.clips, self.seed = recipe, encoder.train(), clips, seed
        self.vocabulary = Vocabulary.of([clip.metadata for clip in clips])
        generator = torch.Generator().manual_seed(seed % 2**63)
        self.answers = Answers(recipe.shape.width, self.vocabulary, generator)
        self.optimizer = MuonAdamW(_groups(self.tensors(), recipe.matrix_lr, recipe.lr))

    def tensors(self) -> Mapping[str, Tensor]:
        parts = {"encoder": self.encoder, "answers": self.answers}
        return {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }

    def set_schedule(self, step: int) -> None:
        set_lr(self.optimizer, cosine(step, self.recipe.steps, self.recipe.warmup_steps))

    def loss(self, step: int) -> Tensor:
        lesson = Lesson.of([self.clips[index] for index in self._batch(step)], self.vocabulary)
        rng = np.random.default_rng([self.seed, step, 1])
        bend = self.recipe.max_voice_bend
        mel = bent(lesson.mel, torch.from_numpy(np.exp(rng.uniform(-bend, bend, len(lesson.mel)))))
        frames = encode(self.encoder, mel, lesson.lengths)
        of_clips, of_frames = self.answers.losses(frames, lesson)
        return of_clips + self.recipe.frame_loss_weight * of_frames

    def _batch(self, step: int) -> np.ndarray:
        """Numbers of a step's clips. Several batches are drawn at once, sorted by length: less padding."""
        group, place = divmod(step, BATCHES_PER_SORT)
        rng = np.random.default_rng([self.seed, group])
        size = BATCHES_PER_SORT * self.recipe.rows_per_step
        drawn = rng.choice(len(self.clips), size, replace=len(self.clips) < size)
        lengths = [self.clips[index].num_frames for index in drawn]
        batches = drawn[np.argsort(lengths, kind="stable")].reshape(BATCHES_PER_SORT, -1)
        batch: np.ndarray = batches[rng.permutation(BATCHES_PER_SORT)[place]]
        return batch


def _groups(tensors: Mapping[str, Tensor], matrix_lr: float, lr: float) -> list[dict[str, Any]]:
    """Muon for the matrices of the layers, one group a shape; AdamW for all else."""
    matrices = {name: p for name, p in tensors.items() if ".layers." in name and p.dim() == 2}
    muon = {"kind": "muon", "momentum": 0.95, "ns_steps": 5, "beta2": 0.9, "weight_decay": 0.0}
    adamw = {"kind": "adamw", "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    rest = [p for name, p in tensors.items() if name not in matrices]
    return [
        adamw | {"params": rest, "lr": lr, "initial_lr": lr},
        *(
            muon
            | {"params": [p for p in matrices.values() if tuple(p.shape) == shape]}
            | {"lr": matrix_lr, "initial_lr": matrix_lr}
            for shape in sorted({tuple(p.shape) for p in matrices.values()})
        ),
    ]


def _probed(clips: Sequence[HeardClip], seed: int) -> list[HeardClip]:
    """Whole clips of the train split, at most PROBE_CLIPS of them, and of the validation split."""
    whole = [clip for clip in clips if clip.whole and clip.metadata["labels"]]
    train_clips = [clip for clip in whole if clip.metadata["split"] == LEARNED_FROM]
    order = np.random.default_rng([seed, len(train_clips)]).permutation(len(train_clips))
    chosen = [train_clips[index] for index in sorted(order[:PROBE_CLIPS])]
    return chosen + [clip for clip in whole if clip.metadata["split"] == JUDGED_ON]


@torch.no_grad()
def probe(encoder: Any, clips: Sequence[HeardClip]) -> dict[str, float]:
    """Category -> accuracy of linear probes on this encoder's frames; see `probe_accuracies`."""
    encoder.eval()
    by_length = sorted(clips, key=lambda clip: clip.num_frames)
    nothing = Vocabulary({}, {}, {})
    pooled = {}
    for first in range(0, len(by_length), EVALUATION_ROWS):
        rows = by_length[first : first + EVALUATION_ROWS]
        lesson = Lesson.of(rows, nothing)
        for clip, frames in zip(rows, encode(encoder, lesson.mel, lesson.lengths), strict=True):
            pooled[clip.metadata["key"]] = pool(frames[: clip.num_frames].numpy())
    return probe_accuracies([clip.metadata for clip in clips], pooled)


def _told(
    before: Mapping[str, float], after: Mapping[str, float], clips: Sequence[HeardClip]
) -> dict[str, JSON]:
    """Category -> what its probes read, beside guessing; what the report shows."""
    told: dict[str, JSON] = {}
    judged = [clip.metadata["labels"] for clip in clips if clip.metadata["split"] == JUDGED_ON]
    for category in after:
        answers = [labels[category] for labels in judged if category in labels]
        shares = {"before": before[category], "after": after[category], "chance": 1 / len(set(answers))}
        told[category] = {**shares, "clips": len(answers)}
    return told


def _mean(shares: Mapping[str, float]) -> float:
    return round(sum(shares.values()) / max(1, len(shares)), 4)
