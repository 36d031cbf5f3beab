"""Recipes of whole runs, and the runtime that never counts."""

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
    LearningRates,
    LessonsRecipe,
    LoraRecipe,
    MicroEncoderRecipe,
    OverfitRecipe,
    PretrainRecipe,
)
from omni_model.config.sound import (
    AugmentRecipe,
    CosyVoiceRecipe,
    EncoderRecipe,
    FeatureRecipe,
    FolderRecipe,
    IndexTtsRecipe,
    LibriSpeechRecipe,
    PretrainedEncoderRecipe,
    SineRecipe,
    SoundSetRecipe,
    SpeechRecipe,
    SplitSizes,
    StrangeRecipe,
    TextureRecipe,
)
from omni_model.config.text import (
    ClimbMixRecipe,
    ConversationsRecipe,
    CoreBundleRecipe,
    GptShape,
    MiniatureCoreRecipe,
    MiniatureSetsRecipe,
    PublicSetsRecipe,
    TextFolderRecipe,
    TextRecipe,
    TokenizerRecipe,
)


@dataclass(frozen=True)
class SmokeRecipe(Recipe):
    """Five sine clips through the whole machine in under a minute."""

    name: ClassVar[str] = "smoke"
    seed: int = 0
    sines: SineRecipe = SineRecipe()
    encoder: EncoderRecipe = EncoderRecipe()
    features: FeatureRecipe = FeatureRecipe(dtype="float32")
    overfit: OverfitRecipe = OverfitRecipe()
    report: ReportRecipe = ReportRecipe(title="nanochat-omni smoke")


@dataclass(frozen=True)
class DemoRecipe(Recipe):
    """Everything from nothing on a laptop: sounds, a text model, a listener and its score.

    The GPT reads its last lesson three times as long as letters need, beside the encoder: what it has read
    decides how quickly it learns to listen. Most rows of the mix are multiple choice about a clip that is
    heard first: a GPT of this size learns little else in this time, and asked before it hears, nothing
    (`flows/LOG.md` has the figures).
    """

    name: ClassVar[str] = "demo"
    seed: int = 0
    texture: TextureRecipe = TextureRecipe(clips=SplitSizes(train=3000, validation=300, test=300))
    speech: SpeechRecipe = SpeechRecipe(clips=SplitSizes(train=4000, validation=300, test=300))
    augment: AugmentRecipe = AugmentRecipe(share=0.25)
    encoder: MicroEncoderRecipe = MicroEncoderRecipe()
    features: FeatureRecipe = FeatureRecipe(layers=("1", "2", "last"), dtype="float32")
    text: TextRecipe = TextRecipe()
    tokenizer: TokenizerRecipe = TokenizerRecipe()
    lessons: LessonsRecipe = LessonsRecipe(last_lesson_steps=1200, max_steps=4000)
    instructions: InstructionsRecipe = InstructionsRecipe(
        caption=0.16,
        transcription=0.015,
        question=0.015,
        choice=0.76,
        no_speech=0.02,
        multi_turn=0.005,
        comparison=0.02,
        replay=0.005,
        question_first=0.0,
    )
    align: AlignRecipe = AlignRecipe(dtype="float32")
    lora: LoraRecipe = LoraRecipe(dtype="float32")
    strange: StrangeRecipe = StrangeRecipe()
    benchmark: BenchmarkRecipe = BenchmarkRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    diagnosis: DiagnosisRecipe = DiagnosisRecipe()
    familiarity: FamiliarityRecipe = FamiliarityRecipe()
    report: ReportRecipe = ReportRecipe()


@dataclass(frozen=True)
class HearingRecipe(Recipe):
    """What follows once there is a corpus: an encoder, its features, and a report on both."""

    seed: int = 0
    encoder: PretrainedEncoderRecipe = PretrainedEncoderRecipe()
    features: FeatureRecipe = FeatureRecipe()
    report: ReportRecipe = ReportRecipe(title="nanochat-omni: what came in")


@dataclass(frozen=True)
class FolderRunRecipe(HearingRecipe):
    """Features of your own recordings."""

    name: ClassVar[str] = "folder"
    recordings: FolderRecipe = FolderRecipe()


@dataclass(frozen=True)
class SoundSetRunRecipe(HearingRecipe):
    """Features of a public set of sounds."""

    name: ClassVar[str] = "sound-set"
    sounds: SoundSetRecipe = SoundSetRecipe()


@dataclass(frozen=True)
class LibriSpeechRunRecipe(HearingRecipe):
    """Features of LibriSpeech."""

    name: ClassVar[str] = "librispeech"
    librispeech: LibriSpeechRecipe = LibriSpeechRecipe()


@dataclass(frozen=True)
class CosyVoiceRunRecipe(HearingRecipe):
    """Features of what a CosyVoice server says."""

    name: ClassVar[str] = "cosyvoice"
    cosyvoice: CosyVoiceRecipe = CosyVoiceRecipe()


@dataclass(frozen=True)
class IndexTtsRunRecipe(HearingRecipe):
    """Features of what an IndexTTS server says."""

    name: ClassVar[str] = "indextts"
    indextts: IndexTtsRecipe = IndexTtsRecipe()


