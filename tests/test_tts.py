"""Text-to-speech servers: asked as the real ones are, disbelieved when they fail, never asked twice."""

import json
import signal
import subprocess
import sys
import time
import wave
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soxr

from omni_model.artifacts import AudioCorpus, Manifest, content_digest, hash_payload
from omni_model.audio import corpora, speech, tts, tts_exchange, waveform
from omni_model.audio.encoder import make_encoder
from omni_model.config import (
    BadInput,
    CosyVoiceRecipe,
    EncoderRecipe,
    IndexTtsRecipe,
    OutsideFolder,
    Runtime,
    SpeechRecipe,
    SplitSizes,
    SpokenLine,
)
from omni_model.outside import digest_folder
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from tests.test_runs import ROOT, environment
from tests.tts_servers import PITCH_HZ, CosyVoiceHandler, IndexTtsHandler, TtsServer, serving

TEXTS = (
    "The boats come home before the evening.",
    "There is somebody at the garden gate.",
    "We have sold the old piano at last.",
    "It is going to rain in the mountains.",
    "Nobody has seen the key to the cellar.",
    "The lamp in the hall is still burning.",
)
LINES = tuple(SpokenLine(text, style) for text in TEXTS[:2] for style in ("happy", "sad"))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tts_exchange, "RETRY_PAUSES_S", (0.0, 0.0, 0.0))


def workspace(directory: Path, components: dict[str, Any] | None = None) -> Workspace:
    (directory / "out").mkdir(parents=True, exist_ok=True)
    (directory / "partial").mkdir(exist_ok=True)
    return Workspace(directory, 1, Metrics(directory / "metrics.jsonl"), components or {})


def synthesize(
    recipe: CosyVoiceRecipe | IndexTtsRecipe, directory: Path, components: dict[str, Any] | None = None
) -> AudioCorpus:
    stage: Callable[..., dict[str, Any]] = (
        tts.synthesize_cosyvoice if isinstance(recipe, CosyVoiceRecipe) else tts.synthesize_indextts
    )
    facts = stage(recipe, work=workspace(directory, components), runtime=Runtime())
    files = hash_payload(directory / "out")
    Manifest("tts", "0" * 64, "AudioCorpus", components or {}, files, facts, {}, {}, {}).write(directory)
    return AudioCorpus("tts", "0" * 64, str(directory), content_digest(files), **facts)


def recording(path: Path, rate_hz: int = 16_000, seconds: float = 2.0) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(rate_hz)
        rng = np.random.default_rng(len(path.stem))
        file.writeframes((rng.standard_normal(round(rate_hz * seconds)) * 3000).astype("<i2").tobytes())


@pytest.fixture
def script(tmp_path: Path) -> OutsideFolder:
    """A folder with one voice whose words are known and one whose are not."""
    folder = tmp_path / "script"
    folder.mkdir()
    recording(folder / "carla.wav")
    (folder / "carla.txt").write_text("What Carla says in her recording.\n")
    recording(folder / "dimitri.wav")
    return OutsideFolder("", str(folder))


def sounds(corpus: AudioCorpus) -> dict[str, np.ndarray]:
    return {
        key: waveform.decode(content, key)
        for path in corpora.shard_paths(corpus)
        for key, content, _ in corpora.read_shard(path)
    }


def pitch_hz(samples: np.ndarray) -> float:
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 2**17))
    return float(np.argmax(spectrum) * waveform.SAMPLE_RATE_HZ / 2**17)


# --- the protocols -------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["1", "2", "3"])
def test_cosyvoice_is_asked_by_its_own_protocol(version: str, script: OutsideFolder, tmp_path: Path) -> None:
    styled, plain = SpokenLine(TEXTS[0], "angry"), SpokenLine(TEXTS[1])
    own = version == "1"
    lines = {"anna": (styled, plain) if own else (plain,), "carla": (plain,) if own else (styled, plain)}
    with serving(CosyVoiceHandler, TtsServer(version=version)) as server:
        for voice, spoken in {**lines, "dimitri": (plain,)}.items():
            recipe = CosyVoiceRecipe(
                lines=spoken, script=script, voices=(voice,), version=version, server=server.url
            )
            corpus = synthesize(recipe, tmp_path / voice)
            clips = {clip["transcript"]: clip for clip in corpora.read_clips(corpus)}
            for samples in sounds(corpus).values():
                assert pitch_hz(samples) == pytest.approx(PITCH_HZ, rel=0.005)  # the rate was right
            assert {clip["speaker"] for clip in clips.values()} == {voice}
            assert clips[TEXTS[1]]["labels"] == {}
            if styled in spoken:
                assert clips[TEXTS[0]]["labels"] == {"emotion": "angry"}
    asked = [(request["path"].removeprefix("/inference_"), request) for request in server.asked]
    if own:
        names = ["instruct", "sft", "zero_shot", "cross_lingual"]
    else:
        names = ["sft", "instruct2", "zero_shot", "cross_lingual"]
    assert [name for name, _ in asked] == names
    for name, request in asked:
        assert ("prompt_wav" in request) == (name in ("instruct2", "zero_shot", "cross_lingual"))
        if "instruct" in name:
            assert "angry" in request["instruct_text"]
            assert request["instruct_text"].endswith("<|endofprompt|>")
    assert asked[2][1]["prompt_text"].endswith("What Carla says in her recording.")
    recorded = (Path(script.path) / "carla.wav").read_bytes()
    assert asked[2][1]["prompt_wav"] == recorded


