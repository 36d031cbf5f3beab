"""Strangers' audio: formats and rates heard as they are, refusals with reasons, nothing lost unsaid."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from omni_model.artifacts import AudioCorpus, Manifest, content_digest, hash_payload, sha256_file
from omni_model.audio import corpora, folder, ingest, waveform
from omni_model.audio.clips import KEY_PATTERN, Clip, Dropped
from omni_model.audio.unusable import Unusable
from omni_model.config import BadInput, FolderRecipe, OutsideFolder, Runtime
from omni_model.outside import digest_folder, hash_folder, list_folder
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from tests.fuzz_audio import encode, media, renumbered, wav

COMPONENTS = {"stage": "import_folder", "code": "c", "packages": {}, "seed": None}


def tone(rate_hz: int, duration_s: float = 0.5, level: float = 0.3) -> np.ndarray:
    return level * np.sin(2 * np.pi * 440 * np.arange(round(rate_hz * duration_s)) / rate_hz)


def noise(duration_s: float, seed: int = 0, rate_hz: int = 16_000) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(round(duration_s * rate_hz)) * 0.1).astype(np.float32)


def reason(content: bytes | Path, **options: Any) -> tuple[str, str]:
    """Why a file is refused: the word that is counted, and the sentence."""
    with pytest.raises(Unusable) as refusal:
        waveform.read_recording(content, "the/clip", **options)
    sentence = str(refusal.value)
    assert sentence.startswith("the/clip ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return refusal.value.reason, sentence


# --- what is heard -------------------------------------------------------------------------------

LOSSLESS = [("WAV", "PCM_16"), ("WAV", "PCM_24"), ("WAV", "PCM_U8"), ("WAV", "FLOAT"), ("WAV", "DOUBLE")]
LOSSLESS += [
    ("RF64", "PCM_16"),
    ("WAVEX", "PCM_24"),
    ("FLAC", "PCM_16"),
    ("FLAC", "PCM_24"),
    ("AIFF", "PCM_16"),
]
LOSSY = [("WAV", "ULAW"), ("WAV", "IMA_ADPCM"), ("MP3", "MPEG_LAYER_III"), ("OGG", "VORBIS"), ("OGG", "OPUS")]


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(("form", "subtype"), [*LOSSLESS, *LOSSY])
def test_every_format_gives_the_tone_that_went_in(
    form: str, subtype: str, channels: int, tmp_path: Path
) -> None:
    rate_hz = 48_000 if subtype == "OPUS" else 44_100
    samples = tone(rate_hz)
    content = encode(np.repeat(samples[:, None], channels, axis=1), rate_hz, form, subtype)
    (tmp_path / "file").write_bytes(content)
    heard = waveform.read_recording(content)
    np.testing.assert_array_equal(waveform.decode(tmp_path / "file"), heard.samples)
    assert (heard.levels.source_rate_hz, heard.levels.num_channels) == (rate_hz, channels)
    assert heard.levels.changes == (("mixed down", "resampled") if channels == 2 else ("resampled",))
    assert 0 <= len(heard.samples) - 8_000 <= (1_000 if subtype == "IMA_ADPCM" else 0)  # it fills its blocks
    error = heard.samples[400:7_600] - tone(16_000)[400:7_600]
    assert np.abs(error).max() < (0.1 if (form, subtype) in LOSSY else 0.01)


@pytest.mark.parametrize(
    ("form", "codec", "options"),
    [("webm", "libopus", {}), ("webm", "libopus", {"live": "1"}), ("matroska", "aac", {}), ("mp4", "aac", {})]
    + [("ipod", "alac", {}), ("mp4", "aac", {"movflags": "frag_keyframe+empty_moov"}), ("adts", "aac", {})],
)
def test_webm_and_mp4_are_heard_with_the_extra(form: str, codec: str, options: dict[str, str]) -> None:
    pytest.importorskip("av")
    heard = waveform.read_recording(media(tone(48_000), 48_000, form, codec, **options))
    assert abs(len(heard.samples) - 8_000) < 1_700  # AAC starts late, in blocks of 1024
    spectrum = np.abs(np.fft.rfft(heard.samples[2_000:6_000]))
    assert spectrum.argmax() == 110  # 440 Hz in steps of 4
    assert 0.25 < np.sqrt(2 * np.mean(heard.samples[2_000:6_000] ** 2)) < 0.35


def test_without_the_extra_its_name_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(BadInput, match=r"clip .*nanochat-omni\[media\]") as refusal:
        waveform.decode(b"\x1aE\xdf\xa3\x80", "clip")
    assert not isinstance(refusal.value, Unusable)  # a folder must stop here, not drop its files


@pytest.mark.parametrize("rate_hz", [8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 96_000, 192_000])
def test_every_rate_is_resampled_as_the_whole_file_at_once(rate_hz: int) -> None:
    import soxr

    samples = noise(150_000 / rate_hz, rate_hz=rate_hz)  # more than two blocks
    expected = soxr.resample(samples, rate_hz, 16_000, quality="HQ")
    np.testing.assert_array_equal(waveform.decode(wav(samples, rate_hz, "FLOAT")), expected)


@pytest.mark.parametrize("channels", [1, 2, 3, 8])
def test_channels_are_averaged(channels: int) -> None:
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, (20_000, channels)).astype(np.float32)
    heard = waveform.decode(wav(samples, subtype="FLOAT"))
    np.testing.assert_allclose(heard, samples.mean(axis=1), atol=1e-7)


def test_pcm16_is_read_as_libsndfile_reads_it_and_comes_back_exactly(tmp_path: Path) -> None:
    pcm = np.random.default_rng(1).integers(-32_768, 32_768, (70_000, 2)).astype("<i2")
    content = wav(pcm)
    theirs = soundfile.read(io.BytesIO(content), dtype="float32")[0].mean(axis=1, dtype=np.float32)
    np.testing.assert_array_equal(waveform.decode(content), theirs)
    own = waveform.encode_wav(waveform.decode(content))
    np.testing.assert_array_equal(waveform.to_pcm16(waveform.decode(own)), np.frombuffer(own[44:], "<i2"))


def test_levels_are_left_alone_unless_something_is_wrong() -> None:
    def changed(samples: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
        recording = waveform.read_recording(wav(samples, subtype="FLOAT"))
        return recording.samples, recording.levels.changes

    good = noise(1) - noise(1).mean()
    for samples in (good + np.float32(0.009), good * np.float32(0.002), good / np.abs(good).max()):
        np.testing.assert_array_equal(*((changed(samples)[0], samples.astype(np.float32))))
        assert changed(samples)[1] == ()
    heard, changes = changed(good + 0.4)
    assert changes == ("offset removed",)
    np.testing.assert_allclose(heard, good, atol=1e-6)
    heard, changes = changed(good * 22 + 3)
    assert changes == ("offset removed", "scaled")
    np.testing.assert_allclose(heard, good / np.abs(good).max(), atol=1e-5)


def test_a_wav_that_leaves_its_length_open_is_taken_whole_and_says_so() -> None:
    content = bytearray(wav(noise(1)))
    content[4:8] = content[40:44] = b"\xff" * 4
    recording = waveform.read_recording(bytes(content))
    assert (len(recording.samples), recording.levels.changes) == (16_000, ("length not stated",))


def test_an_mp3_without_a_xing_header_is_read_to_its_end() -> None:
    """libsndfile guesses the length of such a file from its first frames, here a quarter of the truth."""
    loud_then_quiet = noise(6, rate_hz=44_100)
    loud_then_quiet[40_000:] *= 0.001
    whole = encode(loud_then_quiet, 44_100, "MP3", "MPEG_LAYER_III")
    assert b"Xing" in whole[:64]
    first = 144_000 * 128 // 44_100  # the Xing frame: 128 kbit/s, no padding
    bare = whole[first:]
    guess = soundfile.info(io.BytesIO(bare)).duration
    assert guess < 4 or guess > 8
    for content in (bare, b"ID3\4\0\0\0\0\0\x14" + bytes(20) + bare + b"TAG" + bytes(125)):
        heard = waveform.decode(content)
        assert 6 * 16_000 <= len(heard) < 6.1 * 16_000
        aligned = waveform.decode(whole)[8_000:40_000]
        best = max(float(heard[8_000 + s : 40_000 + s] @ aligned) for s in range(1_600))
        assert best > 0.99 * float(aligned @ aligned)


def test_a_flac_that_does_not_say_its_length_is_read_to_its_end() -> None:
    content = bytearray(encode(noise(5), 16_000, "FLAC", "PCM_16"))
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    assert len(waveform.decode(bytes(content))) == 80_000


# --- what is refused -----------------------------------------------------------------------------


def lengthened(content: bytes, claim: int) -> bytes:
    return content[:40] + struct.pack("<I", claim) + content[44:]


def flac_of(total: int, keeps_md5: bool = False) -> bytes:
    content = bytearray(encode(noise(1), 16_000, "FLAC", "PCM_16"))
    before = int.from_bytes(content[18:26], "big")
    content[18:26] = (before >> 36 << 36 | total).to_bytes(8, "big")
    if not keeps_md5:
        content[26:42] = bytes(16)
    return bytes(content)


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 64]) + content[place + 1 :]


def last_page(content: bytes) -> int:
    return content.rindex(b"OggS")


WHOLE = wav(noise(1))
FLAC = encode(noise(1), 16_000, "FLAC", "PCM_16")
MP3 = encode(noise(2), 44_100, "MP3", "MPEG_LAYER_III")
VORBIS = encode(noise(4), 16_000, "OGG", "VORBIS")
OPUS = encode(noise(4), 48_000, "OGG", "OPUS")
NAN, INF = (np.where(np.arange(16_000) == 9_000, value, noise(1)) for value in (np.nan, np.inf))
WEB_PAGE = b"\n<!DOCTYPE html><title>404</title>" * 20

REFUSALS: list[tuple[str, bytes]] = [
    ("empty", b""),
    ("not audio", b"\0"),
    ("not audio", WEB_PAGE),
    ("not audio", np.random.default_rng(5).bytes(5_000)),
    ("not audio", b"RIFF\x10\0\0\0AVI LIST" + bytes(40)),
    ("truncated", WHOLE[:-2]),
    ("truncated", WHOLE[:44]),
    ("truncated", WHOLE[:30]),
    ("truncated", lengthened(WHOLE, 2**31 - 1)),
    ("truncated", wav(noise(1), subtype="FLOAT")[:-1_000]),
    ("truncated", encode(noise(1), 16_000, "AIFF", "PCM_16")[:-2]),
    ("lying header", lengthened(WHOLE, 16_000)),
    ("lying header", lengthened(WHOLE, 0)),
    ("lying header", WHOLE + WHOLE),
    ("lying header", WHOLE[:24] + struct.pack("<I", 44_100) + WHOLE[28:]),
    ("truncated", FLAC[: len(FLAC) // 2]),
    ("truncated", flac_of(20_000)),
    ("lying header", flac_of(9_000, keeps_md5=True)),
    ("damaged", flipped(FLAC, len(FLAC) // 2)),
    ("several streams", FLAC + FLAC),
    ("truncated", MP3[: len(MP3) // 2]),
    ("truncated", MP3[:-10]),
    ("damaged", MP3[: len(MP3) // 2] + b"junk" * 9 + MP3[len(MP3) // 2 :]),
    ("lying header", MP3 + MP3),
    ("truncated", VORBIS[:-5]),
    ("truncated", VORBIS[: last_page(VORBIS)]),
    ("damaged", flipped(VORBIS, len(VORBIS) // 2)),
    ("damaged", flipped(OPUS, len(OPUS) // 2)),
    ("several streams", VORBIS + VORBIS),
    ("truncated", OPUS[: last_page(OPUS)]),
    ("not finite", wav(NAN, subtype="FLOAT")),
    ("not finite", wav(INF, subtype="FLOAT")),
    ("not finite", wav(INF, 44_100, subtype="FLOAT")),
    ("not finite", wav(np.where(np.isinf(INF), 1e30, INF), 44_100, subtype="FLOAT")),
    ("silent", wav(np.zeros(16_000))),
    ("silent", wav(noise(1) * 1e-4, subtype="FLOAT")),
    ("silent", wav(np.full(16_000, 0.5))),  # an offset is not a sound
    ("too short", wav(noise(0.099))),
    ("too short", wav(np.zeros(0))),
    ("too long", wav(noise(3))),
    ("too long", encode(noise(3), 16_000, "OGG", "VORBIS")),
    ("too long", flac_of(2**36 - 1)),
    ("wrong rate", wav(noise(1), 7_999)),
    ("wrong rate", wav(noise(1), 192_001)),
    ("wrong rate", wav(noise(1), 4_000, "PCM_24")),
    ("too many channels", wav(np.zeros((100, 9)))),
    ("too many channels", wav(np.zeros((100, 9)), subtype="FLOAT")),
]


@pytest.mark.parametrize("number", range(len(REFUSALS)), ids=lambda number: REFUSALS[number][0])
def test_what_cannot_be_used_is_refused_with_its_reason(number: int, tmp_path: Path) -> None:
    expected, content = REFUSALS[number]
    (tmp_path / "file").write_bytes(content)
    assert reason(content, max_duration_s=2.5)[0] == expected
    assert reason(tmp_path / "file", max_duration_s=2.5) == reason(content, max_duration_s=2.5)


@pytest.mark.parametrize(
    "content", [WHOLE, FLAC, MP3, VORBIS, OPUS], ids=["wav", "flac", "mp3", "vorbis", "opus"]
)
def test_the_whole_file_is_heard_and_any_part_of_it_is_not(content: bytes) -> None:
    whole = len(waveform.decode(content))
    for count in np.random.default_rng(2).integers(len(content), size=40):
        reason(content[:count])
    assert len(waveform.decode(content)) == whole


@pytest.mark.parametrize(
    ("form", "codec", "options"),
    [("webm", "libopus", {}), ("webm", "libopus", {"live": "1"}), ("mp4", "aac", {}), ("adts", "aac", {})],
)
def test_no_part_of_a_browsers_recording_passes_for_all_of_it(
    form: str, codec: str, options: dict[str, str]
) -> None:
    pytest.importorskip("av")
    content = media(noise(1, rate_hz=48_000), 48_000, form, codec, **options)
    whole = len(waveform.decode(content))
    told = Counter[str]()
    for count in np.random.default_rng(3).integers(200, len(content) - 50, size=30):
        told[reason(content[:count])[0]] += 1
    assert told["truncated"] >= 28  # the rest was cut before any sound
    assert whole >= 16_000


@pytest.mark.parametrize(
    ("label", "content"),
    [
        ("a list of tracks behind the sound", WHOLE + b"LIST\x1a\0\0\0INFOISFT\x0e\0\0\0Lavf58.29.100\0"),
        ("an ID3 tag behind the sound", WHOLE + b"TAG" + bytes(125)),
        ("padding behind the sound", WHOLE + bytes(1_000)),
        ("an ID3 tag before a FLAC", b"ID3\4\0\0\0\0\0\x14" + bytes(20) + FLAC),
        ("an ID3 tag behind an MP3", MP3 + b"TAG" + bytes(125)),
        ("an ID3 tag before an MP3", b"ID3\4\0\0\0\0\x08\0" + bytes(1_024) + MP3),
        ("an APE tag behind an MP3", MP3 + b"APETAGEX" + struct.pack("<4I8x", 2_000, 32, 0, 0) + bytes(32)),
        ("zeros behind an MP3", MP3 + bytes(100_000)),
        ("no sums in a FLAC", flac_of(16_000)),
    ],
)
def test_what_programs_add_to_files_does_no_harm(label: str, content: bytes) -> None:
    assert len(waveform.decode(content)) in (16_000, len(waveform.decode(MP3)))


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    assert reason(tmp_path / "nowhere")[0] == "unreadable"
    assert reason(tmp_path)[0] == "unreadable"


def test_a_refusal_survives_the_way_between_processes() -> None:
    refusal = pickle.loads(pickle.dumps(Unusable("a.wav is silent.", "silent")))
    assert (str(refusal), refusal.reason, type(refusal)) == ("a.wav is silent.", "silent", Unusable)


def test_damage_in_ogg_pages_with_right_checksums_ends_in_a_refusal_or_in_sound() -> None:
    for number in range(60):
        place = int(np.random.default_rng(number).integers(len(OPUS)))
        with contextlib.suppress(Unusable):
            assert len(waveform.decode(renumbered(flipped(OPUS, place)))) > 0


# --- 2,000 broken files --------------------------------------------------------------------------


def test_2000_broken_files_are_told_apart_in_bounded_memory() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz_audio", "2000", "11"],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3_000:]
    told = json.loads(done.stdout)
    assert told["memory_mib"] < 64
    outcomes = told["outcomes"]
    expected = {"empty", "not audio", "truncated", "damaged", "lying header", "several streams", "wrong rate"}
    expected |= {"not finite", "too short", "silent", "heard"}
    assert expected <= set(outcomes)
    assert sum(outcomes.values()) >= 2_000
    assert outcomes["heard"] < 500


# --- splitting -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(25))
def test_splitting_loses_nothing_and_keeps_to_its_limits(seed: int) -> None:
    rng = np.random.default_rng(seed)
    limit_s = float(rng.choice([1.0, 1.37, 5.0, 30.0]))
    count = int(
        rng.choice([1, 1_600, int(limit_s * 16_000) + int(rng.integers(-2, 3)), rng.integers(2_000_000)])
    )
    samples = rng.standard_normal(count).astype(np.float32) * rng.choice([0, 0.1, 1])
    samples[: count // 3] *= float(rng.choice([0, 1]))
    pieces = ingest.split(samples, limit_s)
    assert [start for start, _ in pieces] == [0, *(stop for _, stop in pieces[:-1])]
    assert pieces[-1][1] == count
    lengths = [stop - start for start, stop in pieces]
    assert max(lengths) <= limit_s * 16_000
    assert len(pieces) == 1 or min(lengths) >= 1_600
    assert all(length >= limit_s * 16_000 * 0.6 for length in lengths[:-1])


def test_the_cut_lies_in_the_pause() -> None:
    samples = noise(80)
    pauses = [(25.0, 25.4), (49.0, 49.3), (72.0, 72.25)]
    for start_s, stop_s in pauses:
        samples[int(start_s * 16_000) : int(stop_s * 16_000)] *= 0.01
    cuts = [stop / 16_000 for _, stop in ingest.split(samples)[:-1]]
    assert [start_s < cut < stop_s for cut, (start_s, stop_s) in zip(cuts, pauses, strict=False)] == [
        True
    ] * 3


def test_a_limit_below_a_second_is_refused() -> None:
    with pytest.raises(BadInput, match=r"max_clip_s is 0\.5"):
        ingest.split(noise(1), 0.5)


@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize(
    ("form", "subtype", "rate_hz"), [("WAV", "PCM_16", 16_000), ("FLAC", "PCM_24", 44_100)]
)
def test_clips_of_a_recording_are_its_samples(
    form: str, subtype: str, rate_hz: int, remembers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one pass or two, with an offset and too loud: the clips are the pieces of the whole recording."""
    if not remembers:
        monkeypatch.setattr(ingest, "MAX_KEPT_S", 1.0)
    samples = np.clip(noise(20.5, rate_hz=rate_hz) + 0.1, -1, 1)
    content = encode(samples, rate_hz, form, subtype)
    whole = waveform.decode(content)
    clips = [clip for clip in ingest.clips(content, "a", max_clip_s=3) if isinstance(clip, Clip)]
    np.testing.assert_array_equal(np.concatenate([clip.samples for clip in clips]), whole)
    starts = [round(clip.provenance["start_s"] * 16_000) for clip in clips]
    assert list(zip(starts, [*starts[1:], len(whole)], strict=True)) == ingest.split(whole, 3)
    before = ("offset removed",) if rate_hz == 16_000 else ("resampled", "offset removed")
    assert {clip.changes for clip in clips} == {(*before, "split")}
    assert clips[0].provenance["source_rate_hz"] == rate_hz


