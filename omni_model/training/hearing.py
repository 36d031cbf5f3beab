"""What an encoder is taught to hear: the labels of whole clips, and what sounds in every frame.

Nothing is listed here: the lessons are read off the clips. Each category of labels is one question about a
clip; each track of a timeline (words, beeps, the motion of the pitch) is one about every frame of the clips
that have it, with silence of the track as an answer too, and one about how long what sounds lasts. Every
frame is also asked how loud it is and, where somebody speaks, for the pitch of the voice; both are measured.
Dense answers are what makes learning short: from labels of clips alone, a direction of pitch stayed at chance
for as long as anybody waited, and pace and loudness were heard half.

Legend: B batch, M mel bins, F mel frames (100 Hz), T encoder frames (50 Hz), E encoder width.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from omni_model.artifacts import AudioCorpus
from omni_model.audio.corpora import read_shard, shard_paths
from omni_model.audio.mel import log_mel
from omni_model.audio.pitch import NUM_PITCHES, voice_pitch
from omni_model.audio.waveform import (
    ENCODER_FRAME_RATE_HZ,
    FRAMES_PER_ENCODER_FRAME,
    decode,
)

SILENT = ""  # the value of a frame in which a track has no event
UNKNOWN = -1  # the target where a clip has no such label or track
INITIAL_SPREAD = 0.02
LEVEL_DB, LOWEST_DB, NUM_LEVELS = 4.0, -48.0, 16  # steps of a frame's level, as its spectrogram has it
SHORTEST_S, LENGTHS_PER_OCTAVE, NUM_LENGTHS = 0.04, 2, 10  # steps of how long an event lasts
MEASURED_WEIGHT = 0.25  # of level and lengths, which are easily heard, against all else about frames
PART_WEIGHT = 0.5  # of labels read from single frames, against those read from the mean


@dataclass(frozen=True)
class Vocabulary:
    """Every question there is.

    Attributes:
        labels: category -> its values.
        tracks: track -> its values, silence first.
        counts: track -> the most events in one clip, for tracks whose events are all alike. Events that
            differ are told apart; equal ones can only be counted.
    """

    labels: Mapping[str, tuple[str, ...]]
    tracks: Mapping[str, tuple[str, ...]]
    counts: Mapping[str, int]

    @classmethod
    def of(cls, clips: Sequence[Mapping[str, Any]]) -> "Vocabulary":
        """What occurs in the metadata of these clips."""
        labels: dict[str, set[str]] = {}
        tracks: dict[str, set[str]] = {}
        counts: Counter[str] = Counter()
        for clip in clips:
            for category, value in clip["labels"].items():
                labels.setdefault(category, set()).add(value)
            for track, value, _, _ in clip.get("timeline", ()):
                tracks.setdefault(track, set()).add(value)
            counts |= Counter(event[0] for event in clip.get("timeline", ()))
        return cls(
            {category: tuple(sorted(labels[category])) for category in sorted(labels)},
            {track: (SILENT, *sorted(tracks[track])) for track in sorted(tracks)},
            {track: counts[track] for track in sorted(tracks) if len(tracks[track]) == 1},
        )

    @property
    def lasting(self) -> tuple[str, ...]:
        """Tracks whose events are asked how long they last: those that are not counted."""
        return tuple(track for track in self.tracks if track not in self.counts)

    @property
    def frame_sizes(self) -> list[int]:
        """How many answers each question about a frame has: values, counts, lengths, level and pitch."""
        values = [len(each) for each in self.tracks.values()]
        counts = [most + 1 for most in self.counts.values()]
        return [*values, *counts, NUM_PITCHES, NUM_LEVELS, *(NUM_LENGTHS for _ in self.lasting)]

    @property
    def frame_weights(self) -> list[float]:
        """How much each question about a frame counts, in all 1."""
        heard = len(self.tracks) + len(self.counts) + 1
        weights = [1.0] * heard + [MEASURED_WEIGHT] * (1 + len(self.lasting))
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class HeardClip:
    """A window of a clip: its spectrogram (M, F) float16 and its metadata.

    Attributes:
        start_s: where in the clip the window begins.
        whole: whether the window is all of the clip, so that labels of the clip hold for it.
        pitch: what `voice_pitch` measured (T,), where somebody speaks.
    """

    mel: Tensor
    metadata: Mapping[str, Any]
    start_s: float = 0.0
    whole: bool = True
    pitch: np.ndarray | None = None

    @property
    def num_frames(self) -> int:
        """T."""
        return self.mel.size(1) // FRAMES_PER_ENCODER_FRAME

    def label_targets(self, vocabulary: Vocabulary) -> list[int]:
        """The number of the clip's value in each category, UNKNOWN where it has none."""
        labels = self.metadata["labels"] if self.whole else {}
        return [
            values.index(labels[category]) if labels.get(category) in values else UNKNOWN
            for category, values in vocabulary.labels.items()
        ]

    def frame_targets(self, vocabulary: Vocabulary) -> np.ndarray:
        """What is right at the middle of each frame: (questions, T) int64.

        The number of each track's value, how many events of each counted track have begun, the pitch, the
        level, and how long what sounds on each other track lasts.
        """
        events: dict[str, list[tuple[str, float, float]]] = {track: [] for track in vocabulary.tracks}
        for track, value, start_s, end_s in self.metadata.get("timeline", ()):
            if value in vocabulary.tracks.get(track, ()):
                events[track].append((value, start_s, end_s))
        rows = [self._values(events[track], values) for track, values in vocabulary.tracks.items()]
        rows += [self._counts(events[track], most) for track, most in vocabulary.counts.items()]
        rows.append(np.full(self.num_frames, UNKNOWN) if self.pitch is None else self.pitch)
        rows.append(levels(self.mel))
        rows += [self._lengths(events[track]) for track in vocabulary.lasting]
        return np.stack(rows)

    @property
    def _middles_s(self) -> np.ndarray:
        return self.start_s + (np.arange(self.num_frames) + 0.5) / ENCODER_FRAME_RATE_HZ

    def _values(self, events: Sequence[tuple[str, float, float]], values: Sequence[str]) -> np.ndarray:
        row, middle_s = np.full(self.num_frames, 0 if events else UNKNOWN), self._middles_s
        for value, start_s, end_s in events:
            row[(middle_s >= start_s) & (middle_s < end_s)] = values.index(value)
        return row

    def _counts(self, events: Sequence[tuple[str, float, float]], most: int) -> np.ndarray:
        if not events:
            return np.full(self.num_frames, UNKNOWN)
        begun = self._middles_s >= np.array([start_s for _, start_s, _ in events])[:, None]
        return np.minimum(begun.sum(axis=0), most)

    def _lengths(self, events: Sequence[tuple[str, float, float]]) -> np.ndarray:
        row, middle_s = np.full(self.num_frames, UNKNOWN), self._middles_s
        for _, start_s, end_s in events:
            octaves = math.log2(max(end_s - start_s, SHORTEST_S) / SHORTEST_S)
            step = min(int(LENGTHS_PER_OCTAVE * octaves), NUM_LENGTHS - 1)
            row[(middle_s >= start_s) & (middle_s < end_s)] = step
        return row


