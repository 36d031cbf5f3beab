"""A corpus of clips on disk: tars of WAV and JSON, written shard by shard, readable by anything.

Whatever makes clips does so a *shard* at a time: a name, a digest of all that the shard will be made from,
and a function that makes its clips one by one. A finished shard is kept when the run is killed, and an
earlier corpus lends every shard that would come out the same. What a source leaves out or changes is counted
by reason.
"""

import io
import json
import os
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omni_model.artifacts import AudioCorpus, canonical_json, sha256_file, sha256_text, write_atomically
from omni_model.audio.clips import SPLITS, Clip, ClipPlan, Dropped, ShardPlan, check
from omni_model.audio.waveform import SAMPLE_RATE_HZ, encode_wav
from omni_model.config import JSON, BadInput
from omni_model.storage import Workspace

CLIPS, INDEX = "clips.jsonl", "index.json"
TOLD_DROPS = 100  # names of left-out clips that are kept beside their number


def write_corpus(
    plans: Sequence[ClipPlan],
    render: Callable[[ClipPlan], Clip],
    *,
    generator: str,
    clips_per_shard: int,
    work: Workspace,
) -> dict[str, JSON]:
    """Render planned clips, `clips_per_shard` of one split to a tar. Returns the facts of an AudioCorpus.

    Shards are filled split by split, so that more clips of one split leave the others' shards as they are.

    Raises:
        BadInput: nothing to write, or a key that is used twice or holds anything but [A-Za-z0-9_-].
    """
    shards = []
    for split in SPLITS:
        own = sorted((plan for plan in plans if plan.split == split), key=lambda plan: plan.key)
        for number, first in enumerate(range(0, len(own), clips_per_shard)):
            group = own[first : first + clips_per_shard]
            made_from = sha256_text(canonical_json([plan.plain() for plan in group]))
            shards.append(ShardPlan(f"{split}-{number:05d}", made_from, _rendering(group, render)))
    for plan in plans:
        check(plan)
    return write_shards(shards, generator=generator, work=work, expected=len(plans))


def _rendering(
    plans: Sequence[ClipPlan], render: Callable[[ClipPlan], Clip]
) -> Callable[[], Iterator[tuple[ClipPlan, Clip]]]:
    return lambda: ((plan, render(plan)) for plan in plans)


def write_shards(
    shards: Iterable[ShardPlan], *, generator: str, work: Workspace, expected: int = 0
) -> dict[str, JSON]:
    """Write every shard, `clips.jsonl` (one line a clip) and `index.json`; returns an AudioCorpus' facts.

    Args:
        generator: what made the clips; each clip's provenance names it.
        expected: how many clips there will be, for progress; 0 where nobody knows.

    Raises:
        BadInput: no clip at all, a bad key, or one that is used twice.
    """
    lent = _shards_of_kin(work)
    records: list[dict[str, Any]] = []
    for shard in shards:
        done = sum(record["num_clips"] for record in records)
        found = _finished(work, shard) or _borrow(work, shard, lent)
        records.append(found or _write(work, shard, generator, done, expected))
    if not any(record["num_clips"] for record in records):
        reasons = ", ".join(f"{n} {reason}" for reason, n in _index(records)["dropped"].items())
        raise BadInput(f"the corpus has no clips ({reasons or 'nothing came in'}); give it some to use.")
    filled = [record["name"] for record in records if record["num_clips"]]
    duration_s = _write_lines([work.partial / name for name in filled], work.out / CLIPS)
    for name in filled:
        work.deliver(name)
    index = _index(records)
    write_atomically(work.out / INDEX, canonical_json(index) + "\n")
    num_clips, num_dropped = (
        sum(record[name] for record in records) for name in ("num_clips", "num_dropped")
    )
    work.metrics.summary(clips=num_clips, audio_s=duration_s, dropped=num_dropped)
    return {
        "num_clips": num_clips,
        "duration_s": duration_s,
        "sample_rate_hz": SAMPLE_RATE_HZ,
        "num_dropped": num_dropped,
    }


def _record_path(work: Workspace, shard: ShardPlan) -> Path:
    return work.partial / f"clips-{shard.name}.json"


def _finished(work: Workspace, shard: ShardPlan) -> dict[str, Any] | None:
    """What an attempt that was killed wrote down about this shard when it was whole."""
    path = _record_path(work, shard)
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    whole = record.get("made_from") == shard.made_from and (work.partial / record["name"]).exists()
    return record if whole else None


def _shards_of_kin(work: Workspace) -> dict[str, tuple[Path, dict[str, Any]]]:
    """made_from -> tar and record of every shard that earlier corpora of the same making hold."""
    found = {}
    for out in work.kin():
        for record in json.loads((out / INDEX).read_text())["shards"]:
            found[record["made_from"]] = (out / record["name"], record)
    return found