def test_provenance_names_everything_that_decided_the_sound(script: OutsideFolder, tmp_path: Path) -> None:
    with serving(CosyVoiceHandler, TtsServer()) as server:
        recipe = CosyVoiceRecipe(
            lines=LINES[:1], script=script, voices=("carla",), licence="CC-BY-4.0", server=server.url
        )
        (clip,) = corpora.read_clips(synthesize(recipe, tmp_path / "corpus"))
    provenance = clip["provenance"]
    assert clip["licence"] == "CC-BY-4.0"
    assert provenance["generator"] == "cosyvoice"
    assert (provenance["model"], provenance["version"]) == ("CosyVoice2-0.5B", "2")
    assert provenance["endpoint"] == "/inference_instruct2"
    assert "happy" in provenance["request"]["instruct_text"]
    assert len(provenance["prompt_sha256"]) == 64
    assert server.url not in json.dumps(clip)


def test_indextts_is_asked_by_its_own_protocol(tmp_path: Path) -> None:
    order = ("happy", "angry", "sad", "afraid", "disgusted", "melancholic", "surprised", "calm")
    lines = (*(SpokenLine(TEXTS[0], style) for style in order), SpokenLine(TEXTS[0]))
    with serving(IndexTtsHandler, TtsServer()) as server:
        recipe = IndexTtsRecipe(lines=lines, voices=("anna",), emotion_weight=0.6, server=server.url)
        corpus = synthesize(recipe, tmp_path / "corpus")
    assert corpus.num_clips == 9
    for place, request in enumerate(server.asked):
        assert request["path"] == "/tts_url"
        assert request["spk_audio_path"] == "anna"
        assert request["emo_control_method"] == (2 if place < 8 else 0)
        assert request["emo_vec"] == [0.6 if n == place else 0.0 for n in range(8)]
        assert request["emo_weight"] == 1.0  # the strength is in the vector, where every server looks
    emotions = {clip["labels"].get("emotion") for clip in corpora.read_clips(corpus)}
    assert emotions == {*order, None}
    assert all(pitch_hz(samples) == pytest.approx(PITCH_HZ, rel=0.005) for samples in sounds(corpus).values())


def test_lines_come_from_the_script_else_from_our_own_sentences(
    script: OutsideFolder, tmp_path: Path
) -> None:
    with serving(CosyVoiceHandler, TtsServer()) as server:
        own = CosyVoiceRecipe(script=script, voices=("carla",), split="validation", server=server.url)
        corpus = synthesize(own, tmp_path / "own")
        assert corpus.num_clips == 6 * 8  # each sentence with every emotion: the same words, another sound
        (Path(script.path) / "lines.jsonl").write_text(
            '{"text": "Good morning to you all."}\n\n{"text": "Good night.", "style": "calm"}\n'
        )
        corpus = synthesize(CosyVoiceRecipe(script=script, server=server.url), tmp_path / "theirs")
    assert corpus.num_clips == 4  # every recording in the folder is a voice
    assert {clip["speaker"] for clip in corpora.read_clips(corpus)} == {"carla", "dimitri"}


def test_our_sentences_are_apart_between_the_splits() -> None:
    sentences = json.loads((Path(tts.__file__).parent / "spoken_sentences.json").read_text())
    every = [text for texts in sentences.values() for text in texts]
    assert len(set(every)) == len(every)
    assert set(sentences) == {"train", "validation", "test"}


# --- failures ------------------------------------------------------------------------------------


def cosyvoice(server: TtsServer, **more: Any) -> CosyVoiceRecipe:
    lines = tuple(SpokenLine(text) for text in TEXTS)
    return CosyVoiceRecipe(**{"lines": lines, "voices": ("anna",), "server": server.url, **more})


