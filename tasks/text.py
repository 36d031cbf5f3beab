"""Text, its tokenizer, the language model, and what it is worth."""

from omni_model.artifacts import (
    BaseScores,
    ChatScores,
    Conversations,
    CoreBundle,
    GptCheckpoint,
    PublicSets,
    Report,
    TextCorpus,
    TokenizerFiles,
)
from omni_model.config import (
    BaseEvaluationRecipe,
    ChatEvaluationRecipe,
    ChatRecipe,
    ClimbMixRecipe,
    ConversationsRecipe,
    CoreBundleRecipe,
    GptImportRecipe,
    LessonsRecipe,
    MiniatureCoreRecipe,
    MiniatureSetsRecipe,
    MiniatureWebRecipe,
    PretrainRecipe,
    PublicSetsRecipe,
    ReportRecipe,
    TextFolderRecipe,
    TextRecipe,
    TokenizerImportRecipe,
    TokenizerRecipe,
)
from tasks.stage import stage


@stage("omni_model.text.embedded:write_corpus", packages=("numpy", "pyarrow"), figure="num_documents")
def write_corpus(recipe: TextRecipe) -> TextCorpus:
    """Stories, sentences and questions about sounds, from the grammars."""


@stage("omni_model.text.miniature_web:write_web_text", packages=("numpy", "pyarrow"), figure="num_documents")
def write_web_text(recipe: MiniatureWebRecipe) -> TextCorpus:
    """Files as ClimbMix has them, of more words than anybody knows."""


@stage("omni_model.text.climbmix:fetch_climbmix", seeded=False, figure="num_documents")
def fetch_climbmix(recipe: ClimbMixRecipe) -> TextCorpus:
    """Web text, filtered and mixed by others."""


@stage("omni_model.text.folder:import_text", packages=("pyarrow",), seeded=False, figure="num_documents")
def import_text(recipe: TextFolderRecipe) -> TextCorpus:
    """Texts of one's own."""


@stage(
    "omni_model.text.tokenizer:train_tokenizer",
    packages=("tokenizers",),
    seeded=False,
    figure="bytes_per_token",
)
def train_tokenizer(recipe: TokenizerRecipe, text: TextCorpus) -> TokenizerFiles:
    """Byte-pair merges learned from the text."""


@stage(
    "omni_model.training.lessons:learn_lessons", packages=("torch", "numpy"), figure="text_multiple_choice"
)
def learn_lessons(recipe: LessonsRecipe, text: TextCorpus, tokenizer: TokenizerFiles) -> GptCheckpoint:
    """A small GPT, from random weights, lesson by lesson until letters are bound."""


@stage(
    "omni_model.training.pretrain:pretrain",
    packages=("torch", "numpy", "tokenizers"),
    distributed=True,
    figure="val_bpb",
)
def pretrain_gpt(recipe: PretrainRecipe, text: TextCorpus, tokenizer: TokenizerFiles) -> GptCheckpoint:
    """A GPT, from random weights, on packed text."""


@stage(
    "omni_model.training.pretrain:continue_pretraining",
    packages=("torch", "numpy", "tokenizers"),
    distributed=True,
    figure="val_bpb",
)
def continue_gpt(
    recipe: PretrainRecipe, start: GptCheckpoint, text: TextCorpus, tokenizer: TokenizerFiles
) -> GptCheckpoint:
    """A GPT reads on, from what it has learned before."""


@stage("omni_model.evaluation.core_bundle:write_core", packages=("numpy",), figure="num_items")
def write_core(recipe: MiniatureCoreRecipe) -> CoreBundle:
    """Tasks in CORE's format, about what the embedded corpus tells."""


@stage("omni_model.evaluation.core_bundle:fetch_core", seeded=False, figure="num_items")
def fetch_core(recipe: CoreBundleRecipe) -> CoreBundle:
    """CORE's 22 tasks."""


@stage("omni_model.text.miniature_sets:write_sets", packages=("numpy", "pyarrow"), figure="num_rows")
def write_sets(recipe: MiniatureSetsRecipe) -> PublicSets:
    """Conversations and tasks in the formats of public sets, about what the embedded corpus tells."""


@stage("omni_model.text.public_sets:fetch_sets", packages=("pyarrow",), seeded=False, figure="num_rows")
def fetch_sets(recipe: PublicSetsRecipe) -> PublicSets:
    """Public conversations and tasks."""


@stage(
    "omni_model.text.conversations:build_conversations",
    packages=("numpy", "pyarrow"),
    figure="num_conversations",
)
def build_conversations(recipe: ConversationsRecipe, sets: PublicSets) -> Conversations:
    """What the base model is taught to chat with."""


@stage(
    "omni_model.training.chat:tune_chat",
    packages=("torch", "numpy", "tokenizers"),
    distributed=True,
    figure="val_loss",
)
def tune_chat(
    recipe: ChatRecipe,
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    conversations: Conversations,
    text: TextCorpus,
) -> GptCheckpoint:
    """The base model learns to answer."""


@stage(
    "omni_model.evaluation.base_evaluation:evaluate_base",
    packages=("torch", "numpy", "tokenizers"),
    figure="core",
)
def evaluate_base(
    recipe: BaseEvaluationRecipe,
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    text: TextCorpus,
    core: CoreBundle,
) -> BaseScores:
    """Bits per byte, CORE, and what the base model writes on."""


@stage(
    "omni_model.evaluation.chat_evaluation:evaluate_chat",
    packages=("torch", "numpy", "tokenizers", "pyarrow"),
    figure="chat_core",
)
def evaluate_chat(
    recipe: ChatEvaluationRecipe, gpt: GptCheckpoint, tokenizer: TokenizerFiles, sets: PublicSets
) -> ChatScores:
    """Multiple choice, sums and programs, with intervals."""


@stage("omni_model.evaluation.base_report:write_base_report", seeded=False, figure="headline")
def write_base_report(
    recipe: ReportRecipe,
    base_scores: BaseScores,
    chat_scores: ChatScores,
    gpt: GptCheckpoint,
    chat: GptCheckpoint,
    tokenizer: TokenizerFiles,
    conversations: Conversations,
) -> Report:
    """How the text model came to be, and what it can do."""


@stage(
    "omni_model.text.nanochat_tokenizer:import_tokenizer",
    packages=("tokenizers",),
    seeded=False,
    figure="vocab_size",
)
def import_tokenizer(recipe: TokenizerImportRecipe) -> TokenizerFiles:
    """nanochat's tokenizer."""


@stage("omni_model.model.nanochat_files:import_gpt", packages=("torch",), seeded=False, figure="val_bpb")
def import_gpt(recipe: GptImportRecipe, tokenizer: TokenizerFiles) -> GptCheckpoint:
    """A GPT that nanochat trained."""
