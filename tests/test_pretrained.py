"""A trained encoder by its name: every place it may come from, every way that can fail, and the pin."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from omni_model import hardware
from omni_model.artifacts import EncoderFiles, content_digest, hash_payload, sha256_file
from omni_model.audio import hubs
from omni_model.audio.encoder import load_encoder, make_encoder
from omni_model.audio.fetch_encoder import LOCK, fetch_encoder
from omni_model.config import BadInput, EncoderRecipe, PretrainedEncoderRecipe, Runtime
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from tests.loopback import FileServer, dead_url, file_server, stay_at_home

MODEL, MIRRORED = "openai/whisper-micro", "openai-mirror/whisper-micro"
SHAPE = EncoderRecipe(width=32, num_layers=2, num_heads=2, max_audio_s=3)
WEIGHTS = "model.safetensors"
SETTINGS = (
    *("OMNI_OFFLINE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_MIRRORS", "HF_HOME", "HF_HUB_CACHE"),
    *("MODELSCOPE_ENDPOINT", "MODELSCOPE_CACHE", "WHISPER_MS_ID", "XDG_CACHE_HOME"),
)


def workspace(directory: Path) -> Workspace:
    for name in ("out", "partial"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    return Workspace(directory, 3, Metrics(directory / "metrics.jsonl"))


def whisper(directory: Path, seed: int = 3) -> Path:
    work = workspace(directory)
    make_encoder(SHAPE, work=Workspace(directory, seed, work.metrics), runtime=Runtime())
    return work.out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The directory of a tiny Whisper, as a hub would hold it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield whisper(tmp_path_factory.mktemp("whisper"))
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with other weights."""
    return whisper(tmp_path_factory.mktemp("other"), seed=4)


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings, no caches, no mirrors but dead ones, and no way out of this machine."""
    stay_at_home(monkeypatch)
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_MIRRORS", dead_url())
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", dead_url())
    monkeypatch.setattr(hubs, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(hubs, "RETRIES", 0)


@pytest.fixture
def hub() -> Iterator[FileServer]:
    with file_server() as started:
        yield started


@pytest.fixture
def second() -> Iterator[FileServer]:
    with file_server() as started:
        yield started


def hugging_face(server: FileServer, directory: Path, name: str = MODEL, **listed: str) -> str:
    """Have `server` hold a model as Hugging Face does; `listed` overrides the sha256 it tells of a file."""
    rows = []
    for path in sorted(directory.iterdir()):
        row = {"type": "file", "oid": "0" * 40, "size": path.stat().st_size, "path": path.name}
        if path.suffix == ".safetensors":
            sha256 = listed.get(path.stem, sha256_file(path))
            row["lfs"] = {"oid": sha256, "size": row["size"], "pointerSize": 134}
        rows.append(row)
        server.files[f"/{name}/resolve/main/{path.name}"] = path.read_bytes()
    server.files[f"/api/models/{name}/tree/main"] = json.dumps(rows).encode()
    return server.url


def model_scope(server: FileServer, directory: Path, name: str = MIRRORED) -> str:
    """Have `server` hold a model as ModelScope does."""
    rows = []
    for path in sorted(directory.iterdir()):
        row = {"Path": path.name, "Name": path.name, "Type": "blob", "Size": path.stat().st_size}
        rows.append({**row, "Sha256": sha256_file(path), "Revision": "0" * 40})
        server.files[f"/api/v1/models/{name}/repo?Revision=master&FilePath={path.name}"] = path.read_bytes()
    listing = {"Code": 200, "Success": True, "Data": {"Files": rows}}
    server.files[f"/api/v1/models/{name}/repo/files?Revision=master"] = json.dumps(listing).encode()
    return server.url


def fetched(directory: Path, **fields: str) -> tuple[EncoderFiles, dict[str, Any]]:
    """The artifact and its figures. Artifacts below one directory share their pins, as in a store."""
    work = workspace(directory)
    recipe = PretrainedEncoderRecipe(**{"model": MODEL, **fields})
    facts: dict[str, Any] = fetch_encoder(recipe, work=work, runtime=Runtime())
    assert set(facts) == EncoderFiles.fact_names()
    digest = content_digest(hash_payload(work.out))
    return EncoderFiles("encoder", "0" * 64, str(directory), digest, **facts), work.metrics.summaries


def refused(directory: Path, **fields: str) -> str:
    with pytest.raises(BadInput) as failed:
        fetched(directory, **fields)
    assert list((directory / "out").iterdir()) == []
    assert "\n" not in str(failed.value)
    return str(failed.value)


def same_files(left: Path, right: Path) -> bool:
    return [(p.name, p.read_bytes()) for p in sorted(left.iterdir())] == [
        (p.name, p.read_bytes()) for p in sorted(right.iterdir())
    ]


# --- where from ----------------------------------------------------------------------------------


def test_a_directory_that_is_named_asks_nobody(
    tmp_path: Path, model: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, model))
    files, told = fetched(tmp_path / "s" / "a", place=str(model))
    assert hub.requests == []
    assert same_files(files.out, model)
    assert (files.family, files.width, files.num_layers) == ("whisper", 32, 2)
    assert (files.frame_rate_hz, files.max_audio_s) == (50, 3.0)
    assert files.weights == f"own weights {sha256_file(model / WEIGHTS)[:12]}"
    assert told["weights_from"] == str(model)


def test_what_was_fetched_is_the_encoder_that_was_published(tmp_path: Path, model: Path) -> None:
    files, _ = fetched(tmp_path / "s" / "a", place=str(model))
    samples = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1
    own = EncoderFiles(**{**vars(files), "uri": str(model.parent)})
    np.testing.assert_array_equal(load_encoder(files).encode(samples), load_encoder(own).encode(samples))


def test_model_scope_is_asked_first_and_alone(
    tmp_path: Path, model: Path, hub: FileServer, second: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", model_scope(hub, model))
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(second, model))
    files, told = fetched(tmp_path / "s" / "a")
    assert same_files(files.out, model)
    assert told["weights_from"] == f"ModelScope {hub.url}"
    assert second.requests == []
    assert len(hub.requests) == 4  # what there is, and three files


def test_another_id_at_model_scope_can_be_named(
    tmp_path: Path, model: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", model_scope(hub, model, "AI-ModelScope/whisper-mine"))
    assert f"/{MIRRORED}/repo/files?Revision=master (HTTP 404)" in refused(tmp_path / "s" / "a")
    monkeypatch.setenv("WHISPER_MS_ID", "AI-ModelScope/whisper-mine")
    assert same_files(fetched(tmp_path / "s" / "a")[0].out, model)
    assert "facebook/w2v-bert-2.0/repo" in refused(tmp_path / "s" / "b", model="facebook/w2v-bert-2.0")


def test_hugging_face_servers_are_asked_in_order_and_the_named_one_first(
    tmp_path: Path, model: Path, hub: FileServer, second: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = dead_url()
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    monkeypatch.setenv("HF_MIRRORS", f"{dead} {hugging_face(second, model)}/ {hub.url}")
    assert hardware.network().hugging_face == (hub.url, dead, second.url)
    hub.faults[f"/api/models/{MODEL}/tree/main"] = [503]
    files, told = fetched(tmp_path / "s" / "a")
    assert same_files(files.out, model)
    assert told["weights_from"] == f"Hugging Face {second.url}"
    assert len(hub.requests) == 1


def test_the_usual_servers_are_known_without_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_MIRRORS")
    monkeypatch.delenv("MODELSCOPE_ENDPOINT")
    network = hardware.network()
    assert network.hugging_face == ("https://huggingface.co",)
    assert network.model_scope == ("https://modelscope.cn",)
    assert network.openslr[0] == "https://www.openslr.org"
    assert not network.offline
    monkeypatch.setenv("HF_ENDPOINT", "hf-mirror.com/")
    assert hardware.network().hugging_face == ("https://hf-mirror.com", "https://huggingface.co")


FAILURES: dict[str, tuple[str, list[Any], str]] = {
    "no such model": (f"/api/models/{MODEL}/tree/main", [404], "HTTP 404"),
    "overloaded": (f"/api/models/{MODEL}/tree/main", [503], "HTTP 503"),
    "a login page for a list": (f"/api/models/{MODEL}/tree/main", ["page"], "a web page came instead"),
    "a login page for weights": (f"/{MODEL}/resolve/main/{WEIGHTS}", ["page as data"], "a web page came"),
    "weights are gone": (f"/{MODEL}/resolve/main/{WEIGHTS}", [410], "HTTP 410"),
    "config is gone": (f"/{MODEL}/resolve/main/config.json", [404], "HTTP 404"),
    "silent": (f"/{MODEL}/resolve/main/{WEIGHTS}", ["silent", 500], "HTTP 500"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_each_failure_is_told_and_the_next_server_asked(
    tmp_path: Path,
    model: Path,
    hub: FileServer,
    second: FileServer,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    path, faults, reason = FAILURES[name]
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, model))
    hub.faults[path] = list(faults)
    message = refused(tmp_path / "s" / "a")
    assert f"Hugging Face {hub.url}: {hub.url}{path} ({reason}" in message
    hub.faults[path] = list(faults)
    monkeypatch.setenv("HF_MIRRORS", hugging_face(second, model))
    assert same_files(fetched(tmp_path / "s" / "a")[0].out, model)


def test_the_error_names_every_attempt(
    tmp_path: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    network = hardware.network()
    message = refused(tmp_path / "s" / "a")
    for place in (
        f"ModelScope's cache {network.cache_model_scope}: no {MIRRORED} there",
        f"Hugging Face's cache {network.cache_hugging_face}: no {MODEL} there",
        f"ModelScope {network.model_scope[0]}: ",
        f"Hugging Face {hub.url}: ",
        f"Hugging Face {network.hugging_face[1]}: ",
        "(nobody answers there)",
        "(HTTP 404)",
        "HF_ENDPOINT",
        "WHISPER_MS_ID",
    ):
        assert place in message


def test_half_a_file_is_completed_from_the_next_server(
    tmp_path: Path, model: Path, hub: FileServer, second: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", model_scope(hub, model))
    hub.faults[f"/api/v1/models/{MIRRORED}/repo?Revision=master&FilePath={WEIGHTS}"] = ["cut", 500]
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(second, model))
    assert same_files(fetched(tmp_path / "s" / "a")[0].out, model)
    half = (model / WEIGHTS).stat().st_size // 2
    assert second.requests[-1] == (f"/{MODEL}/resolve/main/{WEIGHTS}", f"bytes={half}-")


def test_a_description_comes_from_the_same_hub_as_the_weights(
    tmp_path: Path, model: Path, hub: FileServer, second: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, model))
    monkeypatch.setenv("HF_MIRRORS", hugging_face(second, model))
    config = (model / "config.json").read_bytes()
    hub.files[f"/{MODEL}/resolve/main/config.json"] = config.replace(
        b'"pad_token_id": 0', b'"pad_token_id": 3'
    )
    hub.faults[f"/{MODEL}/resolve/main/{WEIGHTS}"] = [410]
    assert hub.files[f"/{MODEL}/resolve/main/config.json"] != config
    assert same_files(fetched(tmp_path / "s" / "a")[0].out, model)


def test_an_attempt_that_failed_is_continued_by_the_next(
    tmp_path: Path, model: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, model))
    hub.faults[f"/{MODEL}/resolve/main/{WEIGHTS}"] = ["cut", 500]
    refused(tmp_path / "s" / "a")
    assert same_files(fetched(tmp_path / "s" / "a")[0].out, model)
    assert hub.requests[-1][1].startswith("bytes=")


# --- offline and caches --------------------------------------------------------------------------


def hugging_face_cache(root: Path, model: Path) -> None:
    """What huggingface_hub leaves behind: blobs, and a snapshot of links to them."""
    repo = root / f"models--{MODEL.replace('/', '--')}"
    snapshot = repo / "snapshots" / ("1" * 40)
    for folder in (snapshot, repo / "refs", repo / "blobs"):
        folder.mkdir(parents=True)
    (repo / "refs" / "main").write_text("1" * 40)
    for path in model.iterdir():
        blob = repo / "blobs" / sha256_file(path)
        shutil.copyfile(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))


@pytest.mark.parametrize("flag", ["OMNI_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline_without_a_cache_asks_nobody_and_says_why(
    tmp_path: Path, model: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, model))
    monkeypatch.setenv(flag, "1")
    message = refused(tmp_path / "s" / "a")
    assert "the network: not asked, because OMNI_OFFLINE or HF_HUB_OFFLINE is set" in message
    assert hub.requests == []


def test_offline_with_hugging_faces_cache(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMNI_OFFLINE", "1")
    for name, value, below in (("HF_HUB_CACHE", "hub1", ""), ("HF_HOME", "home2", "hub")):
        monkeypatch.setenv(name, str(tmp_path / value))
        hugging_face_cache(tmp_path / value / below, model)
        files, told = fetched(tmp_path / "s" / value)
        assert same_files(files.out, model)
        assert str(told["weights_from"]).startswith("Hugging Face's cache")
        assert not any(path.is_symlink() for path in files.out.iterdir())
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "layout", [f"models/{MIRRORED.replace('/', '--')}/snapshots/master", f"hub/models/{MIRRORED}"]
)
def test_model_scopes_cache_comes_before_every_hub(
    tmp_path: Path, model: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, model))
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "cache"))
    shutil.copytree(model, tmp_path / "cache" / layout)
    assert same_files(fetched(tmp_path / "s" / "a")[0].out, model)
    assert hub.requests == []


def test_a_cache_with_half_a_model_is_passed_over(
    tmp_path: Path, model: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    shutil.copytree(model, cache / f"models/{MIRRORED.replace('/', '--')}/snapshots/master")
    weights = cache / f"models/{MIRRORED.replace('/', '--')}/snapshots/master" / WEIGHTS
    monkeypatch.setenv("MODELSCOPE_CACHE", str(cache))
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, model))
    weights.write_bytes(weights.read_bytes()[:1000])
    assert same_files(fetched(tmp_path / "s" / "a")[0].out, model)
    weights.unlink()
    assert same_files(fetched(tmp_path / "s" / "b")[0].out, model)


@pytest.mark.parametrize(
    ("wish", "offline"), [({}, False), ({"HF_HUB_OFFLINE": "1"}, True), ({"OMNI_OFFLINE": "yes"}, True)]
)
def test_what_a_person_wants_outlives_what_libraries_are_told(
    monkeypatch: pytest.MonkeyPatch, wish: dict[str, str], offline: bool
) -> None:
    """Every stage's process forbids libraries the network; this stage must still know whether it may."""
    monkeypatch.setattr(os, "environ", {**os.environ, **wish})
    for _ in range(2):  # a stage may start processes of its own
        hardware.fix_environment(Runtime())
        assert os.environ["HF_HUB_OFFLINE"] == "1"
        assert hardware.network().offline is offline