def indextts(server: TtsServer, **more: Any) -> IndexTtsRecipe:
    lines = tuple(SpokenLine(text) for text in TEXTS)
    return IndexTtsRecipe(**{"lines": lines, "voices": ("anna",), "server": server.url, **more})


SHARED_FAULTS = {
    "500": "HTTP status 500",
    "page": "an error instead of sound",
    "json": "an error instead of sound",
    "drop": "the connection was cut",
    "hang": "no reply in time",
}
COSYVOICE_FAULTS = {
    "short": "too short for its text",
    "cut": "the connection was cut",
    "empty": "an empty reply",
    "odd": "an odd number of bytes",
    "wrapped": "wrapped peaks",
    "babble": "too long for its text",
    "silent": "silent",
}


@pytest.mark.parametrize("always", [False, True], ids=["passing", "lasting"])
@pytest.mark.parametrize("fault", [*SHARED_FAULTS, *COSYVOICE_FAULTS])
def test_faults_of_cosyvoice_are_seen(
    fault: str, always: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tts_exchange, "REPLY_TIMEOUT_S", 0.3)

    def failing(number: int, fields: dict[str, Any]) -> str:
        return fault if fields["tts_text"] == TEXTS[2] and (always or number == 3) else ""

    with serving(CosyVoiceHandler, TtsServer(fault=failing)) as server:
        corpus = synthesize(cosyvoice(server), tmp_path / "corpus")
    index = corpora.read_index(corpus)
    if not always:  # asking again helped
        assert (corpus.num_clips, corpus.num_dropped) == (6, 0)
        assert len(server.asked) == 7
        return
    assert (corpus.num_clips, corpus.num_dropped) == (5, 1)
    assert len(server.asked) == 5 + 4
    reason = {**SHARED_FAULTS, **COSYVOICE_FAULTS}[fault]
    assert index["dropped"] == {reason: 1}
    assert index["dropped_names"] == [[f"anna: {TEXTS[2]}", reason]]


@pytest.mark.parametrize("fault", [*SHARED_FAULTS, "half"])
def test_faults_of_indextts_are_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tts_exchange, "REPLY_TIMEOUT_S", 0.3)

    def failing(number: int, fields: dict[str, Any]) -> str:
        return fault if fields["text"] == TEXTS[2] else ""

    with serving(IndexTtsHandler, TtsServer(fault=failing)) as server:
        corpus = synthesize(indextts(server), tmp_path / "corpus")
    reason = {**SHARED_FAULTS, "half": "truncated"}[fault]
    assert corpora.read_index(corpus)["dropped"] == {reason: 1}


def test_an_error_says_what_the_server_said(tmp_path: Path) -> None:
    with (
        serving(IndexTtsHandler, TtsServer(fault=lambda number, fields: "json")) as server,
        pytest.raises(tts_exchange.ServerFailed, match=r"2 of 6 .* CUDA out of memory.* run again"),
    ):
        synthesize(indextts(server), tmp_path / "corpus")


def test_too_many_failures_end_the_stage_and_keep_what_was_spoken(tmp_path: Path) -> None:
    broken = TtsServer(fault=lambda number, fields: "500" if fields["tts_text"] in TEXTS[2:4] else "")
    with serving(CosyVoiceHandler, broken) as server:
        with pytest.raises(tts_exchange.ServerFailed, match="2 of 6 clips of the voice anna"):
            synthesize(cosyvoice(server), tmp_path / "corpus")
        broken.fault = lambda number, fields: ""
        before = len(server.asked)
        corpus = synthesize(cosyvoice(server), tmp_path / "corpus")
    assert (corpus.num_clips, corpus.num_dropped) == (6, 0)
    assert len(server.asked) - before == 4  # the first two clips were there


def test_nobody_at_the_address(tmp_path: Path) -> None:
    with serving(CosyVoiceHandler, TtsServer()) as server:
        pass
    for recipe in (cosyvoice(server), indextts(server)):
        with pytest.raises(tts_exchange.ServerFailed, match=r"no \w+ server answers at http://127.* --set"):
            synthesize(recipe, tmp_path / "corpus")