def _borrow(
    work: Workspace, shard: ShardPlan, lent: dict[str, tuple[Path, dict[str, Any]]]
) -> dict[str, Any] | None:
    """Take over the tar of an earlier corpus, if its bytes are still what they were."""
    if shard.made_from not in lent:
        return None
    source, record = lent[shard.made_from]
    record = {**record, "name": f"clips-{shard.name}.tar"}
    copy = (work.partial / record["name"]).with_suffix(".tmp")
    try:
        shutil.copyfile(source, copy)
    except OSError:
        return None
    if sha256_file(copy) != record["sha256"]:
        return None
    os.replace(copy, work.partial / record["name"])
    write_atomically(_record_path(work, shard), json.dumps(record))
    return record


def _write(work: Workspace, shard: ShardPlan, generator: str, done: int, expected: int) -> dict[str, Any]:
    path = work.partial / f"clips-{shard.name}.tar"
    temporary = path.with_suffix(".tmp")
    dropped: list[Dropped] = []
    changed: Counter[str] = Counter()
    written = 0
    with temporary.open("wb") as file:
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for made in shard.make():
                if isinstance(made, Dropped):
                    dropped.append(made)
                    continue
                plan, clip = made
                check(plan)
                _add(tar, f"{plan.key}.wav", encode_wav(clip.samples))
                row = json.dumps(_metadata(plan, clip, generator), sort_keys=True)
                _add(tar, f"{plan.key}.json", row.encode())
                changed.update(clip.changes)
                written += 1
                work.metrics.log(done + written, max(expected, done + written))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    record = {
        "name": path.name,
        "made_from": shard.made_from,
        "sha256": sha256_file(path),
        "num_clips": written,
        "num_dropped": len(dropped),
        "dropped": dict(Counter(each.reason for each in dropped)),
        "dropped_names": [[each.name, each.reason] for each in dropped[:TOLD_DROPS]],
        "changed": dict(changed),
    }
    write_atomically(_record_path(work, shard), json.dumps(record))
    return record


def _write_lines(paths: Sequence[Path], target: Path) -> float:
    """One line of JSON a clip, in the order of the shards; returns the seconds of sound in all."""
    keys: set[str] = set()
    duration_s = 0.0
    with target.open("w") as file:
        for path in paths:
            for key, _, metadata in read_shard(path):
                if key in keys:
                    raise BadInput(f"the clip key {key} is used twice; each clip needs a key of its own.")
                keys.add(key)
                duration_s += metadata["duration_s"]
                file.write(json.dumps(metadata, sort_keys=True) + "\n")
    return round(duration_s, 6)


def _index(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Every shard, and over all of them what was left out and what was changed, by reason."""
    dropped, changed = Counter[str](), Counter[str]()
    for record in records:
        dropped.update(record["dropped"])
        changed.update(record["changed"])
    names = [name for record in records for name in record["dropped_names"]][:TOLD_DROPS]
    return {
        "shards": [record for record in records if record["num_clips"]],
        "dropped": dict(dropped),
        "changed": dict(changed),
        "dropped_names": names,
    }


def _metadata(plan: ClipPlan, clip: Clip, generator: str) -> dict[str, Any]:
    row: dict[str, Any] = {
        "key": plan.key,
        "split": plan.split,
        "transcript": plan.transcript,
        "labels": plan.labels,
        "speaker": plan.speaker,
        "licence": plan.licence,
        "provenance": {"generator": generator, **plan.parameters, **clip.provenance},
        "duration_s": round(len(clip.samples) / SAMPLE_RATE_HZ, 6),
    }
    if plan.exchanges:
        row["exchanges"] = [list(exchange) for exchange in plan.exchanges]
    if clip.timeline:
        row["timeline"] = [[e.track, e.value, e.start_s, e.end_s] for e in clip.timeline]
    if clip.changes:
        row["changes"] = list(clip.changes)
    return row


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)  # its defaults are fixed: mode 644, time 0, owner 0
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def read_index(corpus: AudioCorpus) -> dict[str, Any]:
    """`index.json`: `shards` (name, sha256, num_clips, ...), `dropped` and `changed` (reason -> number)."""
    return dict(json.loads((corpus.out / INDEX).read_text()))


def read_clips(corpus: AudioCorpus) -> list[dict[str, Any]]:
    """The metadata of every clip, in key order."""
    with (corpus.out / CLIPS).open() as file:
        return sorted((json.loads(line) for line in file), key=lambda clip: str(clip["key"]))


def shard_paths(corpus: AudioCorpus) -> list[Path]:
    """The corpus's tars in order."""
    return sorted(corpus.out.glob("clips-*.tar"))


def read_shard(path: Path) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Key, WAV bytes and metadata of each clip of one tar, in order.

    Raises:
        BadInput: the tar is cut off, or its members do not come in pairs.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            members = tar.getmembers()
            for sound, text in zip(members[::2], members[1::2], strict=True):
                key = sound.name.removesuffix(".wav")
                if (sound.name, text.name) != (f"{key}.wav", f"{key}.json"):
                    raise BadInput(f"{path} holds {sound.name} and {text.name} where a pair should be.")
                yield key, _content(path, tar, sound), json.loads(_content(path, tar, text))
    except (tarfile.TarError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path} is damaged ({error}); delete its artifact to have it made again.") from None


def _content(path: Path, tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    if file is None:
        raise BadInput(
            f"{member.name} in {path} is not a plain file; delete its artifact to have it made again."
        )
    return file.read()