@dataclass(frozen=True)
class BaseRecipe(Recipe):
    """What every run of the text half has: a tokenizer, a base model, a chat model, their scores."""

    seed: int = 0
    tokenizer: TokenizerRecipe = TokenizerRecipe(vocab_size=32_768)
    pretrain: PretrainRecipe = PretrainRecipe()
    evaluation: BaseEvaluationRecipe = BaseEvaluationRecipe()
    conversations: ConversationsRecipe = ConversationsRecipe()
    chat: ChatRecipe = ChatRecipe()
    chat_evaluation: ChatEvaluationRecipe = ChatEvaluationRecipe()
    report: ReportRecipe = ReportRecipe(title="nanochat-omni: the base model")


@dataclass(frozen=True)
class BaseTinyRecipe(BaseRecipe):
    """From the embedded corpus to a model that chats about it, on a laptop.

    Letters are bound before anything else is read: a model of this size that reads first answers multiple
    choice by guessing ever after. The rule for learning rates does not reach down to batches of 2,048 tokens;
    these are stated for what they come to.
    """

    name: ClassVar[str] = "base-tiny"
    text: TextRecipe = TextRecipe(
        letters_share=0.15, words_share=0.15, questions_share=0.3, stories_share=0.35
    )
    core: MiniatureCoreRecipe = MiniatureCoreRecipe()
    sets: MiniatureSetsRecipe = MiniatureSetsRecipe()
    tokenizer: TokenizerRecipe = TokenizerRecipe(vocab_size=1024)
    lessons: LessonsRecipe = LessonsRecipe()
    pretrain: PretrainRecipe = PretrainRecipe(
        gpt=GptShape(n_layer=3, n_embd=96, n_head=3, n_kv_head=3, sequence_len=256),
        steps=400,
        batch_tokens=2048,
        rates=LearningRates(matrix=0.4, embedding=0.16, unembedding=0.064, scalar=8.0),
        warmup_steps=20,
        validate_every=100,
        validation_tokens=2**15,
        sample_every=200,
    )
    evaluation: BaseEvaluationRecipe = BaseEvaluationRecipe(split_tokens=2**16, core_items_per_task=50)
    conversations: ConversationsRecipe = ConversationsRecipe(
        smoltalk_rows=6_000, mmlu_rows=6_000, arc_rows=3_000, gsm8k_rows=3_000, identity_rows=500
    )
    chat: ChatRecipe = ChatRecipe(
        epochs=1.5,
        batch_tokens=2048,
        rates=LearningRates(matrix=0.4, embedding=0.16, unembedding=0.064, scalar=8.0),
    )
    chat_evaluation: ChatEvaluationRecipe = ChatEvaluationRecipe(max_answer_tokens=96)
    report: ReportRecipe = ReportRecipe(title="nanochat-omni base-tiny")


@dataclass(frozen=True)
class DeepRecipe(BaseRecipe):
    """A base model with one dial: everything that is zero below follows from `depth`.

    `tokens_per_parameter` is how long to train (nanochat 12, its speedrun 8, Chinchilla 20).
    """

    depth: int = 12
    tokens_per_parameter: float = 12.0
    sequence_len: int = 2048


@dataclass(frozen=True)
class PublicTasksRecipe(DeepRecipe):
    """A deep model that public conversations teach to chat and public tasks judge."""

    core: CoreBundleRecipe = CoreBundleRecipe()
    sets: PublicSetsRecipe = PublicSetsRecipe()


@dataclass(frozen=True)
class BaseClimbMixRecipe(PublicTasksRecipe):
    """A base model on ClimbMix; `base-d12`, `base-d20` and `base-d26` differ in `depth` alone."""

    name: ClassVar[str] = "base"
    climbmix: ClimbMixRecipe = ClimbMixRecipe()


@dataclass(frozen=True)
class BaseFolderRecipe(PublicTasksRecipe):
    """A base model on texts of your own."""

    name: ClassVar[str] = "base-folder"
    texts: TextFolderRecipe = TextFolderRecipe()


@dataclass(frozen=True)
class Runtime(Recipe):
    """How to run, never what to make: no field of this class may change a byte of a payload.

    Attributes:
        store: directory of the artifacts, or s3://bucket/prefix; empty means `OMNI_STORE`, else `runs/`.
        threads: torch threads of each stage's process.
        parallel_stages: how many stages compute at once.
        workers: processes inside a stage whose work divides; 0 means cores / parallel_stages.
        recompute: what to do with a costly result that only changed code made stale: ask, yes or stop.
        inline: compute in this process; for tests and notebooks.
        gpus: processes that share the training of a language model, one a card (torchrun).
        microbatch_rows: rows of text a card takes at once; 0 finds what fits its memory, once.
        wandb: off; online; offline; auto is online with a key and offline without one.
        fresh: use a new, empty store that is deleted when the run succeeds; for a nightly smoke.
    """

    may_be_zero = (*Recipe.may_be_zero, "workers", "microbatch_rows")
    choices = {"recompute": ("ask", "yes", "stop"), "wandb": ("off", "auto", "online", "offline")}

    store: str = ""
    threads: int = 1
    parallel_stages: int = 2
    workers: int = 0
    checkpoint_every_s: float = 20.0
    gpus: int = 1
    microbatch_rows: int = 0
    wandb: str = "off"
    recompute: str = "ask"
    inline: bool = False
    fresh: bool = False
