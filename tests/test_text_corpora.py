"""Text corpora: the embedded one, ClimbMix from mirrors that go wrong, folders of anybody's texts."""

import hashlib
import json
import math
import re
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from omni_model.artifacts import Manifest, TextCorpus, hash_payload
from omni_model.config import (
    BadInput,
    ClimbMixRecipe,
    OutsideFolder,
    Runtime,
    TextFolderRecipe,
    TextRecipe,
    TokenizerRecipe,
)
from omni_model.outside import digest_folder
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from omni_model.text import climbmix, embedded, stories
from omni_model.text import folder as folder_module
from omni_model.text.climbmix import DATASET, LOCK, fetch_climbmix
from omni_model.text.corpus import (
    BadShard,
    check_shard,
    group_sizes,
    read_column,
    read_group,
    read_texts,
    shard_paths,
    write_shard,
)
from omni_model.text.embedded import write_corpus
from omni_model.text.folder import MAX_TXT_CHARS, import_text
from omni_model.text.lessons import plain_text, read_documents
from omni_model.text.nanochat_tokenizer import ranks_of, tokenizer_json
from omni_model.text.stories import (
    pick_story_options,
    random_story,
    story_categories,
    story_options,
    story_question,
)
from omni_model.text.tokenizer import ByteTokenizer, load_tokenizer, token_bytes, train_tokenizer
from tests.loopback import FileServer, dead_url, stay_at_home

COMPONENTS = {"stage": "fetch_climbmix", "code": "c", "packages": {}, "seed": 1}


def workspace(directory: Path, seed: int = 1) -> Workspace:
    (directory / "out").mkdir(parents=True, exist_ok=True)
    (directory / "partial").mkdir(exist_ok=True)
    return Workspace(directory, seed, Metrics(directory / "metrics.jsonl"), COMPONENTS)


def payload(work: Workspace) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in work.out.iterdir()}


def words_of(text: str) -> set[str]:
    return set("".join(c if c.isalpha() else " " for c in text.lower()).split())


# --- stories -------------------------------------------------------------------------------------


def test_a_story_tells_each_of_its_facts_in_one_word_and_none_twice() -> None:
    seen: Counter[str] = Counter()
    for index in range(2000):
        story = random_story(np.random.default_rng([1, index]))
        assert 2 <= len(story.text.replace("!\u201d", "").split(". ")) <= 5, story.text
        assert set(story.facts.values()) <= words_of(story.text), story
        assert len(set(story.facts.values())) == len(story.facts)
        assert all(answer in story_options(category) for category, answer in story.facts.items())
        assert not set("{}[]|") & set(story.text)
        seen.update(story.facts.keys())
    assert set(seen) == set(story_categories())
    assert min(seen.values()) > 200


def test_a_story_names_no_answer_of_a_category_but_its_own() -> None:
    """Else a question would have two right answers."""
    shared = {"count", "times", "number"}  # all numbers; the questions tell them apart
    for index in range(500):
        story = random_story(np.random.default_rng([2, index]))
        for category in set(story.facts) - shared:
            found = words_of(story.text) & set(story_options(category))
            assert found == {story.facts[category]}, story


def test_stories_have_hundreds_of_sentence_shapes_and_repeat_with_the_seed() -> None:
    sentences = json.loads(Path(stories.__file__).with_name("stories.json").read_text())["sentences"]
    alternatives = [re.findall(r"\[(.*?)\]", each) for kind in sentences.values() for each in kind]
    assert sum(math.prod(len(one.split("|")) for one in each) for each in alternatives) > 200
    told = [random_story(np.random.default_rng(index)).text for index in range(1000)]
    assert len(set(told)) > 990
    assert random_story(np.random.default_rng(7)) == random_story(np.random.default_rng(7))


def test_stories_can_be_asked_about() -> None:
    rng = np.random.default_rng(0)
    for category in story_categories():
        options = story_options(category)
        assert len(set(options)) == len(options) >= 6
        assert all(option.isalpha() and option.islower() for option in options)
        assert story_question(category, rng)[-1] in "?."
        picked = pick_story_options(category, options[0], rng)
        assert options[0] in picked
        assert len(set(picked)) == 4
    with pytest.raises(BadInput, match="not a category"):
        story_options("taste")
    with pytest.raises(BadInput, match="not an answer"):
        pick_story_options("place", "moon", rng)