def test_a_server_that_is_still_loading(tmp_path: Path) -> None:
    with serving(IndexTtsHandler, TtsServer(healthy=False)) as server:
        with pytest.raises(tts_exchange.ServerFailed, match="HTTP status 503 .*TTS model not initialized"):
            synthesize(indextts(server), tmp_path / "corpus")
        assert not server.asked


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (cosyvoice(TtsServer(url="127.0.0.1:50000")), "is no address"),
        (cosyvoice(TtsServer(url="http://h"), voices=()), "has no voices"),
        (cosyvoice(TtsServer(url="http://h"), lines=LINES), "emotions only for voices cloned"),
        (cosyvoice(TtsServer(url="http://h"), lines=(LINES[0], LINES[0]), version="1"), "there twice"),
        (cosyvoice(TtsServer(url="http://h"), lines=(SpokenLine(" . "),)), "nothing to speak"),
        (indextts(TtsServer(url="http://h"), voices=()), "has no voices"),
        (indextts(TtsServer(url="http://h"), emotion_weight=1.2), "at most 0.8"),
    ],
    ids=str,
)
def test_bad_recipes_are_refused_before_anybody_is_asked(recipe: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=words):
        synthesize(recipe, tmp_path / "corpus")
    assert not list((tmp_path / "corpus" / "out").iterdir())


def test_bad_scripts_are_refused(script: OutsideFolder, tmp_path: Path) -> None:
    folder = Path(script.path)
    recipe = CosyVoiceRecipe(script=script, server="http://h")
    recording(folder / "erik.wav", rate_hz=8_000)
    with pytest.raises(BadInput, match=r"erik.wav has 2.0 s at 8000 Hz"):
        synthesize(recipe, tmp_path / "corpus")
    (folder / "erik.wav").write_bytes(b"no sound")
    with pytest.raises(BadInput, match=r"erik.wav cannot be read as audio"):
        synthesize(recipe, tmp_path / "corpus")
    (folder / "erik.wav").unlink()
    for row in ('{"text": "One", "style": "bored"}', '{"words": "One"}', "[1]", "{"):
        (folder / "lines.jsonl").write_text('{"text": "Fine so far."}\n' + row)
        with pytest.raises(BadInput, match="lines.jsonl line 2 is no line"):
            synthesize(recipe, tmp_path / "corpus")


def test_a_script_that_changes_under_the_run_is_refused(script: OutsideFolder, tmp_path: Path) -> None:
    folder = Path(script.path)
    planned = OutsideFolder(digest_folder(folder), script.path)
    with serving(CosyVoiceHandler, TtsServer()) as server:
        recipe = CosyVoiceRecipe(lines=LINES[:1], script=planned, server=server.url)
        assert synthesize(recipe, tmp_path / "first").num_clips == 2
        recording(folder / "carla.wav", seconds=3.0)
        with pytest.raises(BadInput, match="has changed since this run was planned"):
            synthesize(recipe, tmp_path / "second")


def test_another_kind_of_server_is_refused_at_once(tmp_path: Path) -> None:
    with (
        serving(IndexTtsHandler, TtsServer()) as server,
        pytest.raises(BadInput, match=r"/inference_sft answers 404 .* CosyVoice"),
    ):
        synthesize(cosyvoice(server), tmp_path / "corpus")


# --- what a reply is judged by -------------------------------------------------------------------


