"""The items of every group, made of test clips; conflict and silence have a file of their own."""

from collections import Counter
from collections.abc import Sequence

from omni_model.config import BadInput, BenchmarkRecipe
from omni_model.evaluation.benchmark_choice import (
    Clip,
    answers_in,
    choose_units,
    deal_wrong_options,
    least_used,
    letters_in_turn,
    named_rng,
    shuffled,
    with_key_at,
)
from omni_model.evaluation.benchmark_conflict import conflict_items
from omni_model.evaluation.benchmark_item import GROUPS, Item
from omni_model.text.questions import LETTERS, Category, grammar

VOICE = "voice"  # the category by which two speakers are told apart
PLACES = ("first", "second")
PAIRED = ("prosody", "quality", "room")
# Who needs rare clips chooses first; the items stand in the order of GROUPS all the same.
CHOOSING = ("conflict", "room", "prosody", "quality", "speaker", "events", "words")


def write_items(recipe: BenchmarkRecipe, clips: Sequence[Clip]) -> list[Item]:
    """Balanced items of every group from test clips (see `held_out`); no clip more often than it must.

    Raises:
        BadInput: a group's size is no multiple of four, or the clips cannot fill a group evenly.
    """
    used: Counter[str] = Counter()
    made: dict[str, list[Item]] = {}
    for group in CHOOSING:
        size = getattr(recipe, group)
        if size % len(LETTERS):
            raise BadInput(
                f"benchmark.{group} is {size}; use a multiple of {len(LETTERS)}, so that keys balance"
            )
        if not size:
            made[group] = []
        elif group == "conflict":
            made[group] = conflict_items(size, clips, used, recipe.seed)
        elif group == "speaker":
            made[group] = _speaker_items(size, clips, used, recipe.seed)
        else:
            made[group] = _group_items(group, size, clips, used, recipe.seed)
    items = [item for group in GROUPS for item in made[group]]
    if not items:
        raise BadInput("every group of the benchmark has size 0; give at least one of them four questions")
    return items


def _group_items(group: str, size: int, clips: Sequence[Clip], used: Counter[str], seed: int) -> list[Item]:
    """Items of a group about one clip each, shared out evenly among its categories."""
    categories = _categories(group, clips)
    items: list[Item] = []
    for index, category in enumerate(categories):
        share = size // len(categories) + (index < size % len(categories))
        # Letters are dealt in turn through the whole group: exact there, and nearly so in each category.
        letters = letters_in_turn(len(items), share)
        items += _category_items(category, letters, clips, used, seed)
    return items


def _categories(group: str, clips: Sequence[Clip]) -> list[Category]:
    """The categories of a group of which test clips give four answers or more."""
    known = [category for category in grammar().categories.values() if category.group == group]
    answers = {category.name: answers_in(category, clips) for category in known}
    able = [category for category in known if len(answers[category.name]) >= len(LETTERS)]
    if not able:
        wanted = "; ".join(
            f"{category.name} ({', '.join(category.options)}), of which there is "
            f"{', '.join(answers[category.name]) or 'none'}"
            for category in known
        )
        raise BadInput(
            f"the benchmark's group {group} is empty: it needs test clips with {len(LETTERS)} different "
            f"answers of {wanted}; add such a corpus, or set benchmark.{group} to 0"
        )
    return able


def _category_items(
    category: Category, letters: list[int], clips: Sequence[Clip], used: Counter[str], seed: int
) -> list[Item]:
    """One item per letter."""
    group = category.group
    rng = named_rng(seed, f"{group}/{category.name}")
    units = choose_units(category, group, len(letters), clips, used, rng, paired=group in PAIRED)
    places = shuffled(letters, rng)
    answers, dealt = answers_in(category, clips), Counter[str]()
    items: list[Item] = []
    for unit in units:
        keys = [clip["labels"][category.name] for clip in unit]
        question = category.questions[int(rng.integers(len(category.questions)))]
        name = f"{group}-{category.name}-{len(items):02d}"
        for clip, key, wrong in zip(unit, keys, deal_wrong_options(keys, answers, dealt, rng), strict=True):
            letter = places[len(items)]
            items.append(
                Item(
                    id=f"{group}-{category.name}-{len(items):02d}",
                    group=group,
                    category=category.name,
                    clips=(clip["key"],),
                    question=question,
                    options=with_key_at(letter, key, wrong, rng),
                    answer=letter,
                    transcript=clip["transcript"],
                    licence=clip["licence"],
                    pair=name if len(unit) > 1 else "",
                )
            )
    return items


def _speaker_items(size: int, clips: Sequence[Clip], used: Counter[str], seed: int) -> list[Item]:
    """Who speaks in one of two clips: different people with different voices, both among the options.

    Every voice is the key, and the voice of the other clip, equally often, and so are the two places.
    """
    category = grammar().category(VOICE)
    rng = named_rng(seed, "speaker")
    spoken = [clip for clip in clips if VOICE in clip["labels"] and clip["speaker"]]
    voices = answers_in(category, spoken)
    if len(voices) < len(LETTERS) or len({clip["speaker"] for clip in spoken}) < len(PLACES):
        raise BadInput(
            f"the benchmark's group speaker is empty: it needs test clips of named speakers with "
            f"{len(LETTERS)} different voices of {', '.join(category.options)}, of which there is "
            f"{', '.join(voices) or 'none'}; add such a corpus, or set benchmark.speaker to 0"
        )
    places, dealt = shuffled(letters_in_turn(0, size), rng), Counter[str]()
    items = []
    for number in range(size):
        lap, turn = divmod(number, len(voices))
        key, other = voices[turn], voices[(turn + 1 + lap % (len(voices) - 1)) % len(voices)]
        asked = (turn + lap) % len(PLACES)
        about = least_used([c for c in spoken if c["labels"][VOICE] == key], used, rng)
        others = [c for c in spoken if c["labels"][VOICE] == other and c["speaker"] != about["speaker"]]
        beside = least_used(others, used, rng)
        heard = (about, beside) if asked == 0 else (beside, about)
        wording = category.comparison_questions[int(rng.integers(len(category.comparison_questions)))]
        (wrong,) = deal_wrong_options([key], voices, dealt, rng, always=[other])
        items.append(
            Item(
                id=f"speaker-{VOICE}-{number:02d}",
                group="speaker",
                category=VOICE,
                clips=tuple(clip["key"] for clip in heard),
                question=wording.format(place=PLACES[asked]),
                options=with_key_at(places[number], key, wrong, rng),
                answer=places[number],
                transcript=" / ".join(clip["transcript"] for clip in heard),
                licence=", ".join(dict.fromkeys(clip["licence"] for clip in heard)),
                asked=asked,
            )
        )
    return items
