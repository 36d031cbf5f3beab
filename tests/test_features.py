"""Feature shards: what the encoder heard, the same bytes whatever happens on the way, and nothing damaged."""

import errno
import io
import json
import os
import resource
import signal
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_model import hardware
from omni_model.artifacts import AudioCorpus, EncoderFiles, FeatureShards, sha256_file
from omni_model.audio import corpora, encoder, features, shards, texture, waveform
from omni_model.audio.reader import FeatureReader
from omni_model.config import BadInput, FeatureRecipe, Runtime
from tests.small_sound import (
    COMPONENTS,
    FLOAT32,
    TINY_ENCODER,
    TINY_TEXTURE,
    CheapEncoder,
    make,
    noise_corpus,
)

WIDTH = 160  # wide enough that a small tar takes several writes


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One small corpus, encoder and feature set for every test that only reads."""
    root = tmp_path_factory.mktemp("audio")
    corpus = make(AudioCorpus, texture.synthesize, root / "texture", TINY_TEXTURE)
    ear = make(EncoderFiles, encoder.make_encoder, root / "encoder", TINY_ENCODER)
    frames = make(FeatureShards, features.extract, root / "features", FLOAT32, corpus, ear)
    return {"corpus": corpus, "encoder": ear, "features": frames}


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> CheapEncoder:
    """An encoder that costs nothing, where `extract` would load one."""
    ear = CheapEncoder(WIDTH)
    monkeypatch.setattr(features, "load_encoder", lambda *_: ear)
    return ear


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> AudioCorpus:
    """Three tars of three clips."""
    return noise_corpus(tmp_path_factory.mktemp("noise"), train=6, test=3)


# --- what is in them -----------------------------------------------------------------------------


def test_features_are_the_encoders_frames(made: dict[str, Any]) -> None:
    reader = FeatureReader(made["features"])
    ear = encoder.load_encoder(made["encoder"])
    assert len(reader) == made["features"].num_clips == 18
    assert [clip["split"] for clip in reader.by_split("test")] == ["test"] * 4
    assert sum(clip["num_frames"] for clip in reader.clips) == made["features"].num_frames
    for path in corpora.shard_paths(made["corpus"]):
        for key, sound, _ in corpora.read_shard(path):
            samples = waveform.decode(sound)
            frames = reader.frames(key)
            assert frames.dtype == np.float32
            assert frames.shape == (waveform.num_encoder_frames(len(samples)), reader.width)
            np.testing.assert_array_equal(frames, features.encode_samples(samples, ear).astype(np.float32))


def test_index_says_how_and_from_what_they_were_made(made: dict[str, Any]) -> None:
    out = made["features"].out
    index = json.loads((out / "index.json").read_text())
    assert index["policy"] == {
        "encoder": made["encoder"].digest,
        "layers": ["last"],
        "mix": "concat",
        "dtype": "float32",
    }
    sources = corpora.read_index(made["corpus"])["shards"]
    assert [shard["made_from"] for shard in index["shards"]] == [source["sha256"] for source in sources]
    assert [shard["num_clips"] for shard in index["shards"]] == [source["num_clips"] for source in sources]
    for shard in index["shards"]:
        path = out / shard["name"]
        assert (sha256_file(path), path.stat().st_size) == (shard["sha256"], shard["bytes"])
        content = path.read_bytes()
        for clip in shard["clips"]:
            array = np.load(
                io.BytesIO(content[clip["offset"] : clip["offset"] + clip["size"]]), allow_pickle=False
            )
            assert array.shape == (clip["num_frames"], 32)


def test_plain_webdataset_reads_them(made: dict[str, Any]) -> None:
    import webdataset

    reader = FeatureReader(made["features"])
    paths = sorted(str(path) for path in made["features"].out.glob("features-*.tar"))
    samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode())
    assert sorted(sample["__key__"] for sample in samples) == [clip["key"] for clip in reader.clips]
    for sample in samples:
        assert sample["json"] in reader.clips
        assert sample["feat.npy"].dtype == np.float16
        np.testing.assert_array_equal(sample["feat.npy"].astype(np.float32), reader.frames(sample["__key__"]))


def test_tars_hold_nothing_that_could_run_and_nothing_of_this_machine(made: dict[str, Any]) -> None:
    for path in made["features"].out.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar.getmembers():
                assert member.name.endswith((".feat.npy", ".json"))
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "omni")


@pytest.mark.parametrize(("mix", "width", "num_layers"), [("concat", 64, 2), ("mean", 32, 1)])
def test_several_layers(tmp_path: Path, made: dict[str, Any], mix: str, width: int, num_layers: int) -> None:
    recipe = FeatureRecipe(layers=("1", "last"), mix=mix, dtype="float32")
    found = make(FeatureShards, features.extract, tmp_path, recipe, made["corpus"], made["encoder"])
    assert (found.width, found.num_layers) == (width, num_layers)
    reader = FeatureReader(found)
    assert reader.frames(reader.clips[0]["key"]).shape == (reader.clips[0]["num_frames"], width)


def test_an_open_dtype_is_recorded_as_what_it_became(
    tmp_path: Path, corpus: AudioCorpus, cheap: CheapEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hardware, "fast_dtype", lambda: "bfloat16")
    made = make(
        FeatureShards, features.extract, tmp_path, FeatureRecipe(), corpus, cheap.files(tmp_path / "e")
    )
    assert FeatureReader(made).policy["dtype"] == "bfloat16"


def test_frames_that_do_not_fit_are_refused(cheap: CheapEncoder) -> None:
    with pytest.raises(BadInput, match=r"do not fit 16-bit floats; choose features\.layers"):
        features.encode_samples(np.full(16_000, 7e4, np.float32), cheap)  # type: ignore[arg-type]


# --- workers -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_change_no_byte(tmp_path: Path, made: dict[str, Any]) -> None:
    two = Runtime(workers=2)
    arguments = (FLOAT32, made["corpus"], made["encoder"])
    by_two = make(FeatureShards, features.extract, tmp_path / "two", *arguments, runtime=two)
    assert by_two.digest == made["features"].digest
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 19))


def test_small_work_stays_in_one_process(made: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 16)

    def workers(audio_h: float, runtime: Runtime, device: str = "cpu", num_shards: int = 40) -> int:
        corpus = AudioCorpus("c", "", "", "", 1000, audio_h * 3600, 16_000, 0)
        base = EncoderFiles("e", "", "", "", "whisper", "", 512, 6, 50, 30.0)
        return features._num_workers(runtime, corpus, base, num_shards, device)

    assert workers(0.1, Runtime()) == 1
    assert workers(100, Runtime()) == 8  # two stages share the machine
    assert workers(100, Runtime(parallel_stages=1)) == 16
    assert workers(100, Runtime(), num_shards=3) == 3
    assert workers(0.1, Runtime(workers=5)) == 5  # as asked
    assert workers(100, Runtime(workers=5), device="cuda") == 1


def test_one_thread_computes_however_many_there_are(
    tmp_path: Path, corpus: AudioCorpus, cheap: CheapEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = []
    encode = cheap.encode_batch
    monkeypatch.setattr(
        cheap, "encode_batch", lambda clips: (counts.append(torch.get_num_threads()), encode(clips))[1]
    )
    torch.set_num_threads(2)
    cheap.extract(corpus, tmp_path)
    assert set(counts) == {1}
    assert torch.get_num_threads() == 2


def test_one_clip_is_encoded_while_others_are_read_and_written() -> None:
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in range(20):
            taken.append(number)
            yield number
        raise BadInput("twenty is too many.")

    items = features._ahead(numbers(), 4)
    assert next(items) == 0
    assert [next(items) for _ in range(3)] == [1, 2, 3]
    assert len(taken) <= 4 + 4
    assert list(zip(range(16), items, strict=False))[-1][1] == 19
    with pytest.raises(BadInput, match="twenty"):
        next(items)
    unfinished = features._ahead(iter(range(100)), 4)
    assert next(unfinished) == 0
    unfinished.close()  # type: ignore[attr-defined]


# --- faults --------------------------------------------------------------------------------------


class Killer(io.FileIO):
    """A file whose writing process is killed when its count is up, in the middle of a write."""

    events = 0
    deadly = 0

    @classmethod
    def event(cls, last_words: Callable[[], object] = lambda: None) -> None:
        cls.events += 1
        if cls.events == cls.deadly:
            last_words()
            os.kill(os.getpid(), signal.SIGKILL)

    def write(self, content: Any) -> int:
        half = bytes(content)[: len(content) // 2]
        self.event(lambda: super(Killer, self).write(half))
        return super().write(content)


def killed_at(event: int, work: Callable[[], object]) -> bool:
    """Whether the work, in a process of its own, came to this write, fsync or rename, where it was killed."""
    if child := os.fork():
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    try:
        Killer.deadly = event
        fsync, replace, opened = os.fsync, os.replace, Path.open

        def open_deadly(path: Path, mode: str = "r", **options: Any) -> Any:
            if mode == "wb":
                return Killer(path, mode)
            if mode == "w":
                return io.TextIOWrapper(io.BufferedWriter(Killer(path, mode)))
            return opened(path, mode, **options)

        os.fsync = lambda file: (Killer.event(), fsync(file))  # type: ignore[assignment]
        os.replace = lambda a, b: (Killer.event(), replace(a, b))  # type: ignore[assignment]
        Path.open = open_deadly  # type: ignore[method-assign,assignment]
        work()
    finally:
        os._exit(0)


def test_killed_at_any_write_it_goes_on_to_the_same_bytes(
    tmp_path: Path, corpus: AudioCorpus, cheap: CheapEncoder
) -> None:
    undisturbed = cheap.extract(corpus, tmp_path / "undisturbed")
    heard = []
    event = 0
    while killed_at(event := event + 1, lambda: cheap.extract(corpus, tmp_path / f"at-{event}")):
        partial = tmp_path / f"at-{event}" / "partial"
        for tar in partial.glob("*.tar"):  # whatever has its name is whole
            assert tar.read_bytes() == (undisturbed.out / tar.name).read_bytes()
        cheap.clips_heard = 0
        assert cheap.extract(corpus, tmp_path / f"at-{event}").digest == undisturbed.digest
        heard.append(cheap.clips_heard)
    assert event > 30
    assert sorted(set(heard)) == [0, 3, 6, 9]
    assert heard == sorted(heard, reverse=True)  # the later it is killed, the less is done again


def test_a_tar_that_was_damaged_while_it_waited_is_made_again(
    tmp_path: Path, corpus: AudioCorpus, cheap: CheapEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = cheap.extract(corpus, tmp_path / "undisturbed")

    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shards, "write_index", dies)
        with pytest.raises(KeyboardInterrupt):
            cheap.extract(corpus, tmp_path / "again")
    flip_a_bit(tmp_path / "again" / "partial" / "features-train-00001.tar")
    cheap.clips_heard = 0
    assert cheap.extract(corpus, tmp_path / "again").digest == undisturbed.digest
    assert cheap.clips_heard == 3


def flip_a_bit(path: Path, place: int = 3_000) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_one_sentence_and_loses_nothing(
    tmp_path: Path, corpus: AudioCorpus, cheap: CheapEncoder
) -> None:
    undisturbed = cheap.extract(corpus, tmp_path / "undisturbed")
    (tmp_path / "full" / "partial").mkdir(parents=True)
    (tmp_path / "full" / "partial" / "features-train-00001.tmp").symlink_to("/dev/full")
    with pytest.raises(BadInput, match=r"full/partial could not take more \(No space left on device\)"):
        cheap.extract(corpus, tmp_path / "full")
    left = sorted(path.name for path in (tmp_path / "full" / "partial").iterdir())
    assert left == ["features-train-00000.json", "features-train-00000.tar"]
    cheap.clips_heard = 0
    assert cheap.extract(corpus, tmp_path / "full").digest == undisturbed.digest
    assert cheap.clips_heard == 6


def test_a_limit_on_files_is_told_the_same_way(
    tmp_path: Path, corpus: AudioCorpus, cheap: CheapEncoder
) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(BadInput, match=os.strerror(errno.EFBIG)):
            cheap.extract(corpus, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "partial").iterdir())


@pytest.mark.parametrize("fault", ["flipped", "cut", "missing", "swapped", "while it is read"])
def test_a_corpus_that_changed_is_refused(
    tmp_path: Path, cheap: CheapEncoder, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = noise_corpus(tmp_path / "corpus", train=6, test=3)
    path, other = corpus.out / "clips-train-00001.tar", corpus.out / "clips-test-00000.tar"
    whole = path.read_bytes()
    if fault == "flipped":
        flip_a_bit(path, 5_000)  # a sample: WAV itself would not notice
    elif fault == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif fault == "missing":
        path.unlink()
    elif fault == "swapped":
        path.write_bytes(other.read_bytes())
    else:
        read = corpora.read_shard

        def disturbed(tar: Path) -> Iterator[Any]:
            yield from read(tar)
            tar.write_bytes(tar.read_bytes())

        monkeypatch.setattr(corpora, "read_shard", disturbed)
    named = "clips-train-0000[01]" if fault == "while it is read" else "clips-train-00001"
    with pytest.raises(BadInput, match=rf"{named}\.tar is not what its corpus's index says; delete"):
        cheap.extract(corpus, tmp_path / "f")
    assert not (tmp_path / "f" / "partial" / "features-train-00001.tar").exists()
    assert not (tmp_path / "f" / "out" / "index.json").exists()


# --- what is lent --------------------------------------------------------------------------------


def test_more_clips_cost_only_the_tars_they_came_in(tmp_path: Path, cheap: CheapEncoder) -> None:
    few, many = noise_corpus(tmp_path / "few", 7), noise_corpus(tmp_path / "many", 10)
    alone = cheap.extract(many, tmp_path / "alone")
    old = cheap.extract(few, tmp_path / "store" / "old", components=COMPONENTS)
    cheap.clips_heard = 0
    new = cheap.extract(many, tmp_path / "store" / "new", components=COMPONENTS)
    assert new.digest == alone.digest
    assert cheap.clips_heard == 10 + 3 - (6 + 3)  # two of train's tars, and test's, were as before
    flip_a_bit(old.out / "features-train-00000.tar")
    cheap.clips_heard = 0
    (tmp_path / "store" / "new" / "manifest.json").unlink()
    again = cheap.extract(many, tmp_path / "store" / "again", components=COMPONENTS)
    assert again.digest == alone.digest
    assert cheap.clips_heard == 4 + 3  # what is damaged is not lent


def test_other_policies_lend_nothing(tmp_path: Path, cheap: CheapEncoder) -> None:
    corpus = noise_corpus(tmp_path / "corpus", 6)
    cheap.extract(corpus, tmp_path / "store" / "old", components=COMPONENTS)
    cheap.clips_heard = 0
    other = FeatureRecipe(dtype="bfloat16")
    directory = tmp_path / "store" / "new"
    make(
        FeatureShards,
        features.extract,
        directory,
        other,
        corpus,
        cheap.files(directory),
        components=COMPONENTS,
    )
    assert cheap.clips_heard == corpus.num_clips
