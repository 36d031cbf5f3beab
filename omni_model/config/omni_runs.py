"""Recipes of the real listener and of its rehearsal: a model that chats, and what teaches it to hear.

Both have one graph. The rehearsal takes its shapes from the same defaults and differs in where data come
from and in how little of them is read.
"""

from dataclasses import dataclass
from typing import ClassVar

from omni_model.config.base import Recipe
from omni_model.config.judging import (
    BaseEvaluationRecipe,
    BenchmarkRecipe,
    ChatEvaluationRecipe,
    DiagnosisRecipe,
    EvaluationRecipe,
    FamiliarityRecipe,
    ReportRecipe,
)
from omni_model.config.learning import (
    AlignRecipe,
    ChatRecipe,
    InstructionsRecipe,
    LoraRecipe,
    PretrainRecipe,
    ProjectorShape,
)
from omni_model.config.runs import BaseClimbMixRecipe, DeepRecipe
from omni_model.config.sound import (
    AugmentRecipe,
    EncoderRecipe,
    FeatureRecipe,
    LaidOutSetRecipe,
    LibriSpeechRecipe,
    MiniatureSoundsRecipe,
    PretrainedEncoderRecipe,
    SoundFoldersRecipe,
    SoundSetRecipe,
    SpeechRecipe,
    SplitSizes,
    StrangeRecipe,
    TextureRecipe,
)
from omni_model.config.text import (
    ConversationsRecipe,
    GptShape,
    MiniatureCoreRecipe,
    MiniatureSetsRecipe,
    MiniatureWebRecipe,
)

# 4 frames of Whisper's 50 a second: 12.5 soft tokens a second, about one for each sound of speech. 30 s are
# 375 of them, so that a clip and its question fit the 512 positions that most layers see. 1e-3 is what
# systems that train a projector alone agree on, 2e-4 what those with adapters do, and a projector that has
# learned is moved by a tenth of that (LLaVA, LTU-AS, tiny-audio).
PROJECTOR = ProjectorShape(stack=4, hidden=2048)
PROJECTOR_LR, ADAPTER_LR, LEARNED_PROJECTOR_LR = 1e-3, 2e-4, 1e-4


@dataclass(frozen=True)
class LibriSpeechPartsRecipe(Recipe):
    """A hundred hours to learn from, and the two parts that others keep for validation and tests."""

    train: LibriSpeechRecipe = LibriSpeechRecipe(part="train-clean-100", split="train")
    validation: LibriSpeechRecipe = LibriSpeechRecipe(part="dev-clean", split="validation")
    test: LibriSpeechRecipe = LibriSpeechRecipe(part="test-clean", split="test")

    def parts(self) -> tuple[LibriSpeechRecipe, ...]:
        """All of them."""
        return self.train, self.validation, self.test


@dataclass(frozen=True)
class HearingHalfRecipe(Recipe):
    """What makes a listener of a model that chats.

    - Synthetic clips are as many as LibriSpeech has: rows of the mix are drawn clip by clip, and a clip of
      LibriSpeech can be asked for its voice alone.
    - Early layers of Whisper know more of the sound, late ones more of the words (LTU-AS, SALMONN 2); three
      of its six are stored and weighed by the projector.
    - Of the 50,000 rows a third is speech to be written down, which nothing but LibriSpeech teaches, and a
      twelfth is conversations without sound, so that what was known before is kept.
    - Three passes over the rows for the projector, for alignment comes suddenly and late (SLAM-ASR saw it
      after some 4,000 steps), and two for the adapters, which begin where it ended.
    """

    texture: TextureRecipe = TextureRecipe(clips=SplitSizes(train=12_000, validation=600, test=480))
    speech: SpeechRecipe = SpeechRecipe(clips=SplitSizes(train=16_000, validation=800, test=480))
    augment: AugmentRecipe = AugmentRecipe(share=0.4)
    strange: StrangeRecipe = StrangeRecipe()
    librispeech: LibriSpeechPartsRecipe = LibriSpeechPartsRecipe()
    features: FeatureRecipe = FeatureRecipe(layers=("2", "4", "last"))
    instructions: InstructionsRecipe = InstructionsRecipe(
        rows=50_000,
        validation_rows=2_000,
        caption=0.10,
        transcription=0.34,
        question=0.06,
        choice=0.30,
        no_speech=0.04,
        multi_turn=0.04,
        comparison=0.04,
        replay=0.08,
    )
    align: AlignRecipe = AlignRecipe(
        projector=PROJECTOR, steps=4_700, rows_per_step=32, lr=PROJECTOR_LR, warmup_steps=200
    )
    lora: LoraRecipe = LoraRecipe(
        rank=16,
        alpha=32,
        steps=3_100,
        rows_per_step=32,
        lr=ADAPTER_LR,
        projector_lr=LEARNED_PROJECTOR_LR,
        warmup_steps=100,
    )
    benchmark: BenchmarkRecipe = BenchmarkRecipe()
    scoring: EvaluationRecipe = EvaluationRecipe()
    familiarity: FamiliarityRecipe = FamiliarityRecipe()
    diagnosis: DiagnosisRecipe = DiagnosisRecipe(transcribed_clips=3_200)


