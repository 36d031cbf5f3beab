"""The tasks of CORE in the store: nanochat's bundle, fetched, or a miniature one, written here.

The miniature one has the same formats. Each of its tasks is named after what it asks about the small world of
the embedded corpus: questions as that corpus puts them, and stories and sentences to be continued. Its items
are drawn with a seed of their own, so a model that reads that corpus has not read them, and one with random
weights can only guess.
"""

import contextlib
import csv
import io
import json
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from omni_model import hardware
from omni_model.artifacts import Manifest, canonical_json, sha256_file, write_atomically
from omni_model.config import JSON, BadInput, CoreBundleRecipe, MiniatureCoreRecipe, Runtime
from omni_model.downloads import fetch, looks_like_page
from omni_model.evaluation.core_tasks import (
    BASELINE,
    BASELINES_FILE,
    DATA,
    LABEL,
    LANGUAGE_MODELING,
    MINIATURE,
    MULTIPLE_CHOICE,
    SCHEMA,
    TASKS_FILE,
    read_bundle,
    read_items,
)
from omni_model.outside import digest_folder
from omni_model.storage import Workspace, finished
from omni_model.text.lessons import choice_question, letter_drill, plain_text, random_sound
from omni_model.text.questions import LETTERS, caption, grammar, pick_options
from omni_model.text.stories import Story, pick_story_options, random_story, story_question

URLS = ("https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",)
LOCK = "bundle.lock.json"  # the sha256 of the zip, beside the artifacts of this stage
MAX_BYTES = 2**30  # of all files that are taken from a bundle

INSIDE = ("", "eval_bundle/")  # where in a zip or folder a bundle may begin

Open = Callable[[str], IO[bytes]]  # a file of a bundle by its path; KeyError or OSError where there is none


