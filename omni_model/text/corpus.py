"""The text corpus: sentences about sounds, questions on them, and drills that teach letters.

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
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.config import JSON, BadInput, Runtime, TextRecipe
from omni_model.storage import Workspace
from omni_model.text.questions import LETTERS, caption, grammar, list_options, multiple_choice, pick_options

DOCUMENTS_FILE = "documents.jsonl"
LESSONS = ("letters", "words", "questions", "sentences")
FORMS = ({"text"}, {"options", "pairs"}, {"sound", "question", "answer"})
CHOICE_SHARE = 0.5  # of the questions; the others are open
PLAIN_SHARE = 0.3  # of the sentences; the others are captions on request
MAX_WORDS = 4
PAIRS_PER_DRILL = 8  # drawn with replacement: otherwise the last letters follow by elimination

Document = dict[str, Any]


def write_corpus(recipe: TextRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: `documents.jsonl`, one JSON object a line; document i depends on (seed, i) alone."""
    path = work.out / DOCUMENTS_FILE
    with path.open("w", encoding="utf-8") as file:
        for index in range(recipe.num_documents):
            document = write_document(recipe, np.random.default_rng([work.seed, index]))
            file.write(json.dumps(document, sort_keys=True, ensure_ascii=False) + "\n")
            if index % 2000 == 0:
                work.metrics.log(index, recipe.num_documents)
    num_bytes = path.stat().st_size
    work.metrics.summary(num_documents=recipe.num_documents, megabytes=round(num_bytes / 1e6, 2))
    return {"num_documents": recipe.num_documents, "num_bytes": num_bytes}


def write_document(recipe: TextRecipe, rng: np.random.Generator) -> Document:
    """One random document of the mix that the recipe's shares describe."""
    draw = rng.random()
    if draw < recipe.letters_share:
        return letter_drill(rng)
    if draw < recipe.letters_share + recipe.words_share:
        return word_question(rng)
    if draw < recipe.letters_share + recipe.words_share + recipe.questions_share:
        return choice_question(rng) if rng.random() < CHOICE_SHARE else open_question(rng)
    sentence = caption(*random_sound(rng))
    if rng.random() < PLAIN_SHARE:
        return {"lesson": "sentences", "text": sentence}
    prompt = str(rng.choice(grammar().caption_prompts))
    return {"lesson": "sentences", "sound": sentence, "question": prompt, "answer": sentence}


def choice_question(rng: np.random.Generator) -> Document:
    """Multiple choice about a random sentence."""
    sentence, category, answer = _asked(rng)
    options = pick_options(category, answer, rng)
    question = str(rng.choice(grammar().category(category).questions))
    letter = LETTERS[options.index(answer)]
    asked = multiple_choice(question, options)
    return {"lesson": "questions", "sound": sentence, "question": asked, "answer": letter}


def open_question(rng: np.random.Generator) -> Document:
    """The same without options; the answer is the word itself."""
    sentence, category, answer = _asked(rng)
    question = str(rng.choice(grammar().category(category).questions))
    return {"lesson": "questions", "sound": sentence, "question": question, "answer": answer}


def _asked(rng: np.random.Generator) -> tuple[str, str, str]:
    labels, transcript = random_sound(rng)
    category = str(rng.choice(sorted(labels)))
    return caption(labels, transcript), category, labels[category]


def word_question(rng: np.random.Generator) -> Document:
    """One to MAX_WORDS bare words to listen to, and four options of which one is among them."""
    words = _random_words(rng, len(LETTERS) + MAX_WORDS - 1)
    options, others = words[: len(LETTERS)], words[len(LETTERS) :]
    answer = int(rng.integers(len(LETTERS)))
    heard = [options[answer], *others[: rng.integers(MAX_WORDS)]]
    sound = " ".join(heard[i] for i in rng.permutation(len(heard)))
    asked = multiple_choice("Which word is it?", options)
    return {"lesson": "words", "sound": sound, "question": asked, "answer": LETTERS[answer]}


def letter_drill(rng: np.random.Generator) -> Document:
    """Four options, then words out of them, each with its letter."""
    words = _random_words(rng, len(LETTERS))
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
    words = sorted({option for category in grammar().categories.values() for option in category.options})
    return [words[i] for i in rng.choice(len(words), size=count, replace=False)]


def read_documents(directory: Path) -> list[Document]:
    """Every document of a payload directory, in order.

    Raises:
        BadInput: no `documents.jsonl`, or a line that is not a document.
    """
    path = directory / DOCUMENTS_FILE
    if not path.exists():
        raise BadInput(f"{path} is missing; write the text corpus first")
    documents = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        document = json.loads(line)
        if document.keys() - {"lesson"} not in FORMS or document.get("lesson") not in LESSONS:
            raise BadInput(f"{path} line {number} is not a document; write the text corpus again")
        documents.append(document)
    return documents


def plain_texts(document: Mapping[str, Any]) -> list[str]:
    """The plain strings of a document, for the tokenizer to learn from."""
    if "text" in document:
        return [document["text"]]
    if "pairs" in document:
        return [document["options"] + "".join(f" {part}" for pair in document["pairs"] for part in pair)]
    return [document["sound"], document["question"], document["answer"]]
