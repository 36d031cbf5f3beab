"""Text room: tokenizers, conversations, the grammar, the corpus, packing."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from omni_model.artifacts import TextCorpus
from omni_model.config import BadInput, Runtime, TextRecipe, TokenizerRecipe
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.text.conversation import render, render_prompt
from omni_model.text.corpus import write_shard
from omni_model.text.embedded import write_corpus
from omni_model.text.lessons import (
    LESSONS,
    choice_question,
    exam,
    letter_drill,
    plain_text,
    random_sound,
    read_documents,
    word_question,
)
from omni_model.text.packing import pack, tokenize_document
from omni_model.text.questions import LETTERS, caption, grammar, list_options, multiple_choice, pick_options
from omni_model.text.tokenizer import (
    SPECIAL_TOKENS,
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    train_bpe,
    train_tokenizer,
)

RECIPE = TextRecipe(num_documents=1500, validation_documents=100)
TEXTS = [
    "A woman says seven red cat at a slow pace.",
    "Grüße, 12345 Äpfel!\n\n  Zwei Zeilen.",
    "猫が三匹います。",
    "Ça coûte 3,50 € — d'accord ?",
    "\t\U0001f431 \x00 end",
    "",
]


def workspace(directory: Path, seed: int = 1) -> Workspace:
    (directory / "out").mkdir(parents=True)
    (directory / "partial").mkdir()
    return Workspace(directory, seed, Metrics(directory / "metrics.jsonl"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TextCorpus:
    directory = tmp_path_factory.mktemp("text")
    facts = write_corpus(RECIPE, work=workspace(directory / "c"), runtime=Runtime())
    return TextCorpus("text", "k", str(directory / "c"), "d", **facts)


@pytest.fixture(scope="module")
def bpe(corpus: TextCorpus, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    work = workspace(tmp_path_factory.mktemp("tokenizer") / "t")
    assert train_tokenizer(TokenizerRecipe(), corpus, work=work, runtime=Runtime()) == {"vocab_size": 544}
    return load_tokenizer(work.out)


@pytest.fixture(params=["bpe", "bytes"])
def tokenizer(request: pytest.FixtureRequest, bpe: Tokenizer) -> Tokenizer:
    return bpe if request.param == "bpe" else ByteTokenizer()


# --- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("text", TEXTS)
def test_decode_undoes_encode(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_plain_text_never_gives_a_special_token(tokenizer: Tokenizer, name: str) -> None:
    ids = tokenizer.encode(f"before {name} after")
    assert not {tokenizer.special(each) for each in SPECIAL_TOKENS} & set(ids)
    assert tokenizer.decode(ids) == f"before {name} after"
    assert tokenizer.decode([tokenizer.special(name)]) == name


def test_specials_follow_the_merges_in_order(bpe: Tokenizer) -> None:
    first = bpe.vocab_size - len(SPECIAL_TOKENS)
    assert [bpe.special(name) for name in SPECIAL_TOKENS] == list(range(first, bpe.vocab_size))
    assert bpe.bos_id == first


def test_bytes_need_257_ids() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.bos_id) == (257, 256)
    assert tokenizer.decode([0xC3, 256]) == "\ufffd<|bos|>"
    with pytest.raises(BadInput, match="not a special token"):
        tokenizer.special("<|nobody|>")


def test_digits_split_in_pairs(bpe: Tokenizer) -> None:
    model = train_bpe(["1234 1234 1234"] * 9, 330)
    assert [model.decode([i]) for i in model.encode("1234").ids] == ["12", "34"]


def test_training_twice_gives_the_same_bytes(corpus: TextCorpus, tmp_path: Path) -> None:
    payloads = []
    for name in ("first", "second"):
        work = workspace(tmp_path / name)
        train_tokenizer(TokenizerRecipe(), corpus, work=work, runtime=Runtime())
        payloads.append((work.out / "tokenizer.json").read_bytes())
    assert payloads[0] == payloads[1]


def test_every_label_is_one_token(bpe: Tokenizer) -> None:
    embedded = [category for category in grammar().categories.values() if category.embedded]
    options = {option for category in embedded for option in category.options}
    assert [option for option in sorted(options) if len(bpe.encode(f" {option}")) > 1] == []
    assert all(len(bpe.encode(letter)) == 1 for letter in LETTERS)


def test_bad_tokenizers_are_refused(corpus: TextCorpus, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(BadInput, match="cannot be read"):
        load_tokenizer(tmp_path)
    with pytest.raises(BadInput, match="vocab_size"):
        train_bpe(["a"], 100)


# --- conversations -------------------------------------------------------------------------------


def test_the_mask_covers_answers_and_their_end(tokenizer: Tokenizer) -> None:
    ids, mask = render(tokenizer, [("Who?", "A man"), ("And?", "B")])
    said = tokenizer.decode([i for i, learned in zip(ids, mask, strict=True) if learned])
    assert said == "A man<|assistant_end|>B<|assistant_end|>"
    assert tokenizer.decode(ids).startswith(
        "<|bos|><|user_start|>Who?<|user_end|><|assistant_start|>A man<|assistant_end|><|user_start|>And?"
    )


def test_a_prompt_is_the_row_up_to_the_answer(tokenizer: Tokenizer) -> None:
    ids, mask = render(tokenizer, [("Who?", "A man"), ("And?", "B")])
    prompt = render_prompt(tokenizer, "And?", [("Who?", "A man")])
    assert prompt == ids[: len(prompt)]
    assert mask[len(prompt) :] == [1, 1]
    assert tokenizer.decode(prompt[-1:]) == "<|assistant_start|>"


# --- grammar -------------------------------------------------------------------------------------


def test_the_vocabulary_is_complete() -> None:
    groups: dict[str, list[str]] = {}
    for category in grammar().categories.values():
        groups.setdefault(category.group, []).append(category.name)
        assert len(set(category.options)) == len(category.options) >= len(LETTERS)
        assert len(category.questions) >= 3
        assert all(option.isalpha() and option.islower() for option in category.options)
    assert {group: sorted(names) for group, names in groups.items()} == {
        "words": ["animal", "colour", "number"],
        "prosody": ["emotion", "pace"],
        "quality": ["voice"],
        "room": ["noise", "recording"],
        "events": ["background", "beeps", "contour", "event", "loudness", "pitch", "tremolo"],
    }


def test_multiple_choice_has_the_exact_form() -> None:
    asked = multiple_choice("Which colour is said?", ["red", "blue", "green", "black"])
    assert asked == "Which colour is said?\nA red ; B blue ; C green ; D black"
    with pytest.raises(BadInput, match="4 options"):
        list_options(["red"])


@pytest.mark.parametrize("name", list(grammar().categories))
def test_a_caption_names_every_label(name: str) -> None:
    for option in grammar().categories[name].options:
        for others in ({}, {"loudness": "soft"}, {"noise": "pink"}, {"voice": "man", "pace": "calm"}):
            labels = {**others, name: option}
            sentence = caption(labels, "")
            assert all(f" {value}" in f" {sentence.lower()}" for value in labels.values()), sentence
            assert sentence[0].isupper()
            assert sentence.endswith(".")


def test_captions_read_like_english() -> None:
    labels = {"number": "seven", "colour": "red", "animal": "cat", "voice": "woman", "pace": "slow"}
    assert caption(labels, "seven red cats") == "A woman says seven red cats at a slow pace."
    assert caption({"beeps": "one", "pitch": "high"}, "") == "There is one high beep."
    assert caption({"beeps": "four", "loudness": "soft"}, "") == "There are four soft beeps."
    assert caption({"noise": "crackle"}, "") == "There is crackle."
    assert (
        caption({"pitch": "low", "contour": "rising", "noise": "pink"}, "")
        == "A low rising tone over pink noise."
    )
    with pytest.raises(BadInput, match="grammar"):
        caption({"colour": "mauve"}, "")
    with pytest.raises(BadInput, match="not a category"):
        caption({"taste": "sweet"}, "")


def test_options_hold_the_answer_once_and_balance_its_place() -> None:
    places = Counter()
    for seed in range(800):
        options = pick_options("colour", "red", np.random.default_rng(seed))
        assert len(set(options)) == len(LETTERS)
        places[options.index("red")] += 1
    assert all(150 < places[place] < 250 for place in range(4)), places
    with pytest.raises(BadInput, match="mauve"):
        pick_options("colour", "mauve", np.random.default_rng(0))


# --- corpus --------------------------------------------------------------------------------------


def test_the_corpus_repeats_and_depends_on_the_seed(corpus: TextCorpus, tmp_path: Path) -> None:
    again, other = workspace(tmp_path / "again"), workspace(tmp_path / "other", seed=2)
    for work in (again, other):
        write_corpus(RECIPE, work=work, runtime=Runtime())
    for name in ("train-00000.parquet", "validation-00000.parquet"):
        first = (corpus.out / name).read_bytes()
        assert (again.out / name).read_bytes() == first
        assert (other.out / name).read_bytes() != first


def test_every_lesson_has_documents_and_letters_are_balanced(corpus: TextCorpus) -> None:
    documents = read_documents(corpus.out)
    lessons = Counter(document["lesson"] for document in documents)
    assert set(lessons) == set(LESSONS)
    for make in (word_question, choice_question):
        letters = Counter(make(np.random.default_rng([3, i]))["answer"] for i in range(800))
        assert all(150 < letters[letter] < 250 for letter in LETTERS), letters


def test_answers_are_right() -> None:
    for index in range(200):
        rng = np.random.default_rng([4, index])
        drill = letter_drill(rng)
        assert all(f"{letter} {word}" in drill["options"] for word, letter in drill["pairs"])
        for asked in (word_question(rng), choice_question(rng)):
            options = dict(option.split() for option in asked["question"].split("\n")[1].split(" ; "))
            heard = asked["sound"].lower().rstrip(".").split()
            assert [letter for letter, word in options.items() if word in heard] == [asked["answer"]]


def test_exams_do_not_depend_on_their_length() -> None:
    assert exam("questions", 5, 7) == exam("questions", 9, 7)[:5]
    assert exam("questions", 5, 7) != exam("questions", 5, 8)


def test_sounds_are_speech_or_texture() -> None:
    for index in range(100):
        labels, transcript = random_sound(np.random.default_rng([5, index]))
        assert ("voice" in labels) == bool(transcript)
        assert not transcript or not {"pitch", "contour", "beeps"} & set(labels)
        assert labels.get("recording") != "noisy" or "noise" in labels


def test_a_broken_corpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="holds no train"):
        read_documents(tmp_path)
    path = tmp_path / "train-00000.parquet"
    write_shard(path, {"text": ["x"]})
    with pytest.raises(BadInput, match="no column 'lesson'"):
        read_documents(tmp_path)
    write_shard(path, {"text": ["x", "y"], "lesson": [None, json.dumps({"lesson": "letters", "word": "x"})]})
    with pytest.raises(BadInput, match="document 1;"):
        read_documents(tmp_path)


# --- packing -------------------------------------------------------------------------------------


def documents_of(*lengths: int) -> list[tuple[list[int], list[int]]]:
    """Documents whose ids tell which they are: the third of length 2 is [300, 301]."""
    return [
        ([100 * (n + 1) + i for i in range(length)], [i % 2 for i in range(length)])
        for n, length in enumerate(lengths)
    ]


def test_packing_takes_the_largest_that_fits_and_the_first_of_equals() -> None:
    ids, masks = pack(documents_of(3, 5, 5, 2), 10)
    assert ids.tolist() == [[200, 201, 202, 203, 204, 300, 301, 302, 303, 304]]
    assert masks.tolist() == [[0, 1, 0, 1, 0, 0, 1, 0, 1, 0]]
    ids, _ = pack(documents_of(2, 4, 2, 2), 8)
    assert ids.tolist() == [[200, 201, 202, 203, 100, 101, 300, 301]]


def test_packing_crops_the_shortest_when_none_fits() -> None:
    ids, _ = pack(documents_of(7, 6, 4, 4), 10)
    assert ids.tolist()[0] == [100, 101, 102, 103, 104, 105, 106, 300, 301, 302]
    assert ids.tolist()[1] == [200, 201, 202, 203, 204, 205, 400, 401, 402, 403]
    with pytest.raises(BadInput, match="num_documents"):
        pack(documents_of(3), 10)


def test_documents_learn_letters_or_everything(tokenizer: Tokenizer) -> None:
    drill = {"lesson": "letters", "options": "A red ; B cat", "pairs": [["cat", "B"], ["red", "A"]]}
    ids, mask = tokenize_document(tokenizer, drill)
    learned = tokenizer.decode([i for i, taught in zip(ids, mask, strict=True) if taught])
    assert learned == " B A"
    assert tokenizer.decode(ids) == "<|bos|>" + plain_text(drill).replace("\n", "\n ")
    ids, mask = tokenize_document(tokenizer, {"lesson": "sentences", "text": "Hi."})
    assert tokenizer.decode(ids) == "<|bos|>Hi."
    assert set(mask) == {1}
    with pytest.raises(BadInput, match="packed"):
        tokenize_document(tokenizer, {"sound": "a", "question": "b", "answer": "c"})
