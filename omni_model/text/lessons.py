"""The documents of the curriculum: sentences about sounds, questions on them, and drills that teach letters.

A small model copies a word out of a sentence early and finds the letter of an option late, in one sudden
step; without it, it answers a quarter of all questions right for ever. Three lessons bring it about in order:
*letters* (options, then words out of them, each followed by its letter), *words* (a few bare words to listen
to, options, the letter of the one that is among them), *questions* (open and multiple choice about a
sentence). Then come *sentences*, plain and as captions.

A document has its `lesson` and one of: `text`, learned whole; `options` and `pairs`, words with their
letters, of which the letters are learned; `sound`, `question` and `answer`, of which the answer is learned.
`sound` is the text that stands where the soft tokens of a clip will stand later.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.config import BadInput
from omni_model.text.corpus import read_texts
from omni_model.text.questions import (
    LETTERS,
    NOTHING,
    caption,
    grammar,
    list_options,
    multiple_choice,
    pick_options,
)

LESSON = "lesson"  # the column of a text corpus that holds these documents as JSON
LESSONS = ("letters", "words", "questions", "sentences")
FORMS = ({"text"}, {"options", "pairs"}, {"sound", "question", "answer"})
PLAIN_SHARE = 0.3  # of the sentences; the others are captions on request
MAX_WORDS = 4
PAIRS_PER_DRILL = 8  # drawn with replacement: otherwise the last letters follow by elimination

Document = dict[str, Any]


def sentence(rng: np.random.Generator) -> Document:
    """A sentence about a sound that could exist, plain or as a caption on request."""
    told = caption(*random_sound(rng))
    if rng.random() < PLAIN_SHARE:
        return {"lesson": "sentences", "text": told}
    prompt = str(rng.choice(grammar().caption_prompts))
    return {"lesson": "sentences", "sound": told, "question": prompt, "answer": told}


def choice_question(rng: np.random.Generator) -> Document:
    """Multiple choice about a random sentence."""
    sound, category, answer = _asked(rng)
    options = pick_options(category, answer, rng)
    question = str(rng.choice(grammar().category(category).questions))
    letter = LETTERS[options.index(answer)]
    asked = multiple_choice(question, options)
    return {"lesson": "questions", "sound": sound, "question": asked, "answer": letter}


def open_question(rng: np.random.Generator) -> Document:
    """The same without options; the answer is the word itself."""
    sound, category, answer = _asked(rng)
    question = str(rng.choice(grammar().category(category).questions))
    return {"lesson": "questions", "sound": sound, "question": question, "answer": answer}


def _asked(rng: np.random.Generator) -> tuple[str, str, str]:
    labels, transcript = random_sound(rng)
    category = str(rng.choice(sorted(labels)))
    return caption(labels, transcript), category, labels[category]


def word_question(rng: np.random.Generator) -> Document:
    """One to MAX_WORDS bare words to listen to, and four options of which one is among them.

    Most often few words: with a single one this is a drill's next step, and without enough of those some
    models never take it.
    """
    words = _random_words(rng, len(LETTERS) + MAX_WORDS - 1)
    options, others = words[: len(LETTERS)], words[len(LETTERS) :]
    answer = int(rng.integers(len(LETTERS)))
    heard = [options[answer], *others[: min(rng.integers(MAX_WORDS, size=2))]]
    sound = " ".join(heard[i] for i in rng.permutation(len(heard)))
    asked = multiple_choice("Which word is it?", options)
    return {"lesson": "words", "sound": sound, "question": asked, "answer": LETTERS[answer]}


def letter_drill(rng: np.random.Generator) -> Document:
    """Four options, then words out of them, each with its letter."""
    return drill(_random_words(rng, len(LETTERS)), rng)


def drill(words: Sequence[str], rng: np.random.Generator) -> Document:
    """Four words as options, then words out of them, each with its letter."""
    pairs = [[words[i], LETTERS[i]] for i in rng.integers(len(LETTERS), size=PAIRS_PER_DRILL)]
    return {"lesson": "letters", "options": list_options(words), "pairs": pairs}


# What each lesson is examined on.
EXAMS: dict[str, Callable[[np.random.Generator], Document]] = {
    "letters": letter_drill,
    "words": word_question,
    "questions": choice_question,
    "sentences": choice_question,
}


def exam(lesson: str, count: int, seed: int) -> list[Document]:
    """Questions of a lesson, drawn apart from any corpus."""
    return [
        EXAMS[lesson](np.random.default_rng([seed, index, LESSONS.index(lesson)])) for index in range(count)
    ]


def random_sound(rng: np.random.Generator) -> tuple[dict[str, str], str]:
    """Labels and transcript of a clip that could exist: a spoken phrase, a tone, a noise or beeps."""
    spoken = rng.random() < 0.5
    if spoken:
        words = [name for name in ("number", "colour", "animal") if rng.random() < 0.8] or ["animal"]
        names = [words[i] for i in rng.permutation(len(words))]
        names += ["voice", "pace", "loudness"]
    else:
        kinds = (("pitch", "contour", "tremolo"), ("noise",), ("beeps", "pitch"))
        names = [*kinds[rng.integers(len(kinds))], "loudness"]
    names += ["recording"] if rng.random() < 0.3 else []
    labels = {name: str(rng.choice(grammar().categories[name].options)) for name in names}
    if labels.get("recording") == "noisy":
        labels["noise"] = str(rng.choice(grammar().categories["noise"].options))
    transcript = " ".join(
        value for name, value in labels.items() if grammar().categories[name].group == "words"
    )
    return labels, transcript


def _random_words(rng: np.random.Generator, count: int) -> list[str]:
    embedded = [category for category in grammar().categories.values() if category.embedded]
    words = sorted({NOTHING, *(option for category in embedded for option in category.options)})
    return [words[i] for i in rng.choice(len(words), size=count, replace=False)]


def read_documents(directory: Path) -> list[Document]:
    """Every document of the curriculum in a corpus's payload directory, in order; stories are left out.

    Raises:
        BadInput: no such corpus, one without lessons, or with a lesson that is not a document.
    """
    documents = []
    for number, lesson in enumerate(read_texts(directory, "train", LESSON)):
        if not lesson:
            continue
        document = json.loads(lesson)
        if document.keys() - {"lesson"} not in FORMS or document.get("lesson") not in LESSONS:
            raise BadInput(f"{directory} has no lesson in document {number}; write the text corpus again")
        documents.append(document)
    return documents


def plain_text(document: Mapping[str, Any]) -> str:
    """A document as somebody would write it down: what is heard, the question and the answer, a line each.

    >>> plain_text({"sound": "Two beeps.", "question": "How many?", "answer": "two"})
    'Two beeps.\\nHow many?\\ntwo'
    """
    if "text" in document:
        return str(document["text"])
    if "pairs" in document:
        pairs = " ".join(part for pair in document["pairs"] for part in pair)
        return f"{document['options']}\n{pairs}"
    return "\n".join(document[line] for line in ("sound", "question", "answer"))
