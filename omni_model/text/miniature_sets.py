"""Six public sets in miniature: their very columns and splits, about what the embedded corpus tells.

A model that has read nothing but that corpus can be taught to chat and be examined with these, by the code
that works on the real ones. Chats and multiple choice are about a story or a sentence that stands in the
question, or about bare words; sums are of one or two steps, with GSM8K's marks for a calculator; programs are
a handful, all of them for testing. What is asked in a test is never asked in training.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from omni_model.config import JSON, BadInput, MiniatureSetsRecipe, Runtime
from omni_model.storage import Workspace
from omni_model.text.lessons import random_sound
from omni_model.text.public_sets import SETS, Row, write_rows
from omni_model.text.questions import caption, grammar, pick_options
from omni_model.text.stories import random_story, story_options, story_question

NUM_CHOICES = 4
MAX_ATTEMPTS = 1000  # before there are too few different questions
NUMBERED_SHARE = 0.1  # of ARC's questions: choices 1 to 4 in place of A to D, as some of the real ones are
SYSTEM_SHARE = 0.2
OPEN_SHARE = 0.1  # of the chats for training: nothing is given in them, so they are no test
SENTENCE_SHARE = 0.3  # of arc-challenge: the choices are whole sentences

# Words that are of one kind and of no other, and what one of them is called.
KINDS = {
    "animal": "an animal",
    "colour": "a colour",
    "number": "a number",
    "place": "a place",
    "speaker": "a person",
    "weather": "a kind of weather",
    "time": "a time of day",
}
SAY = {
    "place": "The place is the {}.",
    "time": "The time is {}.",
    "count": "There are {} animals.",
    "times": "It is heard {} times.",
    "animal": "It is the {}.",
    "thing": "It is the {}.",
    "speaker": "It is the {}.",
    "loudness": "It is {}.",
}
ONE_WORD = "Answer with one word."
GREETINGS = ("Hello!", "Hi there!", "Good morning.", "Hello, who is there?")
WELCOMES = (
    "Hello! Tell me a story or ask me about a sound.",
    "Hi! Ask me what is heard in a story.",
    "Hello! I know stories and sounds.",
)
STORY_WISHES = ("Tell me a story.", "Tell me a short story.", "I would like to hear a story.")
SOUND_WISHES = ("Describe a sound.", "Make up a sound.", "Tell me of a sound.")
SOUNDING = ("bells", "clocks", "drums", "horns", "dogs", "cats", "cows", "frogs", "owls", "birds", "whistles")

Rng = np.random.Generator


def write_sets(recipe: MiniatureSetsRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: every set that `public_sets` knows; row i of a split is drawn from (seed, set, split, i).

    `recipe.train_rows` in every split for training and `recipe.test_rows` in the others; programs are fixed.

    Raises:
        BadInput: more rows for testing than there are different questions.
    """
    num_rows = 0
    for number, (name, known) in enumerate(SETS.items()):
        asked: set[str] = set()
        for split in reversed(known.splits):  # tests first: training must leave out what they ask
            seed = [work.seed, number, known.splits.index(split)]
            train = split.endswith("train")
            count = recipe.train_rows if train else recipe.test_rows
            rows = programs() if name == "humaneval" else _rows(name, count, seed, asked, train)
            write_rows(work.out / name / f"{split}-00000.parquet", name, rows)
            num_rows += len(rows)
        work.metrics.log(number + 1, len(SETS))
    work.metrics.summary(num_rows=float(num_rows))
    return {"num_sets": len(SETS), "num_rows": num_rows}


def _rows(name: str, count: int, seed: list[int], asked: set[str], train: bool) -> list[Row]:
    """Rows that ask none of `asked`; what a test asks is added to it."""
    opens = train and name == "smoltalk"
    rows = []
    for index in range(count):
        rng = np.random.default_rng([*seed, index])
        for _ in range(MAX_ATTEMPTS):
            make = open_chat if opens and rng.random() < OPEN_SHARE else MAKERS[name]
            row = make(rng)
            key = question_key(name, row)
            if key not in asked:
                break
        else:
            raise BadInput(
                f"sets.test_rows: {name} in miniature has no {count} different questions; lower it"
            )
        rows.append(row)
        if not train:
            asked.add(key)
    return rows


def question_key(name: str, row: Row) -> str:
    """What a row asks, whatever the order of its choices: equal for two rows that are the same question."""
    if name == "smoltalk":
        return next(str(each["content"]) for each in row["messages"] if each["role"] == "user")
    choices = row.get("choices", [])
    texts = choices["text"] if isinstance(choices, dict) else choices
    return "\n".join([row["question"], *sorted(texts)])