def levels(mel: Tensor) -> np.ndarray:
    """How loud each encoder frame of a spectrogram (M, F) is, in steps of LEVEL_DB: (T,) int64."""
    power = torch.pow(10.0, 4.0 * mel.float() - 4.0).sum(dim=0)  # Whisper's scale undone
    frames = power.unflatten(0, (-1, FRAMES_PER_ENCODER_FRAME)).mean(dim=1)
    steps = (10 * frames.log10() - LOWEST_DB) / LEVEL_DB
    return steps.floor().clamp(0, NUM_LEVELS - 1).long().numpy()


def hear(
    corpora: Sequence[AudioCorpus], splits: Sequence[str], num_mel_bins: int, max_audio_s: int
) -> list[HeardClip]:
    """Every clip of these splits, in windows of at most `max_audio_s`, as the frozen encoder will hear it."""
    return [
        window
        for corpus in corpora
        for path in shard_paths(corpus)
        for key, sound, metadata in read_shard(path)
        if metadata["split"] in splits
        for window in _windows(decode(sound, key), metadata, num_mel_bins, max_audio_s)
    ]


def _windows(
    samples: np.ndarray, metadata: Mapping[str, Any], num_mel_bins: int, max_audio_s: int
) -> Iterator[HeardClip]:
    size = max_audio_s * ENCODER_FRAME_RATE_HZ
    parts = torch.split(log_mel(samples, num_mel_bins).half(), size * FRAMES_PER_ENCODER_FRAME, dim=1)
    pitch = voice_pitch(samples) if metadata["transcript"] else None
    for number, part in enumerate(parts):
        first = number * size
        own = None if pitch is None else pitch[first : first + part.size(1) // FRAMES_PER_ENCODER_FRAME]
        yield HeardClip(part.contiguous(), metadata, float(number * max_audio_s), len(parts) == 1, own)


@dataclass(frozen=True)
class Lesson:
    """A batch: spectrograms (B, M, F) with real encoder frames (B,), and what is right.

    Attributes:
        labels: (B, categories).
        frames: (questions, B, T), see `HeardClip.frame_targets`.
    """

    mel: Tensor
    lengths: Tensor
    labels: Tensor
    frames: Tensor

    @classmethod
    def of(cls, clips: Sequence[HeardClip], vocabulary: Vocabulary) -> "Lesson":
        """Clips padded on the right with zeros, which is what a convolution sees beyond a clip's end."""
        lengths = torch.tensor([clip.num_frames for clip in clips])
        longest = int(lengths.max())
        mel = torch.zeros(len(clips), clips[0].mel.size(0), longest * FRAMES_PER_ENCODER_FRAME)
        frames = torch.full((len(vocabulary.frame_sizes), len(clips), longest), UNKNOWN)
        for row, clip in enumerate(clips):
            mel[row, :, : clip.mel.size(1)] = clip.mel
            frames[:, row, : clip.num_frames] = torch.from_numpy(clip.frame_targets(vocabulary))
        labels = torch.tensor([clip.label_targets(vocabulary) for clip in clips])
        return cls(mel, lengths, labels, frames)


class Answers(nn.Module):
    """The linear readers that are thrown away when the encoder has learned: one for clips, one for frames."""

    def __init__(self, width: int, vocabulary: Vocabulary, generator: torch.Generator) -> None:
        super().__init__()
        self._label_sizes = [len(values) for values in vocabulary.labels.values()]
        self._track_sizes = vocabulary.frame_sizes
        self._frame_weights = torch.tensor(vocabulary.frame_weights)
        self.clip = nn.Linear(width, sum(self._label_sizes))
        self.frame = nn.Linear(width, sum(self._track_sizes))
        for linear in (self.clip, self.frame):
            nn.init.normal_(linear.weight, std=INITIAL_SPREAD, generator=generator)
            nn.init.zeros_(linear.bias)

    def losses(self, frames: Tensor, lesson: Lesson) -> tuple[Tensor, Tensor]:
        """Mean loss over the questions about clips, and the weighted one over those about frames, in nats.

        A clip's labels are read from the mean over its frames and, with less weight, from each frame alone:
        whoever reads the frozen encoder later sees few frames at a time.
        frames (B, T, E) may hold anything beyond a clip's length.
        """
        real = torch.arange(frames.size(1)) < lesson.lengths.unsqueeze(1)
        mean = (frames * real.unsqueeze(-1)).sum(dim=1) / lesson.lengths.unsqueeze(1)
        whole = self.clip(mean).split(self._label_sizes, dim=1)
        alone = self.clip(frames).split(self._label_sizes, dim=2)
        tracks = self.frame(frames).split(self._track_sizes, dim=2)
        labels = lesson.labels.T.unsqueeze(-1)  # (categories, B, 1)
        of_clips = [known_loss(*pair) for pair in zip(whole, labels.squeeze(-1), strict=True)]
        of_parts = [known_loss(*pair) for pair in zip(alone, torch.where(real, labels, UNKNOWN), strict=True)]
        of_frames = torch.stack([known_loss(*pair) for pair in zip(tracks, lesson.frames, strict=True)])
        clips = _mean(of_clips, frames) + PART_WEIGHT * _mean(of_parts, frames)
        return clips, of_frames @ self._frame_weights


def known_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits (..., K) over targets (...) that are known; 0 where none is."""
    total = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=UNKNOWN, reduction="sum")
    return total / (targets != UNKNOWN).sum().clamp(min=1)


def _mean(losses: Sequence[Tensor], frames: Tensor) -> Tensor:
    return torch.stack(list(losses)).mean() if losses else frames.sum() * 0