def test_a_short_recording_is_one_clip_and_not_split() -> None:
    (clip,) = ingest.clips(WHOLE)
    assert isinstance(clip, Clip)
    assert (clip.changes, len(clip.samples), clip.provenance["source_format"]) == ((), 16_000, "wav")


def test_a_silent_piece_is_left_out_by_itself() -> None:
    samples = noise(12)
    samples[32_000:128_000] = 0
    made = list(ingest.clips(wav(samples), "long.wav", max_clip_s=3))
    dropped = [each for each in made if isinstance(each, Dropped)]
    assert {each.reason for each in dropped} == {"silent piece"}
    assert dropped[0].name.startswith("long.wav from ")
    kept = sum(len(each.samples) for each in made if isinstance(each, Clip))
    assert 6 * 16_000 <= kept < 12 * 16_000 - 32_000


def test_a_file_that_breaks_off_gives_no_clip_at_all() -> None:
    content = encode(noise(20), 16_000, "FLAC", "PCM_16")
    with pytest.raises(Unusable):
        next(ingest.clips(content[: len(content) * 9 // 10], "a", max_clip_s=2))


def test_a_file_that_changes_between_the_passes_stops_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest, "MAX_KEPT_S", 1.0)
    (tmp_path / "a.wav").write_bytes(wav(noise(9)))
    clips = ingest.clips(tmp_path / "a.wav", max_clip_s=2)
    survey = ingest.survey

    def then_it_changes(*args: Any, **options: Any) -> Any:
        found = survey(*args, **options)
        (tmp_path / "a.wav").write_bytes(wav(noise(7)))
        return found

    monkeypatch.setattr(ingest, "survey", then_it_changes)
    with pytest.raises(BadInput, match="changed while it was read"):
        list(clips)


def test_an_hour_takes_no_more_memory_than_ten_minutes(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path\n"
        "from omni_model.audio import ingest; from tests import fuzz_audio\n"
        "total = sum(len(clip.samples) for clip in ingest.clips(Path(sys.argv[1])))\n"
        "print(total, fuzz_audio.peak_mib())"
    )
    peaks = {}
    for minutes in (10, 60):
        path = tmp_path / "long.wav"
        pcm = np.tile((noise(60, rate_hz=8_000) * 32_768).astype("<i2"), minutes)
        soundfile.write(path, pcm, 8_000)
        told = subprocess.run(
            [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
        )
        total, peaks[minutes] = (float(word) for word in told.stdout.split())
        assert total == minutes * 60 * 16_000
    assert peaks[60] < peaks[10] * 1.1


# --- a folder ------------------------------------------------------------------------------------


def fill(place: Path, count: int = 30) -> None:
    """Files of many kinds in two folders, some described."""
    (place / "voices" / "anna b").mkdir(parents=True)
    rows = []
    for number in range(count):
        path = f"voices/anna b/take {number:03d}.wav" if number % 2 else f"take-{number:03d}.flac"
        form = "WAV" if number % 2 else "FLAC"
        (place / path).write_bytes(encode(noise(0.2 + number % 3 / 10, number), 16_000, form, "PCM_16"))
        if number % 3:
            split = ("train", "train", "validation", "test")[number % 4]
            rows.append({"audio": path, "transcript": f"words {number}", "speaker": "anna", "split": split})
    rows[0] |= {"labels": {"mood": "calm"}, "licence": "CC-BY-4.0"}
    (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_for(place: Path, **settings: Any) -> FolderRecipe:
    outside = OutsideFolder(digest=digest_folder(place), path=str(place))
    return FolderRecipe(**{"folder": outside, "clips_per_shard": 6, "licence": "CC0-1.0"} | settings)


def workspace(directory: Path) -> Workspace:
    (directory / "out").mkdir(parents=True, exist_ok=True)
    (directory / "partial").mkdir(exist_ok=True)
    return Workspace(directory, 0, Metrics(directory / "metrics.jsonl"), COMPONENTS)


def imported(directory: Path, recipe: FolderRecipe) -> AudioCorpus:
    """Run the stage and seal its artifact as the runner would, so that later ones find it."""
    facts: dict[str, Any] = folder.import_folder(recipe, work=workspace(directory), runtime=Runtime())
    files = hash_payload(directory / "out")
    key = hashlib.sha256(str(directory).encode()).hexdigest()
    manifest = Manifest("import_folder", key, "AudioCorpus", COMPONENTS, files, facts, {}, {}, {})
    manifest.write(directory)
    return AudioCorpus("import_folder", key, str(directory), content_digest(files), **facts)


def rows_by_file(corpus: AudioCorpus) -> dict[str, dict[str, Any]]:
    return {row["provenance"]["file"]: row for row in corpora.read_clips(corpus)}


def test_a_folder_becomes_a_corpus(tmp_path: Path) -> None:
    fill(tmp_path / "mine")
    (tmp_path / "mine" / "cover.jpg").write_bytes(b"\xff\xd8")
    (tmp_path / "mine" / ".hidden.wav").write_bytes(b"")
    before = hash_folder(tmp_path / "mine")
    corpus = imported(tmp_path / "a", recipe_for(tmp_path / "mine"))
    assert (corpus.num_clips, corpus.num_dropped) == (30, 0)
    rows = rows_by_file(corpus)
    assert set(rows) == {file.path for file in before} - {"cover.jpg", "metadata.jsonl"}
    first = rows["voices/anna b/take 001.wav"]
    assert (first["transcript"], first["speaker"], first["labels"]) == ("words 1", "anna", {"mood": "calm"})
    assert (first["licence"], first["split"]) == ("CC-BY-4.0", "train")
    assert first["provenance"]["file_sha256"] == sha256_file(tmp_path / "mine" / "voices/anna b/take 001.wav")
    assert first["key"].startswith("voices-anna-b-take-001-")
    bare = rows["take-000.flac"]
    assert (bare["transcript"], bare["split"], bare["licence"]) == ("", "train", "CC0-1.0")
    for shard in corpora.shard_paths(corpus):
        for key, sound, row in corpora.read_shard(shard):
            original = (tmp_path / "mine" / row["provenance"]["file"]).read_bytes()
            np.testing.assert_array_equal(waveform.decode(sound), waveform.decode(original))
            assert shard.name.startswith(f"clips-{row['split']}-")
            assert rows[row["provenance"]["file"]]["key"] == key
    assert hash_folder(tmp_path / "mine") == before
    assert corpus.digest == imported(tmp_path / "elsewhere" / "b", recipe_for(tmp_path / "mine")).digest


def test_drops_and_changes_are_counted_by_reason(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    long = noise(5)
    long[32_000:] = 0
    files = {"good.wav": WHOLE, "long.wav": wav(long), "page.mp3": WEB_PAGE, "cut.flac": FLAC[:5_000]}
    files |= {
        "hush.wav": wav(np.zeros(9_000)),
        "none.ogg": b"",
        "cd.wav": wav(np.stack([noise(1)] * 2, 1), 44_100),
    }
    for name, content in files.items():
        (place / name).write_bytes(content)
    row = {"audio": "long.wav", "transcript": "all of it", "labels": {"room": "hall"}}
    (place / "metadata.jsonl").write_text(json.dumps(row))
    corpus = imported(tmp_path / "a", recipe_for(place, max_clip_s=1.5))
    index = corpora.read_index(corpus)
    dropped = {"not audio": 1, "truncated": 1, "silent": 1, "empty": 1, "silent piece": 2}
    assert index["dropped"] == dropped
    assert corpus.num_dropped == 6
    assert ["cut.flac", "truncated"] in index["dropped_names"]
    rows = corpora.read_clips(corpus)
    pieces = [row for row in rows if row["provenance"]["file"] == "long.wav"]
    assert index["changed"] == {"mixed down": 1, "resampled": 1, "split": len(pieces)}
    assert len({row["key"][:-6] for row in pieces}) == 1
    assert [row["key"][-6:] for row in pieces] == [f"p{number:05d}" for number in range(len(pieces))]
    for row in pieces:  # the words belong to all of it, the room to every piece
        assert (row["transcript"], row["labels"]) == ("", {"room": "hall"})
        assert row["provenance"]["transcript_of_recording"] == "all of it"


def test_one_file_more_or_less_leaves_the_other_shards_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "mine"
    fill(place, 60)
    first = imported(tmp_path / "store" / "a", recipe_for(place))
    read: list[str] = []
    clips = ingest.clips

    def counted(source: Path, name: str, **options: Any) -> Any:
        read.append(name)
        return clips(source, name, **options)

    monkeypatch.setattr(ingest, "clips", counted)
    (place / "take-017-more.wav").write_bytes(WHOLE)
    second = imported(tmp_path / "store" / "b", recipe_for(place))
    assert second.num_clips == first.num_clips + 1
    assert "take-017-more.wav" in read
    assert len(read) <= 24  # of 61: its shard, and at most a neighbour
    shards = [
        {shard["sha256"] for shard in corpora.read_index(corpus)["shards"]} for corpus in (first, second)
    ]
    assert len(shards[1] - shards[0]) <= 2
    assert len(shards[1] & shards[0]) >= 6
    alone = imported(tmp_path / "alone" / "b", recipe_for(place))
    assert alone.digest == second.digest


def test_a_lent_shard_that_was_damaged_is_made_again(tmp_path: Path) -> None:
    fill(tmp_path / "mine")
    recipe = recipe_for(tmp_path / "mine")
    first = imported(tmp_path / "store" / "a", recipe)
    shard = corpora.shard_paths(first)[0]
    shard.write_bytes(flipped(shard.read_bytes(), 700))
    assert imported(tmp_path / "store" / "b", recipe).digest == first.digest


def test_shards_are_of_sensible_size_and_move_only_near_a_change() -> None:
    sources = [folder.Source(f"{number:05d}.wav", 1_000, "", folder.Known()) for number in range(5_000)]
    groups = folder.chunks(sources, 50)
    assert [source for group in groups for source in group] == sources
    sizes = [len(group) for group in groups]
    assert max(sizes) <= 100
    assert min(sizes[:-1]) >= 25
    assert 40 <= np.mean(sizes) <= 60
    before = {tuple(source.path for source in group) for group in groups}
    changed = []
    for number in range(0, 5_000, 199):
        fewer = folder.chunks([*sources[:number], *sources[number + 1 :]], 50)
        changed.append(len({tuple(source.path for source in group) for group in fewer} - before))
    assert np.mean(changed) < 1.6
    assert max(changed) <= 6
    large = [folder.Source(f"{number}.wav", 200 << 20, "", folder.Known()) for number in range(4)]
    assert [len(group) for group in folder.chunks(large, 50)] == [1, 1, 1, 1]


def test_keys_follow_the_path_and_never_meet() -> None:
    paths = [
        "a b.wav",
        "a-b.wav",
        "a b.flac",
        "a/b.wav",
        "ä.wav",
        "ö.wav",
        "x" * 200 + ".wav",
        "-.wav",
        "a\udce9.wav",
    ]
    keys = [folder.Source(path, 1, "", folder.Known()).key for path in paths]
    assert len(set(keys)) == len(paths)
    assert all(KEY_PATTERN.fullmatch(key) and len(key) < 80 for key in keys)
    assert keys[0].startswith("a-b-")


def test_killed_at_any_file_the_import_ends_in_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "mine")
    recipe = recipe_for(tmp_path / "mine")
    whole = imported(tmp_path / "whole" / "a", recipe)
    clips = ingest.clips
    lives = 0
    read = 0

    def dying(source: Path, name: str, **options: Any) -> Any:
        nonlocal lives, read
        if lives == 0:
            raise KeyboardInterrupt
        lives, read = lives - 1, read + 1
        return clips(source, name, **options)

    monkeypatch.setattr(ingest, "clips", dying)
    for lives in (0, 4, 9, 17):  # noqa: B007
        with pytest.raises(KeyboardInterrupt):
            folder.import_folder(recipe, work=workspace(tmp_path / "killed" / "a"), runtime=Runtime())
    lives = 100
    again = imported(tmp_path / "killed" / "a", recipe)
    assert again.digest == whole.digest
    assert read < 4 + 9 + 17 + 30  # finished shards were not made again


def test_the_folder_must_be_what_was_planned(tmp_path: Path) -> None:
    fill(tmp_path / "mine", 4)
    recipe = recipe_for(tmp_path / "mine")
    (tmp_path / "mine" / "late.wav").write_bytes(WHOLE)
    with pytest.raises(BadInput, match=r"mine has changed since the run was planned"):
        imported(tmp_path / "a", recipe)
    with pytest.raises(BadInput, match="no path or no digest"):
        imported(tmp_path / "b", replace(recipe, folder=OutsideFolder(path=str(tmp_path / "mine"))))
    assert not list((tmp_path / "a" / "partial").iterdir())


def test_a_file_that_changes_during_the_import_stops_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "mine")
    recipe = recipe_for(tmp_path / "mine")
    clips = ingest.clips

    def meddling(source: Path, name: str, **options: Any) -> Any:
        (tmp_path / "mine" / "take-028.flac").write_bytes(FLAC)
        return clips(source, name, **options)

    monkeypatch.setattr(ingest, "clips", meddling)
    with pytest.raises(BadInput, match=r"take-028\.flac changed during the import"):
        imported(tmp_path / "a", recipe)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ('{"audio": "a.wav"}\n{"audio": "a.wav", "mood": "calm"}', r"line 2: the field 'mood' is unknown"),
        ('\n\n{"audio": "b.wav"}', r"line 3: there is no file 'b\.wav'"),
        ('{"audio": "../a.wav"}', r"line 1: there is no file '\.\./a\.wav'"),
        ('{"audio": "a.wav", "split": "dev"}', r"line 1: the split 'dev' is none of train, validation, test"),
        ('{"audio": "a.wav"', r"line 1 is not JSON"),
        ('["a.wav"]', r"line 1 is not an object"),
        ('{"transcript": "x"}', r"line 1: `audio` is missing"),
        ('{"audio": "a.wav", "transcript": 3}', r"line 1: transcript must be text"),
        ('{"audio": "a.wav", "labels": {"mood": 1}}', r"line 1: labels must be text|labels an object"),
        ('{"audio": "a.wav", "labels": "calm"}', r"line 1: labels must be an object"),
        ('{"audio": "a.wav"}\n{"audio": "./a.wav"}', r"line 2: 'a\.wav' is described by line 1 already"),
        ("[" * 100_000, r"line 1 is not JSON"),
    ],
)
def test_bad_metadata_is_refused_by_line_before_any_work(lines: str, says: str, tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "a.wav").write_bytes(WHOLE)
    (place / "metadata.jsonl").write_text(lines)
    with pytest.raises(BadInput, match=says) as refusal:
        imported(tmp_path / "a", recipe_for(place))
    assert "metadata.jsonl" in str(refusal.value)
    assert not list((tmp_path / "a" / "partial").iterdir())


def test_metadata_of_another_name_and_encoding(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    (place / "a.bin").write_bytes(WHOLE)  # no audio suffix, but named
    (place / "about.jsonl").write_bytes('\ufeff{"audio": "a.bin", "transcript": "grün"}\r\n'.encode())
    corpus = imported(tmp_path / "a", recipe_for(place, metadata="about.jsonl"))
    assert corpora.read_clips(corpus)[0]["transcript"] == "grün"
    with pytest.raises(BadInput, match=r"other\.jsonl does not exist"):
        imported(tmp_path / "b", recipe_for(place, metadata="other.jsonl"))
    (place / "about.jsonl").write_bytes(b"\xff\xfe{")
    with pytest.raises(BadInput, match="not UTF-8"):
        imported(tmp_path / "c", recipe_for(place, metadata="about.jsonl"))


def test_what_no_folder_of_sound_is(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="is not a folder"):
        digest_folder(tmp_path / "nowhere")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("")
    with pytest.raises(BadInput, match="holds no audio files"):
        imported(tmp_path / "a", recipe_for(tmp_path / "notes"))


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    place, other = tmp_path / "mine", tmp_path / "other"
    (place / "in").mkdir(parents=True)
    (other / "deep").mkdir(parents=True)
    (other / "deep" / "b.wav").write_bytes(WHOLE)
    (place / "in" / "up").symlink_to(place)
    (place / "other").symlink_to(other)
    (other / "back").symlink_to(place)
    (place / "a.wav").symlink_to(other / "deep" / "b.wav")
    assert list_folder(place) == ["a.wav", "other/deep/b.wav"]
    (place / "dead.wav").symlink_to(place / "nowhere")
    with pytest.raises(BadInput, match=r"dead\.wav is a link that leads nowhere"):
        list_folder(place)
    (place / "dead.wav").unlink()
    (place / "self.wav").symlink_to(place / "self.wav")
    with pytest.raises(BadInput, match=r"self\.wav (is a link that leads nowhere|cannot be read)"):
        list_folder(place)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may read everything")
def test_what_may_not_be_read_is_named_really(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(WHOLE)
    (tmp_path / "a.wav").chmod(0)
    with pytest.raises(BadInput, match=r"a\.wav cannot be read"):
        digest_folder(tmp_path)


def test_what_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from omni_model import outside

    def forbidden(path: Path) -> str:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.wav").write_bytes(WHOLE)
    monkeypatch.setattr(outside, "sha256_file", forbidden)
    with pytest.raises(BadInput, match=r"a\.wav cannot be read \(Permission denied\)"):
        digest_folder(tmp_path)


def test_names_that_are_no_text_are_imported(tmp_path: Path) -> None:
    place = tmp_path / "mine"
    place.mkdir()
    try:
        (place / os.fsdecode(b"caf\xe9.wav")).write_bytes(WHOLE)
        (place / os.fsdecode(b"caf\xe9.flac")).write_bytes(FLAC)
    except OSError:
        pytest.skip("this file system wants UTF-8")
    corpus = imported(tmp_path / "a", recipe_for(place))
    assert {row["provenance"]["file"] for row in corpora.read_clips(corpus)} == {
        "caf\ufffd.wav",
        "caf\ufffd.flac",
    }


def test_a_digest_is_over_names_and_bytes_alone(tmp_path: Path) -> None:
    fill(tmp_path / "a", 6)
    fill(tmp_path / "b", 6)
    os.utime(tmp_path / "b" / "take-000.flac", (1, 1))
    assert digest_folder(tmp_path / "a") == digest_folder(tmp_path / "b")
    changes: list[Callable[[Path], object]] = [
        lambda place: (place / "take-000.flac").rename(place / "take-x.flac"),
        lambda place: (place / "take-x.flac").write_bytes(FLAC),
        lambda place: (place / "take-x.flac").unlink(),
    ]
    seen = {digest_folder(tmp_path / "a")}
    for change in changes:
        change(tmp_path / "b")
        seen.add(digest_folder(tmp_path / "b"))
    assert len(seen) == 4


def test_hashes_are_remembered_and_not_trusted_after_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from omni_model import outside

    fill(tmp_path / "a", 6)
    memory = tmp_path / "memory" / "a.json"
    first = digest_folder(tmp_path / "a", memory)
    read: list[str] = []
    monkeypatch.setattr(outside, "sha256_file", lambda path: read.append(path.name) or sha256_file(path))
    assert digest_folder(tmp_path / "a", memory) == first
    assert read == []
    (tmp_path / "a" / "take-000.flac").write_bytes(FLAC)
    assert digest_folder(tmp_path / "a", memory) == digest_folder(tmp_path / "a") != first
    assert read[0] == "take-000.flac"
    memory.write_text("{broken")
    assert digest_folder(tmp_path / "a", memory) == digest_folder(tmp_path / "a")