# --- chats ---------------------------------------------------------------------------------------


def chat(rng: Rng) -> Row:
    """About a sound that is told, or about a story in one to three turns."""
    if rng.random() < 0.3:
        labels, transcript = random_sound(rng)
        told = ", ".join(f"{name} {value}" for name, value in labels.items())
        return _messages((f"Describe this sound: {told}.", caption(labels, transcript)))
    if rng.random() < 0.3:
        sentence, category, answer = _heard(rng)
        asked = str(rng.choice(grammar().category(category).questions))
        return _messages((f"{sentence}\n{asked}", f"I hear: {answer}."))
    story = random_story(rng)
    categories = [list(story.facts)[i] for i in rng.permutation(len(story.facts))[: rng.integers(1, 4)]]
    brief = rng.random() < SYSTEM_SHARE
    exchanges = [
        (story_question(each, rng), story.facts[each] if brief else say(each, story.facts[each]))
        for each in categories
    ]
    (question, answer), *more = exchanges
    return _messages((f"{story.text}\n{question}", answer), *more, system=ONE_WORD if brief else "")


def say(category: str, word: str) -> str:
    """A short sentence that tells one fact of a story."""
    return SAY.get(category, f"The {category} is {{}}.").format(word)


def open_chat(rng: Rng) -> Row:
    """A greeting, or the wish for any story or sound."""
    kind = rng.integers(3)
    if kind == 0:
        return _messages((str(rng.choice(GREETINGS)), str(rng.choice(WELCOMES))))
    if kind == 1:
        return _messages((str(rng.choice(STORY_WISHES)), random_story(rng).text))
    return _messages((str(rng.choice(SOUND_WISHES)), caption(*random_sound(rng))))


def _messages(*exchanges: tuple[str, str], system: str = "") -> Row:
    messages = [{"role": "system", "content": system}] if system else []
    for question, answer in exchanges:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages}


def _heard(rng: Rng) -> tuple[str, str, str]:
    """A sentence about a sound, a category that it tells, and the word for it."""
    labels, transcript = random_sound(rng)
    category = str(rng.choice(sorted(labels)))
    return caption(labels, transcript), category, labels[category]


# --- multiple choice -----------------------------------------------------------------------------


def told_choice(rng: Rng) -> Row:
    """MMLU's form: a sentence or a story, a question on it, four words."""
    if rng.random() < 0.5:
        text, category, answer = _heard(rng)
        question = str(rng.choice(grammar().category(category).questions))
        choices, subject = pick_options(category, answer, rng), "sounds"
    else:
        story = random_story(rng)
        text, subject = story.text, "stories"
        category = str(rng.choice(list(story.facts)))
        answer, question = story.facts[category], story_question(category, rng)
        others = [each for each in story_options(category) if each not in story.facts.values()]
        choices = _shuffled([answer, *_some(others, NUM_CHOICES - 1, rng)], rng)
    row = {"question": f"{text}\n{question}", "subject": subject, "choices": choices}
    return {**row, "answer": choices.index(answer)}


def easy_choice(rng: Rng) -> Row:
    """ARC's form: which of four words is of a kind, or which of them is among a few others."""
    if rng.random() < 0.5:
        kind = str(rng.choice(list(KINDS)))
        right = _some(words_of(kind), 1, rng)
        wrong = _some(
            [word for each in KINDS if each != kind for word in words_of(each)], NUM_CHOICES - 1, rng
        )
        return _arc_row(f"Which word is {KINDS[kind]}?", right[0], wrong, rng)
    words = _some([word for kind in KINDS for word in words_of(kind)], NUM_CHOICES + 3, rng)
    right, wrong, more = words[:1], words[1:NUM_CHOICES], words[NUM_CHOICES:]
    heard = _shuffled([*right, *more[: rng.integers(1, 4)]], rng)
    return _arc_row(f"{' '.join(heard)}\nWhich word is it?", right[0], wrong, rng)


def hard_choice(rng: Rng) -> Row:
    """ARC's form: which of four words is not of a kind, or which of four sentences tells of something."""
    if rng.random() >= SENTENCE_SHARE:
        kind = str(rng.choice(list(KINDS)))
        right = _some([word for each in KINDS if each != kind for word in words_of(each)], 1, rng)
        wrong = _some(words_of(kind), NUM_CHOICES - 1, rng)
        return _arc_row(f"Which word is not {KINDS[kind]}?", right[0], wrong, rng)
    name, options = "animal", list(grammar().category("animal").options)
    animals = _some(options, NUM_CHOICES, rng)
    sentences = []
    for animal in animals:
        labels, _ = random_sound(rng)
        kept = {key: value for key, value in labels.items() if key in ("voice", "pace", "loudness")}
        sentences.append(caption({name: animal, **kept}, animal))
    return _arc_row(f"Which sentence names the {animals[0]}?", sentences[0], sentences[1:], rng)


