"""Recipes of sounds, of the encoder that hears them, and of its features."""

from dataclasses import dataclass

from omni_model.config.base import Recipe, unkeyed
from omni_model.config.outside import OutsideFolder


@dataclass(frozen=True)
class SineRecipe(Recipe):
    """The five smoke clips. They are fixed by `omni_model/audio/sine_clips.json`; there is nothing to set."""


@dataclass(frozen=True)
class SplitSizes(Recipe):
    """How many clips each split holds. Test clips use voices and parameters the others never see."""

    train: int
    validation: int
    test: int


@dataclass(frozen=True)
class TextureRecipe(Recipe):
    """Tones, sweeps, tremolo, noises and beeps made with numpy."""

    clips: SplitSizes = SplitSizes(train=4000, validation=300, test=240)
    min_duration_s: float = 1.0
    max_duration_s: float = 2.4
    clips_per_shard: int = 500


@dataclass(frozen=True)
class SpeechRecipe(Recipe):
    """Short spoken phrases by espeak-ng, one voice, pitch, pace and loudness per clip."""

    clips: SplitSizes = SplitSizes(train=4000, validation=300, test=240)
    max_duration_s: float = 3.5
    clips_per_shard: int = 500


@dataclass(frozen=True)
class AugmentRecipe(Recipe):
    """A share of a corpus's clips, each under one recording condition; labels are derived afterwards.

    Conditions are dealt in equal shares. Clips that are left as they are say nothing of their recording.
    """

    conditions: tuple[str, ...] = ("clean", "noisy", "echoing", "telephone", "distorted")
    share: float = 1.0


@dataclass(frozen=True)
class StrangeRecipe(Recipe):
    """Sounds that the listener is not taught, and what "unlike" is learned from.

    `pairs` of a phrase and as many random words, and `random_sounds`, are learned from. `clips_per_kind` of
    music, of words and of noise are judged. `foreign` clips each of voices and of tones are what is taught,
    by another synthesizer.
    """

    pairs: int = 320
    random_sounds: int = 240
    clips_per_kind: int = 40
    foreign: int = 40
    clips_per_shard: int = 500


@dataclass(frozen=True)
class FolderRecipe(Recipe):
    """Any audio files below a folder, and what is known of them in a JSON Lines file beside them.

    A line names its file relative to the folder (`audio`), and any of `transcript`, `labels`, `speaker`,
    `split`, `licence`. Without the file every clip is unlabelled, in the split `train`.
    """

    folder: OutsideFolder = OutsideFolder()
    metadata: str = "metadata.jsonl"
    licence: str = "unknown"
    max_clip_s: float = 30.0
    clips_per_shard: int = 300


@dataclass(frozen=True)
class SoundSetRecipe(Recipe):
    """A folder with a public set of sounds, or of questions about sounds, laid out as its makers publish it.

    The sets say themselves who speaks, what is heard and under which licence; who is heard in one split is
    heard in no other. `licence` is for the two layouts of questions, whose files do not say it.
    """

    told_by = "layout"
    choices = {"layout": ("crema-d", "ravdess", "esc-50", "musan", "audiobench-json", "audiobench-parquet")}

    folder: OutsideFolder = OutsideFolder()
    layout: str = "crema-d"
    licence: str = "unknown"
    max_clip_s: float = 30.0
    clips_per_shard: int = 300


@dataclass(frozen=True)
class SoundFoldersRecipe(Recipe):
    """Folders of the user's with public sets of sounds, a field for each layout; any of them may be missing.

    `licence` is that of questions in AudioBench's form, whose files do not say it.
    """

    crema_d: OutsideFolder = OutsideFolder()
    ravdess: OutsideFolder = OutsideFolder()
    esc_50: OutsideFolder = OutsideFolder()
    musan: OutsideFolder = OutsideFolder()
    audiobench_json: OutsideFolder = OutsideFolder()
    audiobench_parquet: OutsideFolder = OutsideFolder()
    licence: str = "unknown"

    def sets(self) -> tuple[SoundSetRecipe, ...]:
        """How each folder that was named is read."""
        named = {
            layout: getattr(self, layout.replace("-", "_")) for layout in SoundSetRecipe.choices["layout"]
        }
        return tuple(
            SoundSetRecipe(folder, layout, self.licence) for layout, folder in named.items() if folder.path
        )


@dataclass(frozen=True)
class MiniatureSoundsRecipe(Recipe):
    """Recordings made here, laid out as the makers of real ones lay them out, for a run without a network.

    A reader of LibriSpeech reads `utterances` of one to `max_sentences` sentences, a speaker of CREMA-D says
    `emotions` versions of each sentence, and every other set has a multiple of `takes` recordings.
    """

    utterances: int = 5
    max_sentences: int = 3
    emotions: int = 4
    takes: int = 2