# --- the pin -------------------------------------------------------------------------------------


def test_weights_are_pinned_when_first_fetched_and_a_change_is_refused(
    tmp_path: Path,
    model: Path,
    other: Path,
    hub: FileServer,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first, changed = sha256_file(model / WEIGHTS), sha256_file(other / WEIGHTS)
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, model))
    assert fetched(tmp_path / "s" / "a")[1]["pinned"] == "now"
    assert f"pinned from now on to the sha256 {first}" in capsys.readouterr().out
    lock = tmp_path / "s" / LOCK
    assert json.loads(lock.read_text()) == {MODEL: first}
    assert fetched(tmp_path / "s" / "b")[1]["pinned"] == "before"
    hugging_face(hub, other)
    for message in (refused(tmp_path / "s" / "c"), refused(tmp_path / "s" / "c", place=str(other))):
        assert first in message
        assert changed in message
        assert f"delete {lock}" in message
    assert json.loads(lock.read_text()) == {MODEL: first}
    hugging_face(hub, other, "openai/whisper-else")
    fetched(tmp_path / "s" / "d", model="openai/whisper-else")
    assert json.loads(lock.read_text()) == {MODEL: first, "openai/whisper-else": changed}
    lock.unlink()
    assert fetched(tmp_path / "s" / "c")[1]["weights_sha256"] == changed