@dataclass(frozen=True)
class OmniRecipe(HearingHalfRecipe, BaseClimbMixRecipe):
    """A listener on ClimbMix, public conversations, LibriSpeech, whisper-base and synthetic sounds.

    The text half is that of `base` and follows from `depth`. `folders` are public sets of sounds that the
    user has: those that are named join what is learned from and asked about; of sets in AudioBench's form,
    `instructions.public` says how much.
    """

    name: ClassVar[str] = "omni"
    encoder: PretrainedEncoderRecipe = PretrainedEncoderRecipe()
    folders: SoundFoldersRecipe = SoundFoldersRecipe()
    report: ReportRecipe = ReportRecipe(title="nanochat-omni: a listener")


@dataclass(frozen=True)
class OmniRehearsalRecipe(HearingHalfRecipe, DeepRecipe):
    """The same at its true shapes, with what can be made here: nothing is learned, and everything is done.

    GPT and encoder have their full size and random weights; a text of many words gives the tokenizer its
    32,768 entries. Rows alone are shorter, a quarter of 2,048 tokens, for two cores to be through in time: a
    step reads one or two of them, or four of the mix. Nothing can be heard with such an encoder, so no gap is
    asked for.
    """

    name: ClassVar[str] = "omni-rehearsal"
    sequence_len: int = 512
    text: MiniatureWebRecipe = MiniatureWebRecipe()
    core: MiniatureCoreRecipe = MiniatureCoreRecipe(items_per_task=4)
    sets: MiniatureSetsRecipe = MiniatureSetsRecipe(train_rows=400, test_rows=4)
    pretrain: PretrainRecipe = PretrainRecipe(
        gpt=GptShape(n_layer=0, n_embd=0, n_head=0, n_kv_head=0, sequence_len=0, window_pattern="SSSL"),
        steps=20,
        batch_tokens=512,
        weight_decay=0.28,  # derived for so short a run it would be in the hundreds
        warmup_steps=2,
        validate_every=10,
        validation_tokens=2048,
        sample_every=20,
    )
    evaluation: BaseEvaluationRecipe = BaseEvaluationRecipe(split_tokens=2048)
    conversations: ConversationsRecipe = ConversationsRecipe(
        smoltalk_rows=70, mmlu_rows=56, arc_rows=28, gsm8k_rows=28, identity_rows=8
    )
    chat: ChatRecipe = ChatRecipe(batch_tokens=1024)
    chat_evaluation: ChatEvaluationRecipe = ChatEvaluationRecipe(max_answer_tokens=8, bootstrap_draws=1000)

    sounds: MiniatureSoundsRecipe = MiniatureSoundsRecipe()
    librispeech: LibriSpeechPartsRecipe = LibriSpeechPartsRecipe(
        test=LibriSpeechRecipe(part="test-clean", form="parquet", split="test")
    )
    sound_sets: tuple[LaidOutSetRecipe, ...] = tuple(
        LaidOutSetRecipe(layout) for layout in ("folder", *SoundSetRecipe.choices["layout"])
    )
    texture: TextureRecipe = TextureRecipe(clips=SplitSizes(train=90, validation=36, test=72))
    speech: SpeechRecipe = SpeechRecipe(clips=SplitSizes(train=120, validation=48, test=96))
    strange: StrangeRecipe = StrangeRecipe(pairs=20, random_sounds=20, clips_per_kind=8, foreign=6)
    encoder: EncoderRecipe = EncoderRecipe(width=512, num_layers=6, num_heads=8)
    instructions: InstructionsRecipe = InstructionsRecipe(
        rows=400, validation_rows=12, transcription=0.3, choice=0.3, public=0.1, replay=0.1
    )
    align: AlignRecipe = AlignRecipe(
        projector=PROJECTOR, steps=20, rows_per_step=4, lr=PROJECTOR_LR, warmup_steps=2, min_gap=0.0
    )
    lora: LoraRecipe = LoraRecipe(
        steps=20,
        rows_per_step=4,
        lr=ADAPTER_LR,
        projector_lr=LEARNED_PROJECTOR_LR,
        warmup_steps=2,
        min_gap=0.0,
    )
    benchmark: BenchmarkRecipe = BenchmarkRecipe(
        words=4, speaker=4, prosody=4, quality=4, room=4, events=4, conflict=4
    )
    scoring: EvaluationRecipe = EvaluationRecipe(shuffles=1, bootstrap_draws=1000)
    familiarity: FamiliarityRecipe = FamiliarityRecipe(taught_clips=200, components=32)
    diagnosis: DiagnosisRecipe = DiagnosisRecipe(
        clips=40, probe_clips=100, transcribed_clips=8, bootstrap_draws=1000
    )
    report: ReportRecipe = ReportRecipe(title="nanochat-omni: a rehearsal at true shapes")
