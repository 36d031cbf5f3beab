"""The text half: from a corpus to a base model that has learned to chat, with the scores of both."""

from dataclasses import dataclass

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
    BaseClimbMixRecipe,
    BaseFolderRecipe,
    BaseRecipe,
    BaseTinyRecipe,
    PublicTasksRecipe,
)
from tasks.stage import Runner
from tasks.text import (
    build_conversations,
    continue_gpt,
    evaluate_base,
    evaluate_chat,
    fetch_climbmix,
    fetch_core,
    fetch_sets,
    import_text,
    learn_lessons,
    pretrain_gpt,
    train_tokenizer,
    tune_chat,
    write_base_report,
    write_core,
    write_corpus,
    write_sets,
)


@dataclass(frozen=True)
class Talker:
    """A model that chats, with what it came from and what it is worth."""

    tokenizer: TokenizerFiles
    base: GptCheckpoint
    base_scores: BaseScores
    conversations: Conversations
    chat: GptCheckpoint
    chat_scores: ChatScores


def base_tiny(run: Runner, recipe: BaseTinyRecipe) -> Report:
    """The embedded corpus, letters first, and tasks about what it tells: no download, minutes on a laptop."""
    text = run(write_corpus, recipe.text)
    tokenizer = run(train_tokenizer, recipe.tokenizer, text)
    beginner = run(learn_lessons, recipe.lessons, text, tokenizer)
    gpt = run(continue_gpt, recipe.pretrain, beginner, text, tokenizer)
    core, sets = run(write_core, recipe.core), run(write_sets, recipe.sets)
    return _tell(run, recipe, teach_to_chat(run, recipe, gpt, tokenizer, text, core, sets))


def base(run: Runner, recipe: BaseClimbMixRecipe) -> Report:
    """ClimbMix, CORE and public conversations: hours on a card."""
    return _tell(run, recipe, learn_from_climbmix(run, recipe))


def base_folder(run: Runner, recipe: BaseFolderRecipe) -> Report:
    """Texts of your own, judged by the public tasks."""
    return _tell(run, recipe, _judged_by_others(run, recipe, run(import_text, recipe.texts)))


def learn_from_climbmix(run: Runner, recipe: BaseClimbMixRecipe) -> Talker:
    """A model that has read ClimbMix, chats, and is judged by the public tasks."""
    return _judged_by_others(run, recipe, run(fetch_climbmix, recipe.climbmix))


def _judged_by_others(run: Runner, recipe: PublicTasksRecipe, text: TextCorpus) -> Talker:
    core, sets = run(fetch_core, recipe.core), run(fetch_sets, recipe.sets)
    return learn_to_talk(run, recipe, text, core, sets)


def learn_to_talk(
    run: Runner, recipe: BaseRecipe, text: TextCorpus, core: CoreBundle, sets: PublicSets
) -> Talker:
    """From random weights to a model that chats."""
    tokenizer = run(train_tokenizer, recipe.tokenizer, text)
    gpt = run(pretrain_gpt, recipe.pretrain, text, tokenizer)
    return teach_to_chat(run, recipe, gpt, tokenizer, text, core, sets)


def teach_to_chat(
    run: Runner,
    recipe: BaseRecipe,
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    text: TextCorpus,
    core: CoreBundle,
    sets: PublicSets,
) -> Talker:
    """A base model is judged, learns to chat, and is judged again."""
    base_scores = run(evaluate_base, recipe.evaluation, gpt, tokenizer, text, core)

    conversations = run(build_conversations, recipe.conversations, sets)
    chat = run(tune_chat, recipe.chat, gpt, tokenizer, conversations, text)
    chat_scores = run(evaluate_chat, recipe.chat_evaluation, chat, tokenizer, sets)

    return Talker(tokenizer, gpt, base_scores, conversations, chat, chat_scores)


def _tell(run: Runner, recipe: BaseRecipe, talker: Talker) -> Report:
    scores, models = (talker.base_scores, talker.chat_scores), (talker.base, talker.chat)
    return run(write_base_report, recipe.report, *scores, *models, talker.tokenizer, talker.conversations)