def test_what_was_fetched_before_needs_no_network(tmp_path: Path, model: Path, other: Path) -> None:
    """As when code has changed: the key is another one, the bytes wanted are the same."""
    fetched(tmp_path / "s" / "a", place=str(model))
    assert "this store: no such weights" in refused(tmp_path / "s" / "b")
    (tmp_path / "s" / "a" / "manifest.json").touch()
    files, told = fetched(tmp_path / "s" / "b")
    assert same_files(files.out, model)
    assert told["weights_from"] == "this store"
    (tmp_path / "s" / "b" / "manifest.json").touch()
    shutil.copyfile(other / WEIGHTS, tmp_path / "s" / "b" / "out" / WEIGHTS)  # the newest, and no longer it
    assert same_files(fetched(tmp_path / "s" / "c")[0].out, model)


def test_a_recipes_own_sha256_comes_before_the_pin(
    tmp_path: Path, model: Path, other: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = sha256_file(other / WEIGHTS)
    fetched(tmp_path / "s" / "a", place=str(model))
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, other))
    assert fetched(tmp_path / "s" / "b", sha256=changed.upper())[1]["weights_sha256"] == changed
    message = refused(tmp_path / "s" / "c", place=str(model), sha256=changed)
    assert "change the recipe's sha256" in message
    assert changed in message


