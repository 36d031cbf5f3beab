"""The mix that teaches a listener, and the rows that are made of it."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_model.artifacts import (
    AudioCorpus,
    Conversations,
    Instructions,
    TextCorpus,
    TokenizerFiles,
    hash_payload,
)
from omni_model.audio.reader import FeatureReader
from omni_model.config import BadInput, InstructionsRecipe, TextRecipe, TokenizerRecipe
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.omni import OmniModel
from omni_model.model.projector import Projector
from omni_model.text.conversation import render, render_conversation, render_heard
from omni_model.text.embedded import write_corpus
from omni_model.text.questions import LETTERS, NOTHING, caption, grammar
from omni_model.text.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from omni_model.training.instructions import (
    Instruction,
    build_instructions,
    mix_instructions,
    read_instructions,
    shares,
)
from omni_model.training.listening import Classroom, batch_with_other_clips, look
from tests.test_stages import WIDTH, make, make_clips, write_clips, write_features

RECIPE = InstructionsRecipe(rows=400, validation_rows=90)


@pytest.fixture(scope="module")
def clips() -> dict[str, dict[str, Any]]:
    spoken = make_clips("speech", ("animal", "voice", "pace"), 24)
    tones = make_clips("tone", ("pitch", "loudness"), 16)
    silent = [
        {"key": f"silence-{n}", "split": split, "labels": {}, "transcript": ""}
        for n, split in enumerate(("train", "validation", "test"))
    ]
    return {clip["key"]: clip for clip in [*spoken, *tones, *silent]}


@pytest.fixture(scope="module")
def corpus(clips: dict[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> AudioCorpus:
    return write_clips(tmp_path_factory.mktemp("clips"), list(clips.values()))


@pytest.fixture(scope="module")
def mix(corpus: AudioCorpus, tmp_path_factory: pytest.TempPathFactory) -> Instructions:
    directory = tmp_path_factory.mktemp("mix")
    made = make(build_instructions, Instructions, RECIPE, corpus, directory=directory)
    assert isinstance(made, Instructions)
    return made


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    root = tmp_path_factory.mktemp("words")
    recipe = TextRecipe(num_documents=1200, validation_documents=100)
    text = make(write_corpus, TextCorpus, recipe, directory=root / "text")
    made = make(
        train_tokenizer, TokenizerFiles, TokenizerRecipe(vocab_size=400), text, directory=root / "tokenizer"
    )
    return load_tokenizer(made.out)


# --- the mix -------------------------------------------------------------------------------------


def test_kinds_have_their_shares_and_the_manifest_counts_them(mix: Instructions) -> None:
    rows = read_instructions(mix, "train")
    counts = Counter(row.kind for row in rows)
    assert len(rows) == 400
    assert counts == {kind: count for kind, count in shares(RECIPE, "train").items() if count}
    assert counts["choice"] == 232
    told = json.loads((Path(mix.uri) / "summary.json").read_text())
    assert {kind: told[f"rows_{kind}"] for kind in counts} == counts
    assert mix.num_rows == 490


def test_no_split_hears_another_and_none_the_test(mix: Instructions, clips: dict[str, Any]) -> None:
    for split in ("train", "validation"):
        heard = {key for row in read_instructions(mix, split) for key in row.clips}
        assert heard
        assert {clips[key]["split"] for key in heard} == {split}


def test_answers_are_true_of_what_is_heard(mix: Instructions, clips: dict[str, Any]) -> None:
    for row in read_instructions(mix, "train"):
        heard = [clips[key] for key in row.clips]
        question, answer = text_of(row), row.messages[-1]["content"]
        if row.kind == "caption":
            assert answer == caption(heard[0]["labels"], heard[0]["transcript"])
        if row.kind == "transcription":
            assert answer == heard[0]["transcript"]
        if row.kind == "question":
            assert answer in heard[0]["labels"].values()
        if answer in LETTERS:
            chosen = options_of(question)[LETTERS.index(answer)]
        if row.kind == "choice":
            assert chosen in heard[0]["labels"].values()
            assert len(set(options_of(question))) == 4
        if row.kind == "no_speech":
            said = heard[0]["labels"].get("animal")
            assert (chosen if answer in LETTERS else answer) == (said or NOTHING)
            assert answer not in LETTERS or NOTHING in options_of(question)
        if row.kind == "comparison":
            place = 0 if "first" in question else 1
            assert ("first" in question) != ("second" in question)
            assert chosen in heard[place]["labels"].values()
            assert chosen not in heard[1 - place]["labels"].values()
            assert set(options_of(question)) & set(heard[1 - place]["labels"].values())


def test_every_kind_is_what_it_says(mix: Instructions) -> None:
    rows: dict[str, list[Instruction]] = {}
    for row in read_instructions(mix, "train"):
        rows.setdefault(row.kind, []).append(row)
    assert all(len(row.messages) in (4, 6) for row in rows["multi_turn"])
    assert all(len(row.clips) == 2 for row in rows["comparison"])
    assert all(not row.clips for row in rows["replay"])
    assert all(row.messages[0]["content"][0]["type"] == "description" for row in rows["replay"])
    behind = [row.messages[0]["content"][-1]["type"] == "audio" for row in rows["choice"]]
    assert 0.02 < np.mean(behind) < 0.25
    letters = Counter(row.messages[-1]["content"] for row in rows["choice"])
    assert min(letters[letter] for letter in LETTERS) > 0.15 * len(rows["choice"])
    nothing = [row.messages[-1]["content"] == NOTHING for row in rows["no_speech"]]
    assert 0 < sum(nothing) < len(nothing)


def test_categories_are_asked_about_equally_often(mix: Instructions) -> None:
    asked = Counter(
        next(c.name for c in grammar().categories.values() if text_of(row).split("\n")[0] in c.questions)
        for row in read_instructions(mix, "train")
        if row.kind == "choice"
    )
    assert set(asked) == {"animal", "voice", "pace", "pitch", "loudness"}
    assert max(asked.values()) - min(asked.values()) <= 1


def test_the_mix_is_a_function_of_the_seed(corpus: AudioCorpus, mix: Instructions, tmp_path: Path) -> None:
    again = make(build_instructions, Instructions, RECIPE, corpus, directory=tmp_path)
    assert hash_payload(again.out) == hash_payload(mix.out)


def test_conversations_and_questions_of_others_are_mixed_in(
    clips: dict[str, Any], tmp_path: Path, write_conversations: Callable[[Path, int], Conversations]
) -> None:
    asked = {**clips["tone-000"], "exchanges": [["Is it near?", "yes"], ["Is it far?", "no"]]}
    others = [{**asked, "key": f"x-{split}", "split": split} for split in ("train", "validation")]
    corpus = write_clips(tmp_path / "clips", [*clips.values(), *others])
    recipe = InstructionsRecipe(rows=60, validation_rows=30, public=0.3, replay=0.3)
    said = write_conversations(tmp_path / "said", 40)
    mix = make(mix_instructions, Instructions, recipe, said, corpus, directory=tmp_path / "mix")
    for split in ("train", "validation"):
        rows = read_instructions(mix, split)
        replayed = {row.messages[0]["content"] for row in rows if row.kind == "replay"}
        numbers = {int(content.split()[-1]) for content in replayed}
        assert numbers
        assert {number % 20 == 0 for number in numbers} == {split == "validation"}
        public = {(text_of(row), row.messages[1]["content"]) for row in rows if row.kind == "public"}
        assert public == {("Is it near?", "yes"), ("Is it far?", "no")}


def test_a_kind_without_clips_is_refused_by_name(tmp_path: Path) -> None:
    corpus = write_clips(tmp_path / "clips", make_clips("tone", ("pitch",), 8))
    with pytest.raises(BadInput, match=r"transcription; set instructions.transcription to 0"):
        make(build_instructions, Instructions, RECIPE, corpus, directory=tmp_path / "mix")


def test_damage_is_named(mix: Instructions, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    content = (mix.out / "instructions.parquet").read_bytes()
    (tmp_path / "out" / "instructions.parquet").write_bytes(content[: len(content) // 2])
    damaged = Instructions("i", "k", str(tmp_path), "d", 1, 1)
    with pytest.raises(BadInput, match="instructions.parquet is missing or damaged"):
        read_instructions(damaged, "train")


# --- rendering -----------------------------------------------------------------------------------


def test_what_is_heard_stands_where_the_message_has_it(tokenizer: Tokenizer) -> None:
    clip, text = {"type": "audio", "clip": "a-1"}, {"type": "text", "text": "Which pitch is it?"}
    plain, mask = render(tokenizer, [("Which pitch is it?", "deep")])

    def rendered(*parts: Any) -> Any:
        return render_heard(
            tokenizer, [{"role": "user", "content": list(parts)}, {"role": "assistant", "content": "deep"}]
        )

    for parts in ((clip, text), (text, clip), (clip, clip, text)):
        ids, own_mask, heard = rendered(*parts)
        assert (ids, own_mask) == (plain, mask)
        assert [each.clip for each in heard] == ["a-1"] * (len(parts) - 1)
    assert rendered(clip, text)[2][0].place == 0
    end = plain.index(tokenizer.special("<|user_end|>"))
    assert rendered(text, clip)[2][0].place == end
    second = [
        {"role": "user", "content": "Which pitch is it?"},
        {"role": "assistant", "content": "deep"},
        {"role": "user", "content": [clip, text]},
    ]
    assert render_heard(tokenizer, second)[2][0].place == len(plain) + 1  # behind <|user_start|>
    with pytest.raises(BadInput, match="cannot hold sound"):
        render_conversation(tokenizer, second)
    with pytest.raises(BadInput, match="an audio with its clip"):
        rendered({"type": "audio"}, text)


# --- rows in training ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classroom(
    clips: dict[str, Any], mix: Instructions, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Classroom:
    features = write_features(tmp_path_factory.mktemp("features"), list(clips.values()))
    return Classroom(FeatureReader(features), mix, "train", tokenizer)


def test_a_pass_reads_every_row_once_and_steps_are_functions_of_their_number(classroom: Classroom) -> None:
    size, steps = 10, 40  # 400 rows, in five groups of eight batches
    rows = [row for step in range(steps) for row in classroom.training_rows(step, size, 3)]
    assert sorted(map(id, rows)) == sorted(map(id, classroom.rows))
    again = [row for step in range(steps, 2 * steps) for row in classroom.training_rows(step, size, 3)]
    assert sorted(map(id, again)) == sorted(map(id, classroom.rows))
    assert rows != again
    assert classroom.training_rows(17, size, 3) == rows[170:180]
    assert classroom.training_rows(17, size, 4) != rows[170:180]


def test_a_batch_scores_answers_alone_and_descriptions_take_the_place_of_clips(
    classroom: Classroom, clips: dict[str, Any], tokenizer: Tokenizer
) -> None:
    row = classroom.of_kind("question")[0]
    batch = classroom.batch([row])
    learned = batch.text.targets[0][batch.text.targets[0] >= 0].tolist()
    assert tokenizer.decode(learned) == f"{row.messages[1]['content']}<|assistant_end|>"
    described = classroom.batch([row], classroom.describe)
    assert described.sounds is None
    assert described.descriptions is not None
    clip = clips[row.clips[0]]
    told = tokenizer.decode(described.descriptions.ids[0].tolist())
    assert told == " " + caption(clip["labels"], clip["transcript"])
    assert torch.equal(described.text.ids, batch.text.ids)
    turns = classroom.of_kind("multi_turn")[0]
    ids = classroom.batch([turns]).text
    ends = (ids.targets[0] == tokenizer.special("<|assistant_end|>")).sum()
    assert ends == len(turns.messages) // 2


def test_the_gap_is_zero_for_the_deaf_and_open_for_who_listens(classroom: Classroom) -> None:
    config = GPTConfig(sequence_len=64, vocab_size=400, n_layer=2, n_head=2, n_kv_head=2, n_embd=32)
    model = OmniModel(GPT(config), Projector(WIDTH, 32, 4, 16))
    rows = classroom.of_kind("question", "choice")[:40]
    assert look(model, classroom, rows).gap == 0  # untrained: no sound reaches the text
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        classroom.batch(rows).loss(model).backward()
        optimizer.step()
        optimizer.zero_grad()
    truth = look(model, classroom, rows)
    assert truth.gap > 0.3
    assert truth.first_token_accuracy > 0.5
    batch = classroom.batch(rows[:3])
    assert batch.sounds is not None
    other = batch_with_other_clips(batch).sounds
    assert other is not None
    assert torch.equal(other.lengths, batch.sounds.lengths.roll(1))


def test_rows_about_clips_without_features_are_refused(
    mix: Instructions, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    features = write_features(tmp_path, make_clips("tone", ("pitch", "loudness"), 16))
    with pytest.raises(BadInput, match=r"clips that have no features, such as s"):
        Classroom(FeatureReader(features), mix, "train", tokenizer)


# --- helpers -------------------------------------------------------------------------------------


@pytest.fixture
def write_conversations() -> Callable[[Path, int], Conversations]:
    def write(directory: Path, count: int) -> Conversations:
        import pyarrow
        import pyarrow.parquet

        (directory / "out").mkdir(parents=True)
        rows = [
            json.dumps(
                [
                    {"role": "user", "content": f"number {n}"},
                    {"role": "assistant", "content": "yes"},
                ]
            )
            for n in range(count)
        ]
        table = pyarrow.table({"messages": rows, "source": ["made"] * count})
        pyarrow.parquet.write_table(table, directory / "out" / "conversations.parquet")
        return Conversations("c", "k", str(directory), "d", count)

    return write


def text_of(row: Instruction) -> str:
    content = row.messages[-2]["content"]
    if isinstance(content, str):
        return content
    return next(str(part["text"]) for part in content if part["type"] == "text")


def options_of(question: str) -> list[str]:
    return [option[2:] for option in question.rpartition("\n")[2].split(" ; ")]
