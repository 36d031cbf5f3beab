"""The text half: from a corpus to a base model that has learned to chat, with the scores of both."""

from omni_model.artifacts import CoreBundle, GptCheckpoint, PublicSets, Report, TextCorpus, TokenizerFiles
from omni_model.config import (
    BaseClimbMixRecipe,
    BaseFolderRecipe,
    BaseRecipe,
    BaseTinyRecipe,
    DeepRecipe,
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


def base_tiny(run: Runner, recipe: BaseTinyRecipe) -> Report:
    """The embedded corpus, letters first, and tasks about what it tells: no download, minutes on a laptop."""
    text = run(write_corpus, recipe.text)
    tokenizer = run(train_tokenizer, recipe.tokenizer, text)
    beginner = run(learn_lessons, recipe.lessons, text, tokenizer)
    gpt = run(continue_gpt, recipe.pretrain, beginner, text, tokenizer)
    core, sets = run(write_core, recipe.core), run(write_sets, recipe.sets)
    return _chat(run, recipe, gpt, text, tokenizer, core, sets)


def base(run: Runner, recipe: BaseClimbMixRecipe) -> Report:
    """ClimbMix, CORE and public conversations: hours on a card."""
    return _pretrain(run, recipe, run(fetch_climbmix, recipe.climbmix))


def base_folder(run: Runner, recipe: BaseFolderRecipe) -> Report:
    """Texts of your own, judged by the public tasks."""
    return _pretrain(run, recipe, run(import_text, recipe.texts))


def _pretrain(run: Runner, recipe: DeepRecipe, text: TextCorpus) -> Report:
    core, sets = run(fetch_core, recipe.core), run(fetch_sets, recipe.sets)
    tokenizer = run(train_tokenizer, recipe.tokenizer, text)
    gpt = run(pretrain_gpt, recipe.pretrain, text, tokenizer)
    return _chat(run, recipe, gpt, text, tokenizer, core, sets)


def _chat(
    run: Runner,
    recipe: BaseRecipe,
    gpt: GptCheckpoint,
    text: TextCorpus,
    tokenizer: TokenizerFiles,
    core: CoreBundle,
    sets: PublicSets,
) -> Report:
    base_scores = run(evaluate_base, recipe.evaluation, gpt, tokenizer, text, core)

    conversations = run(build_conversations, recipe.conversations, sets)
    chat = run(tune_chat, recipe.chat, gpt, tokenizer, conversations, text)
    chat_scores = run(evaluate_chat, recipe.chat_evaluation, chat, tokenizer, sets)

    told = (base_scores, chat_scores, gpt, chat, tokenizer, conversations)
    return run(write_base_report, recipe.report, *told)