# --- the embedded corpus -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TextCorpus:
    directory = tmp_path_factory.mktemp("tiny")
    recipe = TextRecipe(num_documents=1500, validation_documents=200, stories_share=0.4, questions_share=0.1)
    facts = write_corpus(recipe, work=workspace(directory), runtime=Runtime())
    return TextCorpus("text", "k", str(directory), "d", **facts)


def test_a_document_is_a_lesson_in_plain_words_or_a_story(tiny: TextCorpus) -> None:
    texts, lessons = (list(read_texts(tiny.out, "train", column)) for column in ("text", "lesson"))
    assert len(texts) == len(lessons) == 1500
    assert tiny.num_documents == 1700
    assert tiny.num_bytes == sum(path.stat().st_size for path in tiny.out.iterdir())
    for text, lesson in zip(texts, lessons, strict=True):
        assert not lesson or text == plain_text(json.loads(lesson))
    assert read_documents(tiny.out) == [json.loads(lesson) for lesson in lessons if lesson]
    assert 500 < sum(not lesson for lesson in lessons) < 700
    assert sum(text.count("\n") == 2 and not lesson for text, lesson in zip(texts, lessons, strict=True)) > 50


def test_plain_texts_read_naturally() -> None:
    drill = {"lesson": "letters", "options": "A red ; B cat", "pairs": [["cat", "B"], ["red", "A"]]}
    assert plain_text(drill) == "A red ; B cat\ncat B red A"
    asked = {"lesson": "words", "sound": "red cat", "question": "Which?\nA red ; B blue", "answer": "A"}
    assert plain_text(asked) == "red cat\nWhich?\nA red ; B blue\nA"
    assert plain_text({"lesson": "sentences", "text": "A tone."}) == "A tone."


def test_document_i_depends_on_seed_split_and_i_alone(
    tiny: TextCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = TextRecipe(num_documents=600, validation_documents=600, stories_share=0.4, questions_share=0.1)
    monkeypatch.setattr(embedded, "SHARD_DOCUMENTS", 250)
    again, other = workspace(tmp_path / "again"), workspace(tmp_path / "other", seed=2)
    for work in (again, other):
        write_corpus(recipe, work=work, runtime=Runtime())
    assert [path.name for path in shard_paths(again.out, "train")] == [
        f"train-{n:05d}.parquet" for n in range(3)
    ]
    assert list(read_texts(again.out, "train")) == list(read_texts(tiny.out, "train"))[:600]
    assert list(read_texts(again.out, "validation"))[:200] == list(read_texts(tiny.out, "validation"))
    assert list(read_texts(other.out, "train")) != list(read_texts(again.out, "train"))
    assert list(read_texts(again.out, "train")) != list(read_texts(again.out, "validation"))


def test_shares_above_one_are_refused(tmp_path: Path) -> None:
    recipe = TextRecipe(letters_share=0.6, words_share=0.6)
    with pytest.raises(BadInput, match="sum to 1"):
        write_corpus(recipe, work=workspace(tmp_path), runtime=Runtime())


# --- tokenizers ----------------------------------------------------------------------------------


def write_texts(directory: Path, train: list[list[str]], validation: list[str]) -> TextCorpus:
    work = workspace(directory)
    for number, texts in enumerate(train):
        write_shard(work.out / f"train-{number:05d}.parquet", {"text": texts})
    write_shard(work.out / "validation-00000.parquet", {"text": validation})
    return TextCorpus("text", "k", str(directory), "d", sum(map(len, train)), 1000)


MANY_TONGUES = [
    "猫が三匹います。猫が",
    "Grüße, Äpfel! Grüße",
    "\U0001f431\U0001f42f\U0001f431",
    "the cat the dog",
]


def test_bytes_of_tokens_are_those_that_tiktoken_spells(tmp_path: Path) -> None:
    import tiktoken

    text = write_texts(tmp_path / "text", [MANY_TONGUES * 20], MANY_TONGUES)
    work = workspace(tmp_path / "tokenizer")
    train_tokenizer(TokenizerRecipe(vocab_size=340), text, work=work, runtime=Runtime())
    tokenizer, ranks = load_tokenizer(work.out), ranks_of(work.out)
    theirs = tiktoken.Encoding("t", pat_str=r"\S+", mergeable_ranks=ranks, special_tokens={})
    counts = token_bytes(tokenizer)
    spelled = [theirs.decode_single_token_bytes(id) for id in range(len(ranks))]
    assert counts == [*map(len, spelled), *[0] * 9]
    assert any(len(each) > 1 and b"\xff" not in each and not _is_utf8(each) for each in spelled)
    for sample in MANY_TONGUES:
        assert sum(counts[id] for id in tokenizer.encode(sample)) == len(sample.encode())
    imported = workspace(tmp_path / "imported")
    (imported.out / "tokenizer.json").write_text(json.dumps(tokenizer_json(ranks)))
    assert token_bytes(load_tokenizer(imported.out)) == counts
    own = ByteTokenizer()
    assert token_bytes(own) == [1] * 0xF8 + [0] * 9
    for each in (tokenizer, own):
        assert each.encode_batch(MANY_TONGUES) == [each.encode(sample) for sample in MANY_TONGUES]


def _is_utf8(spelled: bytes) -> bool:
    try:
        return bool(spelled.decode())
    except UnicodeDecodeError:
        return False


def test_a_tokenizer_reads_no_more_than_it_is_allowed(tmp_path: Path) -> None:
    starts = ["hello hello " * 10 + "zz" * 500] * 50
    text = write_texts(tmp_path / "text", [starts, ["never read"]], ["hello hello"])
    second = text.out / "train-00001.parquet"
    second.write_bytes(second.read_bytes()[:4] + b"\xff" * 20 + second.read_bytes()[24:])  # it cannot be
    recipe = TokenizerRecipe(vocab_size=300, max_chars=50 * 120, max_document_chars=120)
    work = workspace(tmp_path / "tokenizer")
    train_tokenizer(recipe, text, work=work, runtime=Runtime())
    vocab = json.loads((work.out / "tokenizer.json").read_text())["model"]["vocab"]
    assert "hello" in vocab
    assert "zz" not in vocab
    assert work.metrics.summaries["bytes_per_token"] == 5.5  # hello, and hello with its space
    with pytest.raises(BadInput, match="00001.parquet cannot be used"):
        train_tokenizer(TokenizerRecipe(vocab_size=300), text, work=work, runtime=Runtime())


# --- parquet -------------------------------------------------------------------------------------


def parquet(**columns: Any) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=3)
    return bytes(sink.getvalue())