def fetch_core(recipe: CoreBundleRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: nanochat's bundle, downloaded (pinned by its sha256 when first used) or from `recipe.place`.

    Of a zip or folder only the files that its `core.yaml` names are taken.

    Raises:
        BadInput: it cannot be had, is not the one that was pinned or planned with, or is not whole.
    """
    if recipe.place:
        place = Path(recipe.place).expanduser()
        if not place.exists():
            raise BadInput(f"{place} is not there; name the folder or zip that holds CORE's bundle")
        found = digest_folder(place) if place.is_dir() else sha256_file(place)
        if recipe.digest and found != recipe.digest:
            raise BadInput(f"{place} is not what it was when the run was planned; run it again")
        return _take(place, work.out)
    lock = work.directory.parent / LOCK
    wanted = recipe.sha256.lower() or _pinned(lock)
    if earlier := _fetched_before(work.directory.parent, wanted):
        work.metrics.summary(zip_sha256=wanted)
        return _take(earlier, work.out)
    if hardware.network().offline:
        raise BadInput("CORE's bundle must be downloaded and OMNI_OFFLINE is set; unset it or name a `place`")
    target = work.partial / "eval_bundle.zip"
    try:
        got = fetch(URLS, target, sha256=wanted, progress=lambda done, total: work.metrics.log(done, total))
    except BadInput as error:
        pin = f"; {lock if not recipe.sha256 else 'the recipe'} pins it to {wanted}" if wanted else ""
        raise BadInput(f"{error}{pin}, or name a folder or zip that holds it as `place`") from None
    try:
        facts = _take(target, work.out)
    except BadInput:
        target.unlink()  # otherwise it would count as fetched
        raise
    if not wanted:
        write_atomically(lock, json.dumps({"sha256": got.sha256}) + "\n")
        print(f"CORE's bundle is pinned from now on to the sha256 {got.sha256}, in {lock}")
    work.metrics.summary(zip_sha256=got.sha256)
    return facts


def _pinned(lock: Path) -> str:
    try:
        return str(json.loads(lock.read_text())["sha256"])
    except FileNotFoundError:
        return ""
    except (ValueError, TypeError, KeyError):
        raise BadInput(f"{lock} cannot be read; delete it to have the bundle pinned anew") from None


def _fetched_before(stage: Path, wanted: str) -> Path | None:
    """The payload of an earlier artifact made of the zip wanted: code that changed asks for no network."""
    for directory in finished(stage) if wanted else ():
        if Manifest.read(directory).metrics.get("zip_sha256") == wanted:
            return directory / "out"
    return None


def _take(place: Path, out: Path) -> dict[str, JSON]:
    """Copy a bundle, a folder or a zip, to `out` and check every line of it; returns CoreBundle's facts."""
    if place.is_dir():
        return _copy_all(lambda name: (place / name).open("rb"), place, out)
    try:
        with place.open("rb") as file:
            if looks_like_page(file.read(64)):
                raise BadInput(f"{place.name} is a web page and no bundle; get it from another server")
            with zipfile.ZipFile(file) as archive:
                return _copy_all(archive.open, place, out)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise BadInput(f"{place.name} is not a whole zip file ({error}); fetch it again") from None
    except OSError as error:
        raise BadInput(f"{place} cannot be read ({error.strerror}); make it readable") from None


def _copy_all(open_file: Open, place: Path, out: Path) -> dict[str, JSON]:
    for inside in INSIDE:
        with contextlib.suppress(KeyError, OSError), open_file(inside + TASKS_FILE):
            break
    else:
        raise BadInput(f"{place} holds no {TASKS_FILE}, nor {INSIDE[1]}{TASKS_FILE}; it is no bundle of CORE")
    room = MAX_BYTES
    for name in (TASKS_FILE, BASELINES_FILE):
        room -= _copy(open_file, inside, name, out, room)
    tasks = read_bundle(out).tasks
    for dataset in sorted({task.dataset for task in tasks}):
        room -= _copy(open_file, inside, f"{DATA}/{dataset}", out, room)
    return {"num_tasks": len(tasks), "num_items": sum(len(read_items(out, task)) for task in tasks)}


def _copy(open_file: Open, inside: str, name: str, out: Path, room: int) -> int:
    """Copy a file and return its size, never writing more than `room` bytes whatever a zip's table says."""
    target, size = out / name, 0
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open_file(inside + name) as source, target.open("wb") as copy:
            while chunk := source.read(2**20):
                size += len(chunk)
                if size > room:
                    raise BadInput(
                        f"{name} makes the bundle larger than {MAX_BYTES >> 20} MiB; it is no CORE"
                    )
                copy.write(chunk)
    except (KeyError, FileNotFoundError, IsADirectoryError):
        raise BadInput(f"the bundle has no {name}, which its {TASKS_FILE} needs; fetch it again") from None
    return size


# --- in miniature ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asks:
    """A task of the miniature bundle and how an item of it is drawn."""

    label: str
    kind: str
    num_fewshot: int
    delimiter: str
    draw: Callable[[np.random.Generator], dict[str, Any]]

    @property
    def baseline(self) -> int:
        """Percent that guessing gets right: of four continuations, two contexts, all texts there are."""
        return {MULTIPLE_CHOICE: 25, SCHEMA: 50, LANGUAGE_MODELING: 0}[self.kind]

    @property
    def dataset(self) -> str:
        return f"{self.kind}/{self.label}.jsonl"


def write_core(recipe: MiniatureCoreRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Stage: a bundle of our own tasks. Item i of a task depends on (seed, task, i) alone."""
    for number, task in enumerate(ASKED):
        rngs = (np.random.default_rng([work.seed, number, index]) for index in range(recipe.items_per_task))
        path = work.out / DATA / task.dataset
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(canonical_json(task.draw(rng)) + "\n" for rng in rngs), encoding="utf-8")
        work.metrics.log(number + 1, len(ASKED))
    # JSON is YAML, and is written alike by every version of every library.
    listed = [
        {
            "label": task.label,
            "dataset_uri": task.dataset,
            "num_fewshot": [task.num_fewshot],
            "icl_task_type": task.kind,
            "continuation_delimiter": task.delimiter,
        }
        for task in ASKED
    ]
    told = {"bundle": MINIATURE, "icl_tasks": listed}
    (work.out / TASKS_FILE).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    (work.out / BASELINES_FILE).write_text(_table(recipe.items_per_task), encoding="utf-8")
    return {"num_tasks": len(ASKED), "num_items": len(ASKED) * recipe.items_per_task}


def _table(items_per_task: int) -> str:
    """`eval_meta_data.csv`, with the columns of the real one that say something here."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow((LABEL, "Task Type", "#shots", "#datapoints", BASELINE))
    for task in ASKED:
        table.writerow((task.label, task.kind, task.num_fewshot, items_per_task, task.baseline))
    return text.getvalue()


def _choice(query: str, right: str, choices: list[str]) -> dict[str, Any]:
    return {"query": query, "choices": choices, "gold": choices.index(right)}


def _pair(right: str, wrong: str, continuation: str, rng: np.random.Generator) -> dict[str, Any]:
    gold = int(rng.integers(2))
    contexts = [wrong, right] if gold else [right, wrong]
    return {"context_options": contexts, "continuation": continuation, "gold": gold}


def _animal_sound(rng: np.random.Generator) -> dict[str, Any]:
    """A story up to its animal; which word follows? The wrong ones follow other animals."""
    context, right = _until_sound(rng)
    words = [right]
    while len(words) < len(LETTERS):
        _, other = _until_sound(rng)
        words += [other] if other not in words else []
    return _choice(context, right, [words[i] for i in rng.permutation(len(words))])


def _until_sound(rng: np.random.Generator) -> tuple[str, str]:
    while True:
        story = random_story(rng)
        animal = story.facts.get("animal", "")
        if animal and (found := re.match(rf"(.*?\b{animal}) ([a-z]+s)\b", story.text)):
            return found[1], found[2]


def _asked_story(rng: np.random.Generator) -> tuple[str, Story, str]:
    """A category, a story that tells it, and the question."""
    story = random_story(rng)
    category = str(rng.choice(sorted(story.facts)))
    return category, story, story_question(category, rng)


def _story_fact(rng: np.random.Generator) -> dict[str, Any]:
    category, story, question = _asked_story(rng)
    right = story.facts[category]
    return _choice(f"{story.text}\n{question}", right, pick_story_options(category, right, rng))


def _which_story(rng: np.random.Generator) -> dict[str, Any]:
    """An answer, and two stories that both answer the question; only one of them so."""
    category, story, question = _asked_story(rng)
    answer = other = story.facts[category]
    while other == answer:
        second = random_story(rng)
        other = second.facts.get(category, answer)
    return _pair(f"{story.text}\n{question}", f"{second.text}\n{question}", answer, rng)


def _sound_fact(rng: np.random.Generator) -> dict[str, Any]:
    labels, transcript = random_sound(rng)
    category = str(rng.choice(sorted(labels)))
    question = str(rng.choice(grammar().category(category).questions))
    options = pick_options(category, labels[category], rng)
    return _choice(f"{caption(labels, transcript)}\n{question}", labels[category], options)


def _option_letter(rng: np.random.Generator) -> dict[str, Any]:
    lesson = choice_question(rng)
    return _choice(f"{lesson['sound']}\n{lesson['question']}", lesson["answer"], list(LETTERS))


def _drill_letter(rng: np.random.Generator) -> dict[str, Any]:
    query, _, letter = plain_text(letter_drill(rng)).rpartition(" ")
    return _choice(query, letter, list(LETTERS))


def _animal_verb(rng: np.random.Generator) -> dict[str, Any]:
    context, word = _until_sound(rng)
    return {"context": context, "continuation": word}


def _last_word(rng: np.random.Generator) -> dict[str, Any]:
    context, word = _unfinished(rng)
    return {"context": context, "continuation": word}


def _unfinished(rng: np.random.Generator) -> tuple[str, str]:
    """A sentence without its last word, and that word without the full stop, a token that varies."""
    context, _, word = caption(*random_sound(rng)).rstrip(".").rpartition(" ")
    return context, word


def _repeated(rng: np.random.Generator) -> dict[str, Any]:
    """A sentence, a request to describe the sound, and half of the sentence again."""
    told = caption(*random_sound(rng))
    words = told.split(" ")
    half = len(words) // 2
    prompt = str(rng.choice(grammar().caption_prompts))
    return {
        "context": f"{told}\n{prompt}\n{' '.join(words[:half])}",
        "continuation": " ".join(words[half:]),
    }


def _which_sentence(rng: np.random.Generator) -> dict[str, Any]:
    """A word, and two sentences without their last one; only one of them ends so."""
    right, word = _unfinished(rng)
    while (wrong := _unfinished(rng))[1] == word:
        pass
    return _pair(right, wrong[0], word, rng)


ASKED = (
    Asks("animal_sounds", MULTIPLE_CHOICE, 0, " ", _animal_sound),
    Asks("facts_of_stories", MULTIPLE_CHOICE, 0, "\n", _story_fact),
    Asks("facts_of_sounds", MULTIPLE_CHOICE, 2, "\n", _sound_fact),
    Asks("letters_of_options", MULTIPLE_CHOICE, 0, "\n", _option_letter),
    Asks("letters_of_words", MULTIPLE_CHOICE, 0, " ", _drill_letter),
    Asks("which_story", SCHEMA, 0, "\n", _which_story),
    Asks("which_sentence", SCHEMA, 1, " ", _which_sentence),
    Asks("what_animals_do", LANGUAGE_MODELING, 0, " ", _animal_verb),
    Asks("last_words", LANGUAGE_MODELING, 0, " ", _last_word),
    Asks("repeated_sentences", LANGUAGE_MODELING, 1, " ", _repeated),
)