def test_a_server_whose_weights_are_others_costs_no_download(
    tmp_path: Path,
    model: Path,
    other: Path,
    hub: FileServer,
    second: FileServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, other))
    monkeypatch.setenv("HF_MIRRORS", hugging_face(second, model))
    files, _ = fetched(tmp_path / "s" / "a", sha256=sha256_file(model / WEIGHTS))
    assert same_files(files.out, model)
    assert len(hub.requests) == 1


def test_content_that_is_not_what_the_hub_lists_is_refused(
    tmp_path: Path, model: Path, hub: FileServer, second: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, model))
    weights = bytearray((model / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    hub.files[f"/{MODEL}/resolve/main/{WEIGHTS}"] = bytes(weights)
    message = refused(tmp_path / "s" / "a")
    assert (
        f"its sha256 is {hashlib.sha256(weights).hexdigest()}, not {sha256_file(model / WEIGHTS)}" in message
    )
    monkeypatch.setenv("HF_MIRRORS", hugging_face(second, model))
    assert same_files(fetched(tmp_path / "s" / "a")[0].out, model)


def test_a_damaged_pin_is_said_and_not_overwritten(tmp_path: Path, model: Path) -> None:
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / LOCK).write_text("{")
    assert f"{tmp_path / 's' / LOCK} cannot be read" in refused(tmp_path / "s" / "a", place=str(model))
    assert (tmp_path / "s" / LOCK).read_text() == "{"


# --- what is in it -------------------------------------------------------------------------------


def spoilt(tmp_path: Path, model: Path) -> Path:
    shutil.copytree(model, tmp_path / "own")
    return tmp_path / "own"


def test_weights_that_lack_a_part_of_the_encoder_are_refused(tmp_path: Path, model: Path) -> None:
    own = spoilt(tmp_path, model)
    weights = load_file(own / WEIGHTS)
    save_file({k: v for k, v in weights.items() if k != "encoder.layers.1.fc1.weight"}, own / WEIGHTS)
    assert "encoder.layers.1.fc1.weight" in refused(tmp_path / "s" / "a", place=str(own))
    kept = {name: value for name, value in weights.items() if not name.startswith("decoder.")}
    save_file(kept, own / WEIGHTS, metadata={"format": "pt"})
    assert fetched(tmp_path / "s" / "a", place=str(own))[0].width == 32  # the decoder is never used


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("config.json", None, "no config.json"),
        ("config.json", b"{", "no config.json that describes a model"),
        ("config.json", b'{"model_type": "bert"}', "family 'bert'"),
        (WEIGHTS, None, "safetensors"),
        (WEIGHTS, b"PK\x03\x04 a pickle", "damaged or cut off"),
    ],
)
def test_a_directory_that_is_no_model_is_refused(
    tmp_path: Path, model: Path, name: str, content: bytes | None, reason: str
) -> None:
    own = spoilt(tmp_path, model)
    (own / name).unlink()
    (own / "pytorch_model.bin").write_bytes(b"never read")
    if content is not None:
        (own / name).write_bytes(content)
    message = refused(tmp_path / "s" / "a", place=str(own))
    assert reason in message
    assert str(own) in message
    assert not (tmp_path / "s" / LOCK).exists()