@dataclass(frozen=True)
class LaidOutSetRecipe(Recipe):
    """A set of sounds among files that an earlier stage laid out, read as a folder of the user's would be."""

    told_by = "layout"
    choices = {"layout": ("folder", *SoundSetRecipe.choices["layout"])}

    layout: str = "folder"
    clips_per_shard: int = 300


@dataclass(frozen=True)
class LibriSpeechRecipe(Recipe):
    """LibriSpeech, from openslr's tar or from parquet files, read as a stream.

    `max_clips` 0 means all. The tar is downloaded, or lies at `place`: the part's name says what its bytes
    are. A folder of parquet files at `place` is anybody's copy, so `digest` says which; it is filled in
    before the plan.
    """

    may_be_zero = (*Recipe.may_be_zero, "max_clips")
    told_by = "part"
    choices = {"form": ("tar", "parquet")}

    part: str = "train-clean-100"
    form: str = "tar"
    split: str = "train"
    max_clips: int = 0
    clips_per_shard: int = 300
    digest: str = ""
    place: str = unkeyed("")


# In the order of IndexTTS's vectors.
EMOTIONS = ("happy", "angry", "sad", "afraid", "disgusted", "melancholic", "surprised", "calm")


@dataclass(frozen=True)
class SpokenLine(Recipe):
    """One sentence for a text-to-speech server, and the emotion to say it with ("": as the voice likes)."""

    choices = {"style": ("", *EMOTIONS)}

    text: str
    style: str = ""


@dataclass(frozen=True)
class CosyVoiceRecipe(Recipe):
    """Sentences spoken by a CosyVoice server: every line by every voice.

    A voice with a recording `<voice>.wav` in the folder `script` is cloned (with what the recording says in
    `<voice>.txt`); any other is one of the server's own speakers. No voice means every recording there.
    Lines left empty are read from `lines.jsonl` in that folder; without it, the sentences of
    `omni_model/audio/spoken_sentences.json` are spoken with every emotion. The protocol does not tell the
    sample rate: 22,050 Hz for version 1, 24,000 Hz for 2 and 3.
    """

    choices = {"version": ("1", "2", "3"), "split": ("train", "validation", "test")}

    lines: tuple[SpokenLine, ...] = ()
    script: OutsideFolder = OutsideFolder()
    voices: tuple[str, ...] = ()
    version: str = "2"
    model: str = "CosyVoice2-0.5B"
    licence: str = "unknown"
    split: str = "train"
    clips_per_shard: int = 300
    server: str = unkeyed("http://127.0.0.1:50000")


@dataclass(frozen=True)
class IndexTtsRecipe(Recipe):
    """Sentences spoken by an IndexTTS 2 server: every line by every voice, emotions as vectors of eight.

    A voice is the path of a recording on the server's own disk. Lines are found as for CosyVoice.
    """

    choices = {"split": ("train", "validation", "test")}

    lines: tuple[SpokenLine, ...] = ()
    script: OutsideFolder = OutsideFolder()
    voices: tuple[str, ...] = ()
    version: str = "2"
    model: str = "IndexTTS-2"
    emotion_weight: float = 0.8
    licence: str = "unknown"
    split: str = "train"
    clips_per_shard: int = 300
    server: str = unkeyed("http://127.0.0.1:6006")


@dataclass(frozen=True)
class EncoderRecipe(Recipe):
    """A Whisper encoder of this shape with random weights. The default shape is whisper-tiny's."""

    width: int = 384
    num_layers: int = 4
    num_heads: int = 6
    num_mel_bins: int = 80
    max_audio_s: int = 30


@dataclass(frozen=True)
class PretrainedEncoderRecipe(Recipe):
    """Somebody's trained encoder: a directory (`place`), or found by name at ModelScope or Hugging Face.

    `sha256` of its weights may be left empty: then it is pinned when it is first fetched.
    """

    model: str = "openai/whisper-base"
    sha256: str = ""
    place: str = unkeyed("")


@dataclass(frozen=True)
class FeatureRecipe(Recipe):
    """How a frozen encoder is read. The shard of the corpus is the unit of work.

    `layers`: "last", or numbers of layers ("2", "4"); several are normalised each and laid side by side
    (`mix` concat) or averaged (mean). `dtype` auto becomes bfloat16 where the processor multiplies it.
    """

    choices = {"mix": ("concat", "mean"), "dtype": ("auto", "float32", "bfloat16")}

    layers: tuple[str, ...] = ("last",)
    mix: str = "concat"
    dtype: str = "auto"