def test_speech_at_full_scale_is_not_taken_for_wrapped_and_a_little_beyond_is(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    recipe = SpeechRecipe(clips=SplitSizes(train=24, validation=4, test=4))
    facts = speech.synthesize(recipe, work=workspace(tmp_path), runtime=Runtime())
    for samples in sounds(AudioCorpus("speech", "0" * 64, str(tmp_path), "", **facts)).values():
        loud = soxr.resample(samples, 16_000, 24_000)
        loud /= np.abs(loud).max()
        assert tts_exchange.num_wraps((loud * 32_767).astype(np.int16)) == 0
        beyond = (loud * 1.01 * 2**15).astype(np.int64).astype(np.int16)
        assert tts_exchange.num_wraps(beyond) > 0


@pytest.mark.parametrize(
    ("text", "letters"),
    [
        ("It's nine.", 7),
        ("In 1984 <strong>we</strong> [laughter] met.", 2 + 16 + 2 + 3),
        ("你好，世界。", 16),
        ("Be calm.<|endofprompt|>Yes", 9),
    ],
)
def test_letters_are_counted_as_they_are_spoken(text: str, letters: int) -> None:
    assert tts_exchange.spoken_letters(text) == letters


# --- never asked twice ---------------------------------------------------------------------------


def test_added_lines_and_voices_ask_only_for_themselves(tmp_path: Path) -> None:
    made_by = {"stage": "tts", "code": "1", "packages": {}, "seed": None}
    with serving(IndexTtsHandler, TtsServer()) as server:
        small = indextts(server, lines=LINES[:3], clips_per_shard=2)
        first = synthesize(small, tmp_path / "tts" / "1", made_by)
        assert len(server.asked) == 3
        more = indextts(server, lines=LINES, voices=("boris", "anna"), clips_per_shard=2)
        second = synthesize(more, tmp_path / "tts" / "2", made_by)
        assert len(server.asked) == 3 + 1 + 4
        # Changed code, other shards: still nobody is asked for a clip that is there.
        third = synthesize(
            indextts(server, lines=LINES, clips_per_shard=3), tmp_path / "tts" / "3", {**made_by, "code": "2"}
        )
        assert len(server.asked) == 8
    kept, all_sounds = sounds(first), sounds(second)
    for key, samples in kept.items():
        np.testing.assert_array_equal(samples, all_sounds[key])
    for key, samples in sounds(third).items():
        np.testing.assert_array_equal(samples, all_sounds[key])
    full = [record["sha256"] for record in corpora.read_index(first)["shards"] if record["num_clips"] == 2]
    assert full
    assert set(full) <= {record["sha256"] for record in corpora.read_index(second)["shards"]}


def test_a_damaged_corpus_lends_nothing(tmp_path: Path) -> None:
    with serving(IndexTtsHandler, TtsServer()) as server:
        synthesize(indextts(server), tmp_path / "tts" / "1", {"code": "1"})
        (path,) = (tmp_path / "tts" / "1" / "out").glob("*.tar")
        content = bytearray(path.read_bytes())
        content[3000] ^= 1
        path.write_bytes(bytes(content))
        synthesize(indextts(server), tmp_path / "tts" / "2", {"code": "2"})
    assert len(server.asked) == 12


CHILD = """
import sys
from pathlib import Path
from tests.test_tts import TtsServer, cosyvoice, synthesize
synthesize(cosyvoice(TtsServer(url=sys.argv[1]), clips_per_shard=4), Path(sys.argv[2]))
"""


@pytest.mark.parametrize("blocked", [1, 4, 6])
def test_a_killed_run_continues_at_the_clip(blocked: int, tmp_path: Path) -> None:
    tts_server = TtsServer(fault=lambda number, fields: "block" if number == blocked else "")
    with serving(CosyVoiceHandler, tts_server) as server:
        child = subprocess.Popen([sys.executable, "-c", CHILD, server.url, str(tmp_path / "killed")])
        deadline = time.monotonic() + 60
        while len(server.asked) < blocked and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not (tmp_path / "killed" / "manifest.json").exists()
        corpus = synthesize(cosyvoice(server, clips_per_shard=4), tmp_path / "killed")
    assert len(server.asked) == len(TEXTS) + 1  # only the one that nobody was there to hear
    assert corpus.num_clips == len(TEXTS)
    for samples, reply in zip(sounds(corpus).values(), server.replies, strict=True):
        assert len(samples) == pytest.approx(len(reply) * 16_000 / 24_000, abs=2)


@pytest.mark.slow
def test_a_run_speaks_extracts_and_reports_and_asks_for_added_lines_alone(
    script: OutsideFolder, tmp_path: Path
) -> None:
    work = workspace(tmp_path / "whisper")
    make_encoder(
        EncoderRecipe(width=32, num_layers=2, num_heads=2, max_audio_s=3), work=work, runtime=Runtime()
    )
    lines = Path(script.path) / "lines.jsonl"
    rows = [json.dumps({"text": text, "style": style}) + "\n" for text in TEXTS for style in ("happy", "sad")]
    lines.write_text("".join(rows[:10]))

    def run(server: TtsServer) -> dict[str, Any]:
        settings = {
            "cosyvoice.server": server.url,
            "cosyvoice.script.path": script.path,
            "cosyvoice.clips_per_shard": 5,
            "encoder.place": work.out,
        }
        words = [word for path, value in settings.items() for word in ("--set", f"{path}={value}")]
        done = subprocess.run(
            [sys.executable, "-m", "flows.cli", "run", "cosyvoice", "--json", *words],
            cwd=ROOT,
            env=environment(tmp_path / "store"),
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}

    with serving(CosyVoiceHandler, TtsServer()) as server:
        assert run(server)["synthesize_cosyvoice"]["metrics"]["clips"] == 20
        assert len(server.asked) == 20
        lines.write_text("".join(rows))
        more = run(server)
        assert more["synthesize_cosyvoice"]["metrics"]["clips"] == 24
        assert len(server.asked) == 24
        assert more["extract_features"]["metrics"]["shards_borrowed"] == 4