@pytest.mark.parametrize("name", ["whisper-base", "../x/y", "a/b/c", "a/..", "a b/c", ""])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: str) -> None:
    assert "owner/name" in refused(tmp_path / "s" / "a", model=name)


def test_weights_in_several_files(
    tmp_path: Path, model: Path, hub: FileServer, second: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = spoilt(tmp_path, model)
    weights = load_file(own / WEIGHTS)
    (own / WEIGHTS).unlink()
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for part, keys in parts.items():
        save_file({key: weights[key] for key in keys}, own / part, metadata={"format": "pt"})
    where = {key: part for part, keys in parts.items() for key in keys}
    index = json.dumps({"metadata": {}, "weight_map": where})
    (own / "model.safetensors.index.json").write_text(index)
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, own))
    files, told = fetched(tmp_path / "s" / "a")
    assert same_files(files.out, own)
    assert told["weights_sha256"] == fetched(tmp_path / "s" / "b", place=str(own))[1]["weights_sha256"]
    samples = np.random.default_rng(0).standard_normal(8_000).astype(np.float32) * 0.1
    whole, _ = fetched(tmp_path / "t" / "a", place=str(model))
    np.testing.assert_array_equal(load_encoder(files).encode(samples), load_encoder(whole).encode(samples))
    (own / "model.safetensors.index.json").write_text(index.replace("model-00001", "../model-00001"))
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(second, own))
    assert "names no files beside it" in refused(tmp_path / "u" / "a")


def test_w2v_bert_is_a_family_of_its_own(
    tmp_path: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Wav2Vec2BertConfig, Wav2Vec2BertModel

    shape: dict[str, Any] = {
        **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
        **{"feature_projection_input_dim": 160, "output_hidden_size": 16},
    }
    name = "facebook/w2v-bert-micro"
    Wav2Vec2BertModel(Wav2Vec2BertConfig(**shape)).save_pretrained(tmp_path / "own")
    monkeypatch.setenv("HF_ENDPOINT", hugging_face(hub, tmp_path / "own", name))
    files, _ = fetched(tmp_path / "s" / "a", model=name)
    assert (files.family, files.width, files.num_layers, files.max_audio_s) == ("w2v-bert", 16, 1, 30.0)
    samples = np.random.default_rng(0).standard_normal(16_000).astype(np.float32) * 0.1
    assert load_encoder(files).encode(samples).shape[1] == 16
    Wav2Vec2BertModel(Wav2Vec2BertConfig(**shape, add_adapter=True)).save_pretrained(tmp_path / "adapted")
    assert "adapter" in refused(tmp_path / "t" / "a", place=str(tmp_path / "adapted"))
