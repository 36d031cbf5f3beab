"""Recordings of one's own through the whole sound graph: what comes in, what is left out, what runs again."""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from omni_model.audio.encoder import make_encoder
from omni_model.config import EncoderRecipe, Runtime
from omni_model.storage import Workspace
from omni_model.telemetry import Metrics
from tests.test_runs import omni

RATE_HZ = 22_050


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Whisper directory, as somebody might have downloaded one."""
    directory = tmp_path_factory.mktemp("whisper")
    work = Workspace(directory, 3, Metrics(directory / "metrics.jsonl"))
    work.out.mkdir()
    make_encoder(
        EncoderRecipe(width=32, num_layers=2, num_heads=2, max_audio_s=3), work=work, runtime=Runtime()
    )
    return work.out


def record(folder: Path, name: str, frequency_hz: float, duration_s: float = 1.0) -> None:
    time_s = np.arange(int(duration_s * RATE_HZ)) / RATE_HZ
    soundfile.write(folder / name, 0.3 * np.sin(2 * np.pi * frequency_hz * time_s), RATE_HZ)


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "recordings"
    (folder / "deeper").mkdir(parents=True)
    for number in range(12):
        record(folder, f"tone {number}.flac", 200 + 40 * number)
    record(folder / "deeper", "long.wav", 330, 70)
    (folder / "page.wav").write_text("<html>not here</html>")
    soundfile.write(folder / "nothing.wav", np.zeros(RATE_HZ), RATE_HZ)
    lines = [{"audio": "tone 3.flac", "transcript": "a tone", "labels": {"pitch": "low"}, "speaker": "me"}]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def settings(folder: Path, whisper: Path) -> list[str]:
    paths = [f"recordings.folder.path={folder}", f"encoder.place={whisper}", "recordings.clips_per_shard=4"]
    return [word for path in paths for word in ("--set", path)]


def stages(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert done.returncode == 0, done.stdout + done.stderr
    return {stage["name"]: stage for stage in json.loads(done.stdout)["stages"]}


@pytest.mark.slow
def test_a_folder_becomes_features_and_a_report(tmp_path: Path, recordings: Path, whisper: Path) -> None:
    store, chosen = tmp_path / "store", settings(recordings, whisper)
    made = stages(omni(store, "run", "folder", *chosen, "--json"))
    assert made["import_folder"]["metrics"]["dropped"] == 2
    report = (store / "latest" / "report.html").read_text()
    assert "silent" in report
    assert "page.wav" in report
    assert "resampled" in report
    assert "split" in report

    record(recordings, "one more.flac", 950)
    plan = json.loads(omni(store, "plan", "folder", *chosen, "--json").stdout)
    assert {step["name"]: step["status"] for step in plan}["import_folder"] == "will run"
    again = stages(omni(store, "run", "folder", *chosen, "--json"))
    assert again["extract_features"]["metrics"]["shards_borrowed"] > 0
    assert again["fetch_encoder"]["status"] == "reused"


def test_a_folder_that_is_not_named_or_not_there(tmp_path: Path) -> None:
    for words, sentence in (
        ((), "no folder was named"),
        (("--set", "recordings.folder.path=/nowhere"), "/nowhere"),
    ):
        done = omni(tmp_path / "store", "plan", "folder", *words)
        assert done.returncode == 2
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


def test_another_copy_of_parquet_files_is_another_corpus(tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "0000.parquet").write_bytes(b"one")
    words = ["librispeech.form=parquet", f"librispeech.place={copy}"]
    arguments = ["plan", "librispeech", "--json", *(word for each in words for word in ("--set", each))]

    def key() -> str:
        steps = json.loads(omni(tmp_path / "store", *arguments).stdout)
        return str({step["name"]: step["key"] for step in steps}["import_librispeech"])

    before = key()
    assert key() == before
    (copy / "0000.parquet").write_bytes(b"two")
    assert key() != before
