"""Public sets of sounds in miniature, laid out as they are published: what is read, what is left out."""

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import soundfile

from flows.planning import plan
from flows.recipes import resolve, settle
from omni_model.artifacts import AudioCorpus, PayloadFile
from omni_model.audio import sound_set_questions
from omni_model.audio.clips import ClipPlan
from omni_model.audio.corpora import read_clips, read_index
from omni_model.audio.sound_set_layouts import EMOTIONS, EVENTS, RAVDESS_EMOTIONS, SENTENCES
from omni_model.audio.sound_set_musan import KINDS, licence_in
from omni_model.audio.sound_sets import READERS, import_sound_set
from omni_model.audio.waveform import encode_wav
from omni_model.config import BadInput, OutsideFolder, SoundSetRecipe
from omni_model.outside import digest_folder
from omni_model.storage import open_store
from omni_model.text import lessons
from omni_model.text.questions import NOTHING, askable, caption, grammar
from tests.loopback import PAGE
from tests.small_sound import make, noise, noise_corpus

RATE_HZ = 16_000
Row = dict[str, Any]


def wav(seed: int, duration_s: float = 0.3, rate_hz: int = RATE_HZ) -> bytes:
    buffer = io.BytesIO()
    samples = noise(duration_s * rate_hz / RATE_HZ, seed)
    soundfile.write(buffer, samples, rate_hz, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def lay(folder: Path, files: Mapping[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    folder.mkdir(exist_ok=True)
    return folder


def recipe_of(folder: Path, layout: str, **settings: Any) -> SoundSetRecipe:
    outside = OutsideFolder(digest_folder(folder) if folder.is_dir() else "0" * 64, str(folder))
    return SoundSetRecipe(folder=outside, layout=layout, **{"clips_per_shard": 4} | settings)


def imported(directory: Path, folder: Path, layout: str, **settings: Any) -> AudioCorpus:
    corpus: AudioCorpus = make(
        AudioCorpus, import_sound_set, directory, recipe_of(folder, layout, **settings)
    )
    return corpus


def by_name(corpus: AudioCorpus) -> dict[str, Row]:
    """File name -> its clip's metadata."""
    return {Path(row["provenance"]["file"]).name: row for row in read_clips(corpus)}


CREMA_D_FILES = {
    "AudioWAV/1001_DFA_ANG_XX.wav": wav(1),
    "AudioWAV/1001_IEO_HAP_HI.wav": wav(2),
    "AudioWAV/1002_IEO_FEA_LO.wav": wav(3),
    "AudioWAV/1009_TSI_DIS_XX.wav": wav(4),
    "AudioWAV/1010_ITH_SAD_X.wav": wav(5),
    "AudioMP3/1001_DFA_ANG_XX.mp3": "the same again, for listeners",
    "LICENSE.txt": "Open Database License",
    "SentenceFilenames.csv": '"Stimulus_Number","Filename"\n1,"1001_IEO_NEU_XX"\n',
}
PEOPLE = """"ActorID","Age","Sex","Race","Ethnicity"
1001,51,"Male","Caucasian","Not Hispanic"
1002,21,"Female","Caucasian","Not Hispanic"
"""
RAVDESS_FILES = {
    "Actor_12/03-01-06-01-02-01-12.wav": wav(1, rate_hz=48_000),
    "Actor_19/03-01-08-02-01-02-19.wav": wav(2, rate_hz=48_000),
    "Actor_24/03-02-02-01-01-01-24.wav": wav(3, rate_hz=48_000),
    "Actor_24/01-02-02-01-01-01-24.mp4": "a film",
}
TABLE = """filename,fold,target,category,esc10,src_file,take
1-100032-A-0.wav,1,0,dog,True,100032,A
4-17092-A-27.wav,4,27,brushing_teeth,False,17092,A
5-17092-B-27.wav,5,27,brushing_teeth,False,17092,B
"""
ESC_50_FILES = {
    "ESC-50-master/meta/esc50.csv": TABLE,
    "ESC-50-master/audio/1-100032-A-0.wav": wav(1, rate_hz=44_100),
    "ESC-50-master/audio/4-17092-A-27.wav": wav(2, rate_hz=44_100),
    "ESC-50-master/audio/5-17092-B-27.wav": wav(3, rate_hz=44_100),
    "ESC-50-master/audio/9-nobody-knows-it.wav": wav(4),
}
MUSAN_FILES = {
    "music/fma/music-fma-0000.wav": wav(1, 2.5),
    "music/fma/music-fma-0001.wav": wav(2),
    "music/fma/music-fma-0002.wav": wav(3),
    "music/fma/ANNOTATIONS": "music-fma-0000 pop,electronica Y Quiet_Tins\nmusic-fma-0001 jazz N Loud_Tins\n",
    "music/fma/LICENSE": (
        'music-fma-0000\n"Tin" (by Quiet Tins)\nCC BY 4.0\n=====\n'
        'music-fma-0001\n"Can" (by Loud Tins)\nhttp://creativecommons.org/licenses/by-nc-sa/3.0/us/\n'
    ),
    "music/rfm/music-rfm-0000.wav": wav(4),
    "speech/librivox/speech-librivox-0000.wav": wav(5),
    "speech/librivox/ANNOTATIONS": "speech-librivox-0000 f german\n",
    "speech/librivox/LICENSE": "All recordings are in the public domain.",
    "noise/free-sound/noise-free-sound-0000.wav": wav(6),
    "noise/free-sound/ANNOTATIONS": "noise-free-sound-0000\n",
    "noise/free-sound/LICENSE": "All files were marked as in the Public Domain.",
    "README": "MUSAN",
}
FILES = {"crema-d": CREMA_D_FILES, "ravdess": RAVDESS_FILES, "esc-50": ESC_50_FILES, "musan": MUSAN_FILES}


# --- what is known of a recording ----------------------------------------------------------------


def test_crema_d_tells_emotion_sentence_and_actor(tmp_path: Path) -> None:
    folder = lay(tmp_path / "set", CREMA_D_FILES | {"VideoDemographics.csv": PEOPLE})
    rows = by_name(imported(tmp_path / "a", folder, "crema-d"))
    first = rows["1001_DFA_ANG_XX.wav"]
    assert first["labels"] == {"emotion": "angry", "voice": "man", "age": "50s"}
    assert (first["transcript"], first["speaker"]) == ("Don't forget a jacket", "crema-d-1001")
    assert first["provenance"]["generator"] == "crema-d"
    assert rows["1001_IEO_HAP_HI.wav"]["labels"]["intensity"] == "high"
    assert rows["1002_IEO_FEA_LO.wav"]["labels"] == {
        "emotion": "afraid",
        "intensity": "low",
        "voice": "woman",
        "age": "20s",
    }
    assert rows["1010_ITH_SAD_X.wav"]["labels"] == {"emotion": "sad"}  # nobody told who that is
    assert {name[:4]: row["split"] for name, row in rows.items()} == {
        "1001": "train",
        "1002": "train",
        "1009": "validation",
        "1010": "test",
    }
    assert {row["licence"] for row in rows.values()} == {"ODbL-1.0"}
    assert len(rows) == 5
    (folder / "VideoDemographics.csv").unlink()
    assert by_name(imported(tmp_path / "b", folder, "crema-d"))["1001_DFA_ANG_XX.wav"]["labels"] == {
        "emotion": "angry"
    }


def test_ravdess_tells_emotion_statement_and_actor(tmp_path: Path) -> None:
    rows = by_name(imported(tmp_path / "a", lay(tmp_path / "set", RAVDESS_FILES), "ravdess"))
    assert len(rows) == 3
    first = rows["03-01-06-01-02-01-12.wav"]
    assert first["labels"] == {
        "emotion": "afraid",
        "intensity": "normal",
        "delivery": "spoken",
        "voice": "woman",
    }
    assert (first["transcript"], first["speaker"]) == ("Dogs are sitting by the door", "ravdess-12")
    assert (first["split"], first["licence"]) == ("train", "CC-BY-NC-SA-4.0")
    assert first["changes"] == ["resampled"]
    second, third = rows["03-01-08-02-01-02-19.wav"], rows["03-02-02-01-01-01-24.wav"]
    assert (second["labels"]["emotion"], second["labels"]["intensity"]) == ("surprised", "strong")
    assert (second["labels"]["voice"], second["split"]) == ("man", "validation")
    assert (third["labels"]["emotion"], third["labels"]["delivery"]) == ("calm", "sung")
    assert (third["transcript"], third["split"]) == ("Kids are talking by the door", "test")


def test_esc_50_tells_events_and_keeps_its_folds(tmp_path: Path) -> None:
    rows = by_name(imported(tmp_path / "a", lay(tmp_path / "set", ESC_50_FILES), "esc-50"))
    assert {name: (row["labels"], row["split"], row["licence"]) for name, row in rows.items()} == {
        "1-100032-A-0.wav": ({"event": "dog"}, "train", "CC-BY"),
        "4-17092-A-27.wav": ({"event": "brushing"}, "validation", "CC-BY-NC-3.0"),
        "5-17092-B-27.wav": ({"event": "brushing"}, "test", "CC-BY-NC-3.0"),
    }


def test_musan_tells_what_fills_a_clip_and_whose_it_is(tmp_path: Path) -> None:
    corpus = imported(tmp_path / "a", lay(tmp_path / "set", MUSAN_FILES), "musan", max_clip_s=1.0)
    rows = by_name(corpus)
    pieces = [row for row in read_clips(corpus) if row["provenance"]["file"].endswith("fma-0000.wav")]
    assert len(pieces) >= 3
    assert len({(row["split"], row["licence"], str(row["labels"])) for row in pieces}) == 1
    labels = {name.removesuffix(".wav"): row["labels"] for name, row in rows.items()}
    assert labels == {
        "music-fma-0000": {"background": "music", "genre": "pop,electronica", "singing": "yes"},
        "music-fma-0001": {"background": "music", "genre": "jazz", "singing": "no"},
        "music-fma-0002": {"background": "music"},
        "music-rfm-0000": {"background": "music"},
        "speech-librivox-0000": {"background": "speech", "voice": "woman", "language": "german"},
        "noise-free-sound-0000": {"background": "noise"},
    }
    assert {name.removesuffix(".wav"): row["licence"] for name, row in rows.items()} == {
        "music-fma-0000": "CC-BY-4.0",
        "music-fma-0001": "CC-BY-NC-SA-3.0",
        "music-fma-0002": "unknown",  # no paragraph names it
        "music-rfm-0000": "CC-BY-4.0",  # its source came without a LICENSE
        "speech-librivox-0000": "public-domain",
        "noise-free-sound-0000": "public-domain",
    }
    assert rows["speech-librivox-0000.wav"]["speaker"] == "musan-speech-librivox-0000"
    assert rows["music-fma-0000.wav"]["speaker"] == ""


@pytest.mark.parametrize(
    ("statement", "licence"),
    [
        ("Attribution 3.0", "CC-BY-3.0"),
        ("Creative Commons Attribution-ShareAlike 3.0 Unported", "CC-BY-SA-3.0"),
        ("Attribution-NonCommercial-NoDerivatives 4.0 International", "CC-BY-NC-ND-4.0"),
        ("CC-BY", "CC-BY"),
        ("https://creativecommons.org/publicdomain/zero/1.0/", "CC0-1.0"),
        ("Public Domain", "public-domain"),
        ("ask the composer", "unknown"),
    ],
)
def test_licences_are_read_as_they_are_written(statement: str, licence: str) -> None:
    assert licence_in(f"music-fma-0007\nSong\n{statement}\n") == licence


def test_the_grammar_has_the_words_of_the_sets() -> None:
    known = grammar().categories
    assert sorted(EVENTS.values()) == sorted(known["event"].options)
    assert set(known["emotion"].options) == {*EMOTIONS.values(), *RAVDESS_EMOTIONS}
    assert set(KINDS) < set(known["background"].options)
    labels = {"emotion": "angry", "voice": "woman", "intensity": "high"}
    assert caption(askable(labels), "don't go") == "A woman says don't go sounding angry."
    assert caption({"event": "rain"}, "") == "A sound of rain."
    assert caption({"background": "music"}, "") == "A sound of music."


def test_public_sets_leave_the_lessons_alone() -> None:
    """What only public sets are labelled with is no word to bind letters with: more sets re-train nothing."""
    known = grammar().categories.values()
    taught = {option for category in known if category.embedded for option in category.options}
    foreign = {option for category in known if not category.embedded for option in category.options} - taught
    said: set[str] = set()
    for index in range(300):
        rng = np.random.default_rng([9, index])
        drill, question = lessons.letter_drill(rng), lessons.word_question(rng)
        said |= {word for word, _ in drill["pairs"]} | set(question["sound"].split())
    assert said <= taught | {NOTHING}
    assert len(said) > 50
    assert foreign
    assert not said & foreign


# --- splits --------------------------------------------------------------------------------------


def files_named(names: Sequence[str]) -> list[PayloadFile]:
    return [PayloadFile(name, 1, "0" * 64) for name in sorted(names)]


def test_no_speaker_and_no_musician_is_heard_in_two_splits(tmp_path: Path) -> None:
    actors = range(1001, 1092)
    crema_d = files_named([f"{a}_{s}_{e}_XX.wav" for a in actors for s in SENTENCES for e in EMOTIONS])
    ravdess = files_named(
        [f"03-01-0{e}-01-0{s}-01-{a:02d}.wav" for a in range(1, 25) for e in "12" for s in "12"]
    )
    for layout, files in (("crema-d", crema_d), ("ravdess", ravdess)):
        sources = READERS[layout](tmp_path, files).sources
        assert len(sources) == len(files)
        homes = {(source.known.speaker, source.known.split) for source in sources}
        assert len(homes) == len({speaker for speaker, _ in homes})
        sizes = Counter(split for _, split in homes)
        expected = {"train": 73, "validation": 9, "test": 9} if layout == "crema-d" else {}
        assert sizes == (expected or {"train": 18, "validation": 2, "test": 4})
    voices = Counter((s.known.split, s.known.labels["voice"]) for s in sources)
    assert all(voices[split, "man"] == voices[split, "woman"] for split, _ in voices)

    names = [f"music/fma/music-fma-{number:04d}" for number in range(300)]
    lines = [f"{Path(name).name} jazz N Musician_{number % 100}" for number, name in enumerate(names)]
    lay(tmp_path, {"music/fma/ANNOTATIONS": "\n".join(lines)})
    files = files_named(["music/fma/ANNOTATIONS", *(f"{name}.wav" for name in names)])
    sources = READERS["musan"](tmp_path, files).sources
    homes = {(int(Path(source.path).stem[-4:]) % 100, source.known.split) for source in sources}
    assert len(homes) == 100
    assert {split for _, split in homes} == {"train", "validation", "test"}


# --- left out ------------------------------------------------------------------------------------


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path) -> None:
    files = CREMA_D_FILES | {
        "AudioWAV/1076_MTI_SAD_XX.wav": soundfile_of(np.zeros(9_000)),
        "AudioWAV/1077_MTI_SAD_XX.wav": PAGE,
        "again/1001_DFA_ANG_XX.wav": wav(1),
    }
    corpus = imported(tmp_path / "a", lay(tmp_path / "set", files), "crema-d")
    assert read_index(corpus)["dropped"] == {"silent": 1, "not audio": 1, "there twice": 1}
    assert (corpus.num_clips, corpus.num_dropped) == (5, 3)


def soundfile_of(samples: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, RATE_HZ, format="WAV", subtype="PCM_16")
    return buffer.getvalue()


def test_rows_without_their_recording_are_counted_and_refused_if_they_are_all(tmp_path: Path) -> None:
    folder = lay(tmp_path / "set", ESC_50_FILES)
    (folder / "ESC-50-master/audio/4-17092-A-27.wav").unlink()
    corpus = imported(tmp_path / "a", folder, "esc-50")
    assert read_index(corpus)["dropped_names"] == [["ESC-50-master/audio/4-17092-A-27.wav", "missing"]]
    assert (corpus.num_clips, corpus.num_dropped) == (2, 1)
    for path in (folder / "ESC-50-master/audio").iterdir():
        path.unlink()
    with pytest.raises(BadInput, match=r"no clips \(3 missing\)"):
        imported(tmp_path / "b", folder, "esc-50")


# --- bad input -----------------------------------------------------------------------------------

Change = Callable[[dict[str, bytes | str]], None]


def put(name: str, content: bytes | str) -> Change:
    return lambda files: files.__setitem__(name, content)


def gone(name: str) -> Change:
    return lambda files: files.__delitem__(name)


META = "ESC-50-master/meta/esc50.csv"
BAD: dict[str, tuple[str, Change, str]] = {
    "another set's files": (
        "crema-d",
        put("x/03-01-06-01-02-01-12.wav", wav(1)),
        r"12\.wav is no file of CREMA-D.*1001_DFA",
    ),
    "an actor who is none": ("crema-d", put("1092_DFA_ANG_XX.wav", wav(1)), "1092_DFA_ANG_XX.wav is no file"),
    "an emotion that is none": (
        "ravdess",
        put("03-01-09-01-02-01-12.wav", wav(1)),
        "09-01.* is no file of RAVDESS",
    ),
    "no recordings": ("ravdess", lambda files: files.clear(), r"holds no \.wav files; give RAVDESS"),
    "no sexes": (
        "crema-d",
        put("VideoDemographics.csv", "ActorID,Age\n1001,5\n"),
        "csv lacks the column Sex",
    ),
    "a strange sex": (
        "crema-d",
        put("VideoDemographics.csv", "ActorID,Age,Sex\n1001,5,?\n"),
        r"line 2, has the sex '\?'",
    ),
    "no table": ("esc-50", gone(META), "holds no meta/esc50.csv"),
    "no category": ("esc-50", put(META, "filename,fold,esc10\na.wav,1,True\n"), "lacks the column category"),
    "an empty table": ("esc-50", put(META, ""), "lacks the column filename"),
    "half a row": ("esc-50", put(META, TABLE[:-20]), "line 4, breaks off"),
    "a strange category": (
        "esc-50",
        put(META, TABLE.replace("dog", "dragon")),
        "line 2, has the category 'dragon'",
    ),
    "a row twice": (
        "esc-50",
        put(META, TABLE + TABLE.split("\n")[1]),
        "line 5, names 1-100032-A-0.wav for the second",
    ),
    "a table in another alphabet": ("esc-50", put(META, TABLE.encode("utf-16")), "not UTF-8"),
    "a recording on the wrong shelf": (
        "musan",
        put("sounds/a.wav", wav(1)),
        r"sounds/a\.wav is no file of MUSAN",
    ),
    "pointers": (
        "crema-d",
        put(
            "AudioWAV/1001_DFA_ANG_XX.wav",
            "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
        ),
        "git lfs pull",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_folder_that_is_not_the_set_is_one_sentence(tmp_path: Path, name: str) -> None:
    layout, change, reason = BAD[name]
    files: dict[str, bytes | str] = dict(FILES[layout])
    change(files)
    refused(tmp_path, lay(tmp_path / "set", files), layout, reason)


def refused(tmp_path: Path, folder: Path, layout: str, reason: str) -> None:
    with pytest.raises(BadInput, match=reason) as refusal:
        imported(tmp_path / "work", folder, layout)
    assert "\n" not in str(refusal.value)
    assert str(folder) in str(refusal.value)
    assert list((tmp_path / "work" / "out").iterdir()) == []


def test_no_such_folder_or_layout_or_another_folder_by_now(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"nowhere is not a folder"):
        imported(tmp_path / "work", tmp_path / "nowhere", "musan")
    with pytest.raises(BadInput, match="layout must be one of crema-d, ravdess"):
        SoundSetRecipe(layout="iemocap")
    folder = lay(tmp_path / "set", RAVDESS_FILES)
    recipe = recipe_of(folder, "ravdess")
    (folder / "late.wav").write_bytes(wav(1))
    with pytest.raises(BadInput, match="has changed since the run was planned"):
        make(AudioCorpus, import_sound_set, tmp_path / "work", recipe)


# --- questions, JSON -----------------------------------------------------------------------------

QUESTIONS: list[Row] = [
    {"audio": "sounds/a.wav", "instruction": "What is it?", "answer": "A dog."},
    {
        "audio": "./sounds/a.wav",
        "instruction": "How many?",
        "answer": "(B) two",
        "choices": ["(A) one", "(B) two"],
    },
    {"context": {"path": "sounds/b.wav"}, "instruction": {"text": "Who?"}, "answer": {"text": "Ann"}},
    {"audio_path": "sounds/c.wav", "question": "Where?", "reference": "Here", "split": "validation"},
]
ASKED_FILES = {
    "sounds/a.wav": wav(1),
    "sounds/b.wav": wav(2),
    "sounds/c.wav": wav(3),
    "sounds/not asked about.wav": wav(4),
}


def test_json_questions_become_exchanges_of_their_recordings(tmp_path: Path) -> None:
    other = [{"audio": "../sounds/d.wav", "instruction": "a", "answer": "b"}] + [
        {
            "audio": "here.wav",
            "instruction": "Why?",
            "answer": "So.",
            "other_attributes": {"task": "why", "n": [1]},
        }
    ]
    files = {
        "asked.json": json.dumps(QUESTIONS),
        "more/asked_test.json": json.dumps(other),
        "more/here.wav": wav(5),
    }
    folder = lay(tmp_path / "set", ASKED_FILES | files)
    corpus = imported(tmp_path / "a", folder, "audiobench-json", licence="CC-BY-4.0")
    rows = by_name(corpus)
    assert {name: (row["exchanges"], row["split"]) for name, row in rows.items()} == {
        "a.wav": ([["What is it?", "A dog."], ["How many?\n(A) one (B) two", "(B) two"]], "train"),
        "b.wav": ([["Who?", "Ann"]], "train"),
        "c.wav": ([["Where?", "Here"]], "validation"),
        "here.wav": ([["Why?", "So."]], "test"),
    }
    assert {row["licence"] for row in rows.values()} == {"CC-BY-4.0"}
    assert rows["here.wav"]["provenance"]["other_attributes"] == {"task": "why"}
    assert rows["a.wav"]["labels"] == {}
    assert read_index(corpus)["dropped_names"] == [["../sounds/d.wav", "missing"]]


def test_questions_that_nobody_can_answer_are_left_out(tmp_path: Path) -> None:
    rows = [
        {"audio": "sounds/a.wav", "instruction": "", "answer": "A dog."},
        {"audio": "sounds/b.wav", "instruction": "What?", "answer": None},
        {"audio": "sounds/b.wav", "instruction": "What?", "answer": "A cat."},
        {"audio": "sounds/c.wav", "instruction": "What?", "answer": "A cow."},
        {"audio": "sounds/gone.wav", "instruction": "What?", "answer": "A hen."},
        {"audio": "long.wav", "instruction": "What?", "answer": "A bee."},
    ]
    files = ASKED_FILES | {"asked.json": json.dumps(rows), "sounds/c.wav": PAGE, "long.wav": wav(9, 1.5)}
    corpus = imported(tmp_path / "a", lay(tmp_path / "set", files), "audiobench-json", max_clip_s=1.0)
    (clip,) = read_clips(corpus)
    assert clip["exchanges"] == [["What?", "A cat."]]
    reasons = {"no question": 1, "no answer": 1, "not audio": 1, "missing": 1, "too long": 1}
    assert read_index(corpus)["dropped"] == reasons
    assert ["asked.json, object 1", "no question"] in read_index(corpus)["dropped_names"]


BAD_JSON: dict[str, tuple[bytes | str, str]] = {
    "no list": ('{"audio": "sounds/a.wav"}', "asked.json is no list of objects"),
    "nothing": ("[]", "asked.json is no list of objects"),
    "texts": ('["sounds/a.wav"]', "asked.json is no list of objects"),
    "half a file": (json.dumps(QUESTIONS)[:-9], "asked.json is not JSON"),
    "another alphabet": (json.dumps(QUESTIONS).encode("utf-16"), "asked.json is not UTF-8"),
    "no answer": (json.dumps([{"audio": "sounds/a.wav", "instruction": "?"}]), "object 1, lacks 'answer'"),
    "no audio": (json.dumps([*QUESTIONS, {"instruction": "?", "answer": "!"}]), "object 5, lacks 'context'"),
    "audio of no kind": (
        json.dumps([{"audio": 7, "instruction": "?", "answer": "!"}]),
        "object 1, must name its audio",
    ),
    "a number": (json.dumps([QUESTIONS[0] | {"answer": 3}]), "must have a text as its answer, not 3"),
    "a choice": (json.dumps([QUESTIONS[0] | {"choices": {"A": 1}}]), "choices that are neither"),
    "a strange split": (json.dumps([QUESTIONS[0] | {"split": "dev"}]), "has the split 'dev'"),
    "two splits": (
        json.dumps([*QUESTIONS, QUESTIONS[0] | {"split": "test"}]),
        r"a\.wav for test, and it is for train",
    ),
    "all recordings missing": (
        json.dumps([{"audio": "x.wav", "instruction": "?", "answer": "!"}]),
        r"no clips \(1 missing\)",
    ),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_bad_json_questions_are_one_sentence(tmp_path: Path, name: str) -> None:
    content, reason = BAD_JSON[name]
    folder = lay(tmp_path / "set", ASKED_FILES | {"asked.json": content})
    with pytest.raises(BadInput, match=reason) as refusal:
        imported(tmp_path / "work", folder, "audiobench-json")
    assert "\n" not in str(refusal.value)


def test_a_folder_without_questions_is_refused(tmp_path: Path) -> None:
    folder = lay(tmp_path / "set", ASKED_FILES)
    refused(tmp_path, folder, "audiobench-json", r"holds no \.json files")
    refused(tmp_path, folder, "audiobench-parquet", r"holds no \.parquet files")
    refused(tmp_path, lay(tmp_path / "empty", {}), "audiobench-json", r"holds no \.json files")


# --- questions, parquet --------------------------------------------------------------------------

AUDIO = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})
NESTED = pyarrow.struct({"audio": AUDIO, "text": pyarrow.string()})


def asked(numbers: Sequence[int]) -> list[Row]:
    """Two rows in a row with the same number are about one recording."""
    return [
        {
            "context": {"bytes": wav(number), "path": f"{number}.wav"},
            "instruction": f"Question {row}?",
            "answer": f"answer {row}",
            "other_attributes": {
                "task": f"task {number}",
                "choices": "(A) yes (B) no" if number == 3 else None,
            },
        }
        for row, number in enumerate(numbers)
    ]


def nested(rows: list[Row]) -> list[Row]:
    """The same in the other form, as the sets of Singlish have it."""
    return [
        {
            "context": {"audio": row["context"], "text": None},
            "instruction": {"audio": None, "text": row["instruction"]},
            "answer": {"audio": None, "text": row["answer"]},
            "other_attributes": row["other_attributes"],
        }
        for row in rows
    ]


def table(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    is_nested = "audio" in rows[0]["context"]
    kinds = [NESTED, NESTED, NESTED] if is_nested else [AUDIO, pyarrow.string(), pyarrow.string()]
    more = pyarrow.struct({"task": pyarrow.string(), "choices": pyarrow.string()})
    schema = pyarrow.schema(zip(rows[0], [*kinds, more], strict=True))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, row_group_size=3)
    return path


@pytest.mark.parametrize("form", [list, nested], ids=["flat", "nested"])
def test_parquet_questions_become_exchanges(tmp_path: Path, form: Callable[[list[Row]], list[Row]]) -> None:
    rows = asked([0, 1, 1, 2, 3, 4, 4, 4, 5])
    table(tmp_path / "set/data/test-00000-of-00001.parquet", form(rows))
    corpus = imported(tmp_path / "a", tmp_path / "set", "audiobench-parquet", licence="CC0-1.0")
    clips = {row["provenance"]["row"]: row for row in read_clips(corpus)}
    assert {number: [q for q, _ in clip["exchanges"]] for number, clip in clips.items()} == {
        0: ["Question 0?"],
        1: ["Question 1?", "Question 2?"],
        3: ["Question 3?"],
        4: ["Question 4?\n(A) yes (B) no"],
        5: ["Question 5?", "Question 6?", "Question 7?"],
        8: ["Question 8?"],
    }
    assert clips[8]["exchanges"] == [["Question 8?", "answer 8"]]
    assert clips[5]["provenance"] == {
        "generator": "audiobench-parquet",
        "file": "data/test-00000-of-00001.parquet",
        "row": 5,
        "audio": "4.wav",
        "other_attributes": {"task": "task 4"},
    }
    assert {(clip["split"], clip["licence"]) for clip in clips.values()} == {("test", "CC0-1.0")}
    assert [shard["num_clips"] for shard in read_index(corpus)["shards"]] == [3, 2, 1]


def test_the_split_of_a_table_is_the_most_guarded_that_its_path_names() -> None:
    names = {
        "data/train-00000-of-00002.parquet": "train",
        "SQA-PART3-Test/train-00000-of-00001.parquet": "test",
        "data/validation-00000-of-00001.parquet": "validation",
        "iemocap_emotion_test.json": "test",
        "latest/attested.parquet": "train",
    }
    assert {name: sound_set_questions.split_named(name) for name in names} == names


def test_rows_that_cannot_be_used_are_left_out_and_counted(tmp_path: Path) -> None:
    rows = asked([0, 1, 2, 3, 4, 5])
    rows[0]["context"]["bytes"] = None
    rows[1]["context"] = None
    rows[2]["context"]["bytes"] = wav(2, 1.5)
    rows[3]["answer"] = None
    rows[4]["instruction"] = " "
    table(tmp_path / "set/train.parquet", rows)
    corpus = imported(tmp_path / "a", tmp_path / "set", "audiobench-parquet", max_clip_s=1.0)
    dropped = {"no audio": 2, "too long": 1, "no answer": 1, "no question": 1}
    assert read_index(corpus)["dropped"] == dropped
    assert ["train.parquet, row 1", "no audio"] in read_index(corpus)["dropped_names"]
    assert [clip["provenance"]["row"] for clip in read_clips(corpus)] == [5]


def test_a_bad_table_is_found_before_anything_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    table(folder / "a.parquet", asked([1, 2]))
    good = (folder / "a.parquet").read_bytes()
    path = folder / "b.parquet"
    for bad, reason in ((good[:-9], "damaged or cut off"), (b"", "damaged"), (PAGE, "web page")):
        path.write_bytes(bad)
        refused(tmp_path, folder, "audiobench-parquet", rf"b\.parquet is.*{reason}")
    columns = pyarrow.parquet.read_table(folder / "a.parquet")
    for column in ("context", "instruction", "answer"):
        pyarrow.parquet.write_table(columns.drop_columns([column]), path)
        refused(tmp_path, folder, "audiobench-parquet", rf"b\.parquet lacks the column {column}")
        wrong = columns.drop_columns([column]).append_column(column, [[1, 2]])
        pyarrow.parquet.write_table(wrong, path)
        refused(tmp_path, folder, "audiobench-parquet", rf"b\.parquet has the column {column} as int64")


# --- the same bytes ------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*FILES, "audiobench-json", "audiobench-parquet"])
def test_a_set_gives_the_same_bytes_anywhere_and_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    for name in ("one", "two"):
        folder = lay(tmp_path / name, FILES.get(layout, ASKED_FILES | {"asked.json": json.dumps(QUESTIONS)}))
        table(folder / "train.parquet", asked([1, 1, 2, 3]))
    whole = imported(tmp_path / "whole", tmp_path / "one", layout, clips_per_shard=1)
    folder_name = str(tmp_path).encode()
    assert all(folder_name not in path.read_bytes() for path in whole.out.iterdir())

    recipe = recipe_of(tmp_path / "two", layout, clips_per_shard=1)
    monkeypatch.setattr("omni_model.audio.corpora.encode_wav", stopping_after(1))
    with pytest.raises(KeyboardInterrupt):
        make(AudioCorpus, import_sound_set, tmp_path / "killed", recipe)
    monkeypatch.undo()
    assert list((tmp_path / "killed" / "partial").glob("*.tar"))
    assert make(AudioCorpus, import_sound_set, tmp_path / "killed", recipe).digest == whole.digest


def stopping_after(count: int) -> Callable[[np.ndarray], bytes]:
    done = 0

    def encode(samples: np.ndarray) -> bytes:
        nonlocal done
        if done == count:
            raise KeyboardInterrupt
        done += 1
        return encode_wav(samples)

    return encode


def test_clips_without_questions_are_as_they_were(tmp_path: Path) -> None:
    assert "exchanges" not in ClipPlan("a", "train", {}, {}).plain()
    assert ClipPlan("a", "train", {}, {}, exchanges=(("?", "!"),)).plain()["exchanges"] == (("?", "!"),)
    corpus = noise_corpus(tmp_path / "noise", 3)
    assert not any("exchanges" in clip for clip in read_clips(corpus))
    known = "313b30023f798864edce92099f26259ea700f7ef05424ee71a999f787000cc14"
    assert noise_corpus(tmp_path / "before", 7).digest == known


# --- as a run ------------------------------------------------------------------------------------


def test_a_run_takes_a_set_by_its_layout_and_its_files_count(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    folder = lay(tmp_path / "set", RAVDESS_FILES)
    with pytest.raises(BadInput, match=r"sounds\.folder\.path"):
        settle(resolve("sound-set", []), store)
    chosen = [f"sounds.folder.path={folder}", "sounds.layout=ravdess"]
    settled = settle(resolve("sound-set", chosen), store)
    assert settled.recipe.sounds.folder.digest == digest_folder(folder)
    steps, _ = plan(settled, store)
    assert steps[0].label == "import_sound_set"
    (folder / "Actor_12/03-01-06-01-02-01-12.wav").write_bytes(wav(77))
    again, _ = plan(settle(resolve("sound-set", chosen), store), store)
    assert again[0].identity is not None
    assert steps[0].identity is not None
    assert again[0].identity.key != steps[0].identity.key
