"""The corpus that needs no download: lessons about sounds and short stories, drawn from two grammars.

It is what the demo's text model learns letters from, document by document, and what `base-tiny` reads as
plain text. Every document is drawn from a generator of its own, so none depends on how many there are.
Half of what a story's share gives are stories alone; the others end in a question about one of their facts,
or drill its words, so that a model that reads them as text has seen what it will be asked.
"""

import json

import numpy as np

from omni_model.config import JSON, BadInput, Runtime, TextRecipe
from omni_model.storage import Workspace
from omni_model.text.corpus import SPLITS, TEXT, write_shard
from omni_model.text.lessons import (
    LESSON,
    Document,
    choice_question,
    drill,
    letter_drill,
    open_question,
    plain_text,
    sentence,
    word_question,
)
from omni_model.text.questions import LETTERS, multiple_choice
from omni_model.text.stories import (
    pick_story_options,
    random_story,
    story_categories,
    story_options,
    story_question,
)

SHARD_DOCUMENTS = 50_000
TOLD_EVERY = 2_000
CHOICE_SHARE = 0.5  # of the questions on sentences; the others are open
STORY_FORMS = ("alone", "question", "choice", "drill")
STORY_SHARES = (0.5, 0.15, 0.2, 0.15)


def write_corpus(recipe: TextRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: parquet files with the columns `text` and `lesson`, the structured document as JSON or null.

    Document i of a split depends on (seed, split, i) alone.

    Raises:
        BadInput: shares that sum to more than one.
    """
    shares = (recipe.letters_share, recipe.words_share, recipe.questions_share, recipe.stories_share)
    if sum(shares) > 1 + 1e-9:
        raise BadInput(f"the shares of text sum to {sum(shares):g}; lower one, so that they sum to 1 at most")
    counts = dict(zip(SPLITS, (recipe.num_documents, recipe.validation_documents), strict=True))
    done, total = 0, sum(counts.values())
    for split, count in counts.items():
        for shard, first in enumerate(range(0, count, SHARD_DOCUMENTS)):
            texts: list[str] = []
            lessons: list[str | None] = []
            for index in range(first, min(count, first + SHARD_DOCUMENTS)):
                rng = np.random.default_rng([work.seed, SPLITS.index(split), index])
                text, lesson = write_document(recipe, rng)
                texts.append(text)
                lessons.append(json.dumps(lesson, sort_keys=True, ensure_ascii=False) if lesson else None)
                done += 1
                if done % TOLD_EVERY == 0:
                    work.metrics.log(done, total)
            write_shard(work.out / f"{split}-{shard:05d}.parquet", {TEXT: texts, LESSON: lessons})
    num_bytes = sum(path.stat().st_size for path in work.out.iterdir())
    work.metrics.summary(num_documents=total, megabytes=round(num_bytes / 1e6, 2))
    return {"num_documents": total, "num_bytes": num_bytes}


def write_document(recipe: TextRecipe, rng: np.random.Generator) -> tuple[str, Document | None]:
    """One random document of the mix that the recipe's shares describe: plain, and as a lesson if it is one.

    Stories are drawn last, so that without them the lessons are the same.
    """
    draw = rng.random()
    if draw < recipe.letters_share:
        document = letter_drill(rng)
    elif draw < recipe.letters_share + recipe.words_share:
        document = word_question(rng)
    elif draw < recipe.letters_share + recipe.words_share + recipe.questions_share:
        document = choice_question(rng) if rng.random() < CHOICE_SHARE else open_question(rng)
    elif draw < 1 - recipe.stories_share:
        document = sentence(rng)
    else:
        return story_text(rng), None
    return plain_text(document), document


def story_text(rng: np.random.Generator) -> str:
    """A story alone, or with a question about it and the answer; or a drill of words that stories tell."""
    form = rng.choice(STORY_FORMS, p=STORY_SHARES)
    if form == "drill":
        words = sorted({word for category in story_categories() for word in story_options(category)})
        picked = rng.choice(len(words), size=len(LETTERS), replace=False)
        return plain_text(drill([words[i] for i in picked], rng))
    story = random_story(rng)
    if form == "alone":
        return story.text
    category = str(rng.choice(sorted(story.facts)))
    question, answer = story_question(category, rng), story.facts[category]
    if form == "choice":
        options = pick_story_options(category, answer, rng)
        question, answer = multiple_choice(question, options), LETTERS[options.index(answer)]
    return plain_text({"sound": story.text, "question": question, "answer": answer})