NOT_UTF8 = pyarrow.Array.from_buffers(
    pyarrow.string(), 1, [None, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe")]
)
WHOLE = parquet(text=["one", "two", None, "four"], n=[1, 2, 3, 4])
BAD_PARQUET = {
    "half": (WHOLE[: len(WHOLE) // 2], "not a whole parquet file"),
    "nothing": (b"", "not a whole parquet file"),
    "damaged inside": (WHOLE[:8] + b"\xff" * 20 + WHOLE[28:], "not a whole parquet file"),
    "no column": (parquet(words=["a"]), "no column 'text', only words"),
    "numbers": (parquet(text=[1, 2]), "'text' is of type int64"),
    "not utf-8": (parquet(text=NOT_UTF8), "UTF"),
}


@pytest.mark.parametrize("name", BAD_PARQUET)
def test_a_parquet_file_that_cannot_be_used_is_named(name: str, tmp_path: Path) -> None:
    content, reason = BAD_PARQUET[name]
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    for read in (lambda: check_shard(path), lambda: list(read_column(path, "text"))):
        with pytest.raises(BadShard, match=reason) as raised:
            read()
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_parquet_is_read_group_by_group(tmp_path: Path) -> None:
    path = tmp_path / "train-00000.parquet"
    path.write_bytes(WHOLE)
    assert check_shard(path) == 4
    assert group_sizes(path) == [3, 1]
    assert read_group(path, 0) == ["one", "two", ""]
    assert (
        list(read_column(path, "text")) == list(read_texts(tmp_path, "train")) == ["one", "two", "", "four"]
    )
    with pytest.raises(BadInput, match=r"no validation-\*"):
        shard_paths(tmp_path, "validation")


# --- ClimbMix ------------------------------------------------------------------------------------


class Hub(FileServer):
    """A Hugging Face server. `told` is what it says of a file's sha256; "" for nothing, absent: the truth."""

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        super().__init__()

    def put(self, number: int, content: bytes) -> str:
        path = f"/datasets/{DATASET}/resolve/main/shard_{number:05d}.parquet"
        self.files[path] = content
        return path

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(super()._handler()):  # type: ignore[misc]
            def do_HEAD(self) -> None:
                content = hub.files.get(self.path)
                sha256 = hub.told.get(self.path, hashlib.sha256(content or b"").hexdigest())
                self.send_response(404 if content is None else 302)
                if content is not None and sha256:
                    self.send_header("X-Linked-Etag", f'"{sha256}"')
                    self.send_header("X-Linked-Size", str(len(content)))
                self.send_header("Location", "http://storage.invalid/x")
                self.end_headers()

        return Handler


def shard(number: int) -> bytes:
    return parquet(text=[f"document {i} of shard {number} " * 40 for i in range(7)])


SHARDS = {number: shard(number) for number in (0, 1, 2, 6542)}


@pytest.fixture
def hubs(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Hub, Hub]]:
    """Two servers with four shards each."""
    stay_at_home(monkeypatch)
    found = Hub(), Hub()
    for hub in found:
        for number, content in SHARDS.items():
            hub.put(number, content)
    for name in ("OMNI_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", found[0].url)
    monkeypatch.setenv("HF_MIRRORS", found[1].url)
    monkeypatch.setattr(climbmix, "RETRIES", 0)
    monkeypatch.setattr(climbmix, "PAUSE_S", 0.0)
    yield found
    for hub in found:
        hub.close()


def fetched(directory: Path, num_shards: int = 2) -> Workspace:
    work = workspace(directory)
    facts = fetch_climbmix(ClimbMixRecipe(num_shards=num_shards), work=work, runtime=Runtime())
    names = [f"train-{n:05d}.parquet" for n in range(num_shards)]
    numbers = [*range(num_shards), 6542]
    expected = {n: SHARDS[i] for n, i in zip([*names, "validation-00000.parquet"], numbers, strict=True)}
    assert payload(work) == expected
    assert facts == {"num_documents": 7 * (num_shards + 1), "num_bytes": sum(map(len, expected.values()))}
    return work


def seal(work: Workspace) -> None:
    facts, empty = {"num_documents": 21, "num_bytes": 1}, ({}, {}, {})
    Manifest("fetch_climbmix", "k", "TextCorpus", COMPONENTS, hash_payload(work.out), facts, *empty).write(
        work.directory
    )


def test_shards_come_from_the_first_server_and_are_pinned(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    fetched(tmp_path / "stage" / "a")
    assert hubs[1].requests == []
    pins = json.loads((tmp_path / "stage" / LOCK).read_text())
    assert pins == {f"shard_{n:05d}.parquet": hashlib.sha256(SHARDS[n]).hexdigest() for n in (0, 1, 6542)}


FAULTS = [(fault, tells) for fault in ("page", "page as data", 404, 503) for tells in (True, False)]
# Without a digest nothing can tell another good shard from the right one.
FAULTS += [("half", True), ("half", False), ("other column", True), ("other column", False), ("wrong", True)]


@pytest.mark.parametrize(("fault", "tells"), FAULTS)
def test_a_mirror_that_goes_wrong_is_left_for_the_next(
    fault: Any, tells: bool, hubs: tuple[Hub, Hub], tmp_path: Path
) -> None:
    path = hubs[0].put(1, SHARDS[1])
    contents = {"half": SHARDS[1][:500], "wrong": SHARDS[2], "other column": parquet(words=["a"])}
    if fault in contents:
        hubs[0].files[path] = contents[fault]
        hubs[0].told[path] = hashlib.sha256(SHARDS[1]).hexdigest() if tells else ""
    else:
        hubs[0].faults[path] = [fault] * 9
        hubs[0].told[path] = hashlib.sha256(SHARDS[1]).hexdigest() if tells else ""
    fetched(tmp_path / "stage" / "a")
    assert path in hubs[1].paths()


def test_where_none_is_left_the_sentence_names_each_and_the_next_run_goes_on(
    hubs: tuple[Hub, Hub], tmp_path: Path
) -> None:
    path = hubs[0].put(1, SHARDS[1])
    hubs[0].faults[path], hubs[1].faults[path] = ["page"], ["cut", 404]
    with pytest.raises(BadInput) as raised:
        fetched(tmp_path / "stage" / "a")
    told = str(raised.value)
    assert "shard_00001.parquet" in told
    assert f"{hubs[0].url}{path} (a web page came instead of the file)" in told
    assert f"{hubs[1].url}{path} (HTTP 404)" in told
    before = [len(hub.requests) for hub in hubs]
    fetched(tmp_path / "stage" / "a")
    asked = [each for hub, n in zip(hubs, before, strict=True) for each in hub.requests[n:]]
    assert [each for each in asked if each[0] == path and each[1].startswith("bytes=")]  # only the rest
    finished = [
        p for p in ("shard_00000", "shard_06542") if (tmp_path / "stage" / LOCK).read_text().count(p) == 1
    ]
    assert finished


def test_a_dead_server_is_asked_last(
    hubs: tuple[Hub, Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", dead_url())
    monkeypatch.setattr(climbmix, "CONNECTIONS", 1)
    asked: list[str] = []
    monkeypatch.setattr(climbmix, "ask", lambda url: asked.append(url) or climbmix.Told())
    fetched(tmp_path / "stage" / "a", 3)
    dead = [url for url in asked if not url.startswith((hubs[0].url, hubs[1].url))]
    assert len(dead) == 1
    assert len(asked) == 5


def test_another_file_under_a_pinned_name_is_refused(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    fetched(tmp_path / "stage" / "a")
    for hub in hubs:
        hub.put(0, SHARDS[2])
    with pytest.raises(BadInput, match=rf"its sha256 is .*{LOCK} pins it"):
        fetched(tmp_path / "stage" / "b")
    hubs[1].put(0, SHARDS[0])
    fetched(tmp_path / "stage" / "b")
    (tmp_path / "stage" / LOCK).write_text("[")
    with pytest.raises(BadInput, match="delete it"):
        fetched(tmp_path / "stage" / "c")


def test_more_shards_take_those_of_an_earlier_artifact(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    first = fetched(tmp_path / "stage" / "a")
    seal(first)
    for hub in hubs:
        hub.requests.clear()
    fetched(tmp_path / "stage" / "b", 3)
    assert [path[-13:] for hub in hubs for path in hub.paths()] == ["00002.parquet"]
    (first.out / "train-00000.parquet").write_bytes(b"damaged")  # the copies are their own files
    assert payload(workspace(tmp_path / "stage" / "b"))["train-00000.parquet"] == SHARDS[0]
    fetched(tmp_path / "stage" / "c", 2)  # what is damaged is fetched


def test_killed_after_any_shard_it_goes_on(hubs: tuple[Hub, Hub], tmp_path: Path) -> None:
    work = workspace(tmp_path / "stage" / "a")
    (work.partial / "train-00000.parquet").write_bytes(SHARDS[0])  # whole, and not yet pinned
    (work.partial / "train-00001.parquet").write_bytes(SHARDS[1][:100])
    (work.partial / "validation-00000.parquet.part").write_bytes(SHARDS[6542][:100])
    fetched(work.directory)
    assert "00000.parquet" not in " ".join(hubs[0].paths())
    assert ("bytes=100-") in [sent for _, sent in hubs[0].requests]


def test_offline_and_impossible_counts_are_refused(
    hubs: tuple[Hub, Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (0, 6543):
        with pytest.raises(BadInput, match="num_shards"):
            fetch_climbmix(ClimbMixRecipe(num_shards=count), work=workspace(tmp_path), runtime=Runtime())
    monkeypatch.setenv("OMNI_OFFLINE", "1")
    with pytest.raises(BadInput, match="OMNI_OFFLINE"):
        fetched(tmp_path / "stage" / "a")
    assert hubs[0].requests == []


# --- folders -------------------------------------------------------------------------------------


def recipe_of(folder: Path, **fields: Any) -> TextFolderRecipe:
    return TextFolderRecipe(folder=OutsideFolder(digest_folder(folder), str(folder)), **fields)


def imported(folder: Path, directory: Path, **fields: Any) -> tuple[Workspace, dict[str, Any]]:
    work = workspace(directory)
    return work, import_text(recipe_of(folder, **fields), work=work, runtime=Runtime())


def fill(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def both(work: Workspace) -> list[str]:
    return [text for split in ("validation", "train") for text in read_texts(work.out, split)]


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_a_folder_of_all_kinds_becomes_a_shuffled_corpus(tmp_path: Path) -> None:
    folder = fill(
        tmp_path / "texts",
        {
            "a/one.TXT": "\ufeffGrüße aus dem Garten.\n",
            "b.jsonl": "\ufeff"
            + lines({"text": "two"}, {"text": " "}, {"text": None})
            + "\n"
            + lines({"text": "猫"}),
            "c.parquet": parquet(text=["four", None, "five", "", "two"]),
            "notes.md": "not read",
        },
    )
    work, facts = imported(folder, tmp_path / "w")
    expected = ["Grüße aus dem Garten.\n", "two", "猫", "four", "five", "two"]
    assert both(work) == sorted(expected, key=sha256)
    assert facts["num_documents"] == 6
    assert facts["num_bytes"] == sum(path.stat().st_size for path in work.out.iterdir())
    assert work.metrics.summaries["empty_documents"] == 4
    assert work.metrics.summaries["validation_documents"] == 1  # never none
    assert work.metrics.summaries["files"] == 3


def test_a_documents_hash_alone_says_where_it_belongs(tmp_path: Path) -> None:
    texts = [f"document {number}" for number in range(3000)]
    one = fill(tmp_path / "one", {"all.jsonl": lines(*({"text": each} for each in texts))})
    more = fill(
        tmp_path / "more",
        {
            "z.jsonl": lines(*({"body": each} for each in texts[:1000])),
            "a.parquet": parquet(body=texts[1000:]),
        },
    )
    (first, _), (second, _) = imported(one, tmp_path / "w1"), imported(more, tmp_path / "w2", column="body")
    assert payload(first) == payload(second)
    held_out = list(read_texts(first.out, "validation"))
    assert held_out == sorted((each for each in texts if int(sha256(each)[:8], 16) < 2**32 / 100), key=sha256)
    assert 15 < len(held_out) < 45


def test_a_text_that_occurs_twice_is_on_one_side_and_both_sides_have_one(tmp_path: Path) -> None:
    folder = fill(tmp_path / "texts", {"a.jsonl": lines(*[{"text": "again"}] * 5, {"text": "once"})})
    for share in (0.001, 0.999):
        work, _ = imported(folder, tmp_path / f"w{share}", validation_share=share)
        sides = [set(read_texts(work.out, split)) for split in ("train", "validation")]
        assert sides in ([{"again"}, {"once"}], [{"once"}, {"again"}])
    (folder / "a.jsonl").write_text(lines(*[{"text": "again"}] * 5))
    with pytest.raises(BadInput, match="no two different texts"):
        imported(folder, tmp_path / "w")
    with pytest.raises(BadInput, match="validation_share"):
        imported(folder, tmp_path / "w", validation_share=1.0)


def test_a_long_txt_is_cut_where_paragraphs_end(tmp_path: Path) -> None:
    paragraphs = [f"{number}: " + "word " * (20 + number % 90) + "\n\n" for number in range(900)]
    book, blob = "".join(paragraphs), "x" * (3 * MAX_TXT_CHARS)
    folder = fill(tmp_path / "texts", {"book.txt": book, "short.txt": "y" * MAX_TXT_CHARS})
    pieces = list(folder_module.read_documents(folder / "book.txt", "text"))
    assert "".join(pieces) == book
    assert all(len(piece) <= MAX_TXT_CHARS and piece.endswith("\n\n") for piece in pieces)
    assert len(list(folder_module.read_documents(folder / "short.txt", "text"))) == 1
    fill(folder, {"blob.txt": blob})
    assert "".join(folder_module.read_documents(folder / "blob.txt", "text")) == blob


def test_memory_and_files_stay_small_however_large_the_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "BIN_BYTES", 60_000)
    monkeypatch.setattr(folder_module, "HELD_BYTES", 30_000)
    peaks, sizes = [], []
    for number, scale in enumerate((1, 7)):
        texts = [f"{i} " + "some words " * 20 for i in range(400 * scale)]
        folder = fill(
            tmp_path / f"texts{scale}",
            {
                "a.jsonl": lines(*({"text": each} for each in texts)),
                "b.parquet": parquet(text=pyarrow.array([each + "!" for each in texts])),
                "c.txt": "\n\n".join(texts),
            },
        )
        del texts
        pyarrow.default_memory_pool().release_unused()
        tracemalloc.start()
        work, facts = imported(folder, tmp_path / f"w{number}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        counts = [check_shard(path) for path in work.out.iterdir()]
        assert sum(counts) == facts["num_documents"]
        sizes.append(max(counts))
        assert not (work.partial / "bins").exists()
    assert peaks[1] < 1.5 * peaks[0], peaks
    assert sizes[1] < 2 * sizes[0], sizes


BAD_FOLDERS: dict[str, tuple[dict[str, bytes | str], str]] = {
    "nothing": ({".hidden.txt": "x"}, "holds no .txt, .jsonl, .parquet"),
    "other files": ({"a.pdf": "x"}, "holds no .txt, .jsonl, .parquet"),
    "empty file": ({"a.txt": "x", "b.txt": ""}, "b.txt is empty"),
    "empty texts": ({"a.txt": " ", "b.txt": "\n"}, "no two different texts"),
    "latin-1": (
        {"a.txt": "x" * 100_000 + "é" * 3 + "y", "b.txt": b"Gr\xfc\xdfe"},
        "b.txt is not UTF-8 at byte 2",
    ),
    "cut off": ({"a.txt": ("x" * 65_535 + "é").encode()[:-1]}, "a.txt is not UTF-8 at byte 65535"),
    "far inside": ({"a.txt": "é".encode() * 50_000 + b"\xff"}, "a.txt is not UTF-8 at byte 100000"),
    "line not utf-8": ({"a.jsonl": b'{"text": "x"}\n{"text": "\xff"}\n'}, "a.jsonl is not UTF-8 at byte 24"),
    "half a line": ({"a.jsonl": lines({"text": "x"}) + '{"text": "y'}, "a.jsonl, line 2: this is not JSON"),
    "no object": ({"a.jsonl": lines({"text": "x"}, ["y"])}, "a.jsonl, line 2: this is no JSON object"),
    "no field": (
        {"a.jsonl": lines({"body": "x"})},
        "a.jsonl, line 1: the field 'text' is missing among 'body'",
    ),
    "a number": ({"a.jsonl": lines({"text": 3})}, "a.jsonl, line 1: the field 'text' is not a string"),
    "half a pair": ({"a.jsonl": '{"text": "\\ud83d"}\n'}, "a.jsonl, line 1: the text holds half"),
    "deep": ({"a.jsonl": "[" * 200_000 + "\n"}, "a.jsonl, line 1: this is not JSON"),
    **{f"parquet {n}": ({"a.parquet": c}, r if c else "is empty") for n, (c, r) in BAD_PARQUET.items()},
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_input_is_one_sentence_and_the_next_run_goes_on(name: str, tmp_path: Path) -> None:
    files, reason = BAD_FOLDERS[name]
    folder = fill(tmp_path / "texts", files)
    with pytest.raises(BadInput) as raised:
        imported(folder, tmp_path / "w")
    assert reason in str(raised.value)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)
    for path in folder.iterdir():
        path.unlink()
    fill(folder, {"a.txt": "one", "b.txt": "two"})
    assert imported(folder, tmp_path / "w")[1]["num_documents"] == 2


def test_a_folder_that_changed_or_was_never_named_is_refused(tmp_path: Path) -> None:
    folder = fill(tmp_path / "texts", {"a.txt": "one", "b.txt": "two"})
    recipe = recipe_of(folder)
    (folder / "b.txt").write_text("three")
    with pytest.raises(BadInput, match="has changed"):
        import_text(recipe, work=workspace(tmp_path / "w"), runtime=Runtime())
    with pytest.raises(BadInput, match="name a folder"):
        import_text(TextFolderRecipe(), work=workspace(tmp_path / "w"), runtime=Runtime())


def test_an_import_that_was_killed_gives_the_same_bytes(tmp_path: Path) -> None:
    folder = fill(tmp_path / "texts", {f"{n}.txt": f"text {n}" for n in range(20)})

    class Killing(Metrics):
        def log(self, step: int, total: int, **values: float) -> None:
            if step == 12:
                raise KeyboardInterrupt

    straight, _ = imported(folder, tmp_path / "straight")
    work = workspace(tmp_path / "killed")
    killed = Workspace(work.directory, 1, Killing(tmp_path / "m.jsonl"))
    (work.partial / "bins").mkdir()
    (work.partial / "bins" / "000000.jsonl").write_text('"of an earlier attempt"\n')
    with pytest.raises(KeyboardInterrupt):
        import_text(recipe_of(folder), work=killed, runtime=Runtime())
    assert payload(imported(folder, tmp_path / "killed")[0]) == payload(straight)