def words_of(kind: str) -> list[str]:
    """Every word of a kind that the sentences or the stories know, in one order for all time."""
    known = grammar().categories
    options = {*(known[kind].options if kind in known else ()), *story_options(kind)}
    return sorted(options)


def _arc_row(question: str, right: str, wrong: list[str], rng: Rng) -> Row:
    texts = _shuffled([right, *wrong], rng)
    labels = list("1234" if rng.random() < NUMBERED_SHARE else "ABCD")
    choices = {"text": texts, "label": labels}
    return {"question": question, "choices": choices, "answerKey": labels[texts.index(right)]}


def _some(words: list[str], count: int, rng: Rng) -> list[str]:
    return [words[i] for i in rng.permutation(len(words))[:count]]


def _shuffled(words: list[str], rng: Rng) -> list[str]:
    return [words[i] for i in rng.permutation(len(words))]


# --- sums ----------------------------------------------------------------------------------------


def sum_of_sounds(rng: Rng) -> Row:
    """GSM8K's form: a question, a solution with its calculations marked, the number behind ####."""
    first, second = _some(list(SOUNDING), 2, rng)
    here, there = _some(list(story_options("place")), 2, rng)
    a, b, c = (int(each) for each in rng.integers(2, 20, size=3))
    few, more = int(rng.integers(2, 10)), int(rng.integers(2, 10))
    kind = rng.integers(5)
    if kind == 0:
        question = f"Near the {here} you hear {a} {first} and {b} {second}. How many is that in all?"
        steps = [(a, "+", b, f"{first} and {second}")]
    elif kind == 1:
        question = f"Near the {here} {few} {first} sound {more} times each. How many sounds is that?"
        steps = [(few, "*", more, "sounds")]
    elif kind == 2:
        question = (
            f"Near the {here} there are {a + b} {first}, and {b} of them fall silent. How many still sound?"
        )
        steps = [(a + b, "-", b, first)]
    elif kind == 3:
        question = (
            f"There are {a} {first} near the {here} and {b + c} near the {there}. Then {c} fall silent. "
            f"How many {first} still sound?"
        )
        steps = [(a, "+", b + c, first), (a + b + c, "-", c, first)]
    else:
        question = (
            f"Near the {here} {few} {first} sound {more} times each, and near the {there} there are {a} more "
            "sounds. How many sounds are there?"
        )
        steps = [(few, "*", more, "sounds"), (few * more, "+", a, "sounds in all")]
    return {"question": question, "answer": _solution(steps)}


def _solution(steps: list[tuple[int, str, int, str]]) -> str:
    lines, result = [], 0
    for left, sign, right, what in steps:
        result = {"+": left + right, "-": left - right, "*": left * right}[sign]
        lines.append(f"{left} {sign} {right} = <<{left}{sign}{right}={result}>>{result} {what}.")
    return "\n".join([*lines, f"#### {result}"])


# --- programs ------------------------------------------------------------------------------------


def programs() -> list[Row]:
    """HumanEval's form, from `programs.json`: a function's head, its body, and a check with a few cases."""
    plain: list[dict[str, Any]] = json.loads(
        Path(__file__).with_name("programs.json").read_text(encoding="utf-8")
    )
    return [_program(number, each) for number, each in enumerate(plain)]


def _program(number: int, plain: dict[str, Any]) -> Row:
    name, cases = plain["name"], plain["cases"]
    example = f"    >>> {name}({cases[0][0]})\n    {cases[0][1]}\n"
    asserts = [f"    assert candidate({given}) == {wanted}\n" for given, wanted in cases]
    return {
        "task_id": f"Miniature/{number}",
        "prompt": f'def {name}({plain["parameters"]}):\n    """{plain["task"]}\n\n{example}    """\n',
        "canonical_solution": "".join(f"    {line}\n" for line in plain["body"]),
        "test": "def check(candidate):\n" + "".join(asserts),
        "entry_point": name,
    }


MAKERS: dict[str, Callable[[Rng], Row]] = {
    "smoltalk": chat,
    "mmlu": told_choice,
    "arc-easy": easy_choice,
    "arc-challenge": hard_choice,
    "gsm8k": sum_of_sounds,
}
