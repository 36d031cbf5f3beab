"""Corpora spoken by text-to-speech servers: the same words by many voices, with many emotions.

What decides the bytes is what a server replies, and it replies differently each time: these stages cannot
be repeated from a seed, so what was once spoken is kept. A clip is named by the digest of its request, and
whoever holds that clip already lends it: this attempt (killed or not, at the clip), or any earlier corpus of
the stage, whatever code made it. Only what nobody holds is asked of the server.

Shards hold one voice's lines in their order, so lines added at the end and voices added anywhere leave all
full shards as they were.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omni_model.artifacts import canonical_json, sha256_file, sha256_text
from omni_model.audio import tts_cosyvoice, tts_indextts
from omni_model.audio.clips import Clip, ClipPlan, Dropped, ShardPlan
from omni_model.audio.corpora import CLIPS, INDEX, read_shard, write_shards
from omni_model.audio.tts_exchange import NotSpoken, Request, Server, ServerFailed
from omni_model.audio.waveform import decode
from omni_model.config import (
    JSON,
    BadInput,
    CosyVoiceRecipe,
    IndexTtsRecipe,
    OutsideFolder,
    Runtime,
    SpokenLine,
)
from omni_model.config.sound import EMOTIONS
from omni_model.outside import digest_folder
from omni_model.plain import from_plain
from omni_model.storage import Workspace
from omni_model.storage.local import finished

MAX_FAILED_SHARE = 0.2  # of a shard's clips; one failure is always allowed
MAX_FAILURES_IN_A_ROW = 5
LINES = "lines.jsonl"


@dataclass(frozen=True)
class Utterance:
    """One line by one voice: the clip it is to be, and what the server is asked for it."""

    plan: ClipPlan
    request: Request


def synthesize_cosyvoice(recipe: CosyVoiceRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Have every line spoken by every voice of a CosyVoice server. Stage function; facts of an AudioCorpus.

    Not reproducible from a seed (the protocol has none): the server's replies are the payload.

    Raises:
        BadInput: no voices, lines or address that could be used, or another kind of server.
        ServerFailed: it does not answer, or too many clips cannot be had of it.
    """
    server = Server("CosyVoice", recipe.server, "cosyvoice.server")
    _check_script(recipe.script)
    spoken = {}
    for voice in tts_cosyvoice.voices(recipe):
        emotions = EMOTIONS if tts_cosyvoice.can_emote(voice, recipe.version) else ("",)
        spoken[voice.name] = [
            _utterance(
                "cosyvoice", recipe, voice.name, line, tts_cosyvoice.request(voice, line, recipe.version)
            )
            for line in _lines(recipe, emotions)
        ]
    return _write("cosyvoice", server, spoken, recipe.clips_per_shard, work)


def synthesize_indextts(recipe: IndexTtsRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """Have every line spoken by every voice of an IndexTTS server. Stage function; facts of an AudioCorpus.

    Not reproducible from a seed (the protocol has none): the server's replies are the payload.

    Raises:
        BadInput: no voices, lines or address that could be used, or another kind of server.
        ServerFailed: it does not answer, or too many clips cannot be had of it.
    """
    tts_indextts.check(recipe)
    _check_script(recipe.script)
    server = Server("IndexTTS", recipe.server, "indextts.server", health="/health")
    lines = _lines(recipe, EMOTIONS)
    spoken = {
        voice: [
            _utterance(
                "indextts", recipe, voice, line, tts_indextts.request(voice, line, recipe.emotion_weight)
            )
            for line in lines
        ]
        for voice in recipe.voices
    }
    return _write("indextts", server, spoken, recipe.clips_per_shard, work)


def _check_script(script: OutsideFolder) -> None:
    """Refuse a folder that is no longer what the run was planned for: the key speaks of its bytes."""
    if script.digest and digest_folder(Path(script.path)) != script.digest:
        raise BadInput(f"{script.path} has changed since this run was planned; run again.")


def _lines(recipe: CosyVoiceRecipe | IndexTtsRecipe, emotions: Sequence[str]) -> list[SpokenLine]:
    """The recipe's lines, else those of its script folder, else our own sentences with every emotion."""
    path = Path(recipe.script.path) / LINES if recipe.script.path else None
    if recipe.lines:
        lines = list(recipe.lines)
    elif path and path.exists():
        lines = _read_lines(path)
    else:
        sentences = json.loads(Path(__file__).with_name("spoken_sentences.json").read_text("utf-8"))
        lines = [SpokenLine(text, style) for text in sentences[recipe.split] for style in emotions]
    for number, line in enumerate(lines):
        if not any(character.isalnum() for character in line.text):
            raise BadInput(f"line {number + 1} ({line.text!r}) has nothing to speak.")
        if line in lines[:number]:
            raise BadInput(f"the line {line.text!r} is there twice with the style {line.style!r}.")
    return lines


def _read_lines(path: Path) -> list[SpokenLine]:
    lines = []
    for number, row in enumerate(path.read_text("utf-8").splitlines(), start=1):
        try:
            if row.strip():
                lines.append(from_plain(SpokenLine, json.loads(row)))
        except (ValueError, TypeError) as error:
            raise BadInput(
                f'{path} line {number} is no line like {{"text": "...", "style": "happy"}} ({error}).'
            ) from None
    if not lines:
        raise BadInput(f"{path} has no lines.")
    return lines


def _utterance(
    kind: str, recipe: CosyVoiceRecipe | IndexTtsRecipe, voice: str, line: SpokenLine, request: Request
) -> Utterance:
    """The clip's name is a digest of all that the recipe says about how it is to sound."""
    asked: dict[str, JSON] = {
        "model": recipe.model,
        "version": recipe.version,
        "endpoint": request.path,
        "request": dict(request.fields),
    }
    if request.recording:
        asked["prompt_sha256"] = hashlib.sha256(request.recording).hexdigest()
    plan = ClipPlan(
        key=f"{kind}-{sha256_text(canonical_json(asked))[:20]}",
        split=recipe.split,
        labels={"emotion": line.style} if line.style else {},
        parameters=asked,
        transcript=line.text,
        speaker=voice,
        licence=recipe.licence,
    )
    return Utterance(plan, request)


def _write(
    kind: str, server: Server, spoken: dict[str, list[Utterance]], clips_per_shard: int, work: Workspace
) -> dict[str, JSON]:
    replies = work.partial / "replies"
    replies.mkdir(exist_ok=True)
    lent = _held_elsewhere(work)
    shards = []
    for voice, utterances in spoken.items():
        slug = re.sub(r"[^A-Za-z0-9]+", "-", voice).strip("-")[-40:]
        for number, first in enumerate(range(0, len(utterances), clips_per_shard)):
            group = utterances[first : first + clips_per_shard]
            name = f"{slug}-{sha256_text(voice)[:8]}-{number:05d}"
            made_from = sha256_text(canonical_json([utterance.plan.plain() for utterance in group]))
            shards.append(ShardPlan(name, made_from, _making(server, group, replies, lent)))
    expected = sum(len(utterances) for utterances in spoken.values())
    with server:
        return write_shards(shards, generator=kind, work=work, expected=expected)


def _making(
    server: Server, utterances: Sequence[Utterance], replies: Path, lent: dict[str, tuple[Path, str]]
) -> Callable[[], Iterator[tuple[ClipPlan, Clip] | Dropped]]:
    def make() -> Iterator[tuple[ClipPlan, Clip] | Dropped]:
        _borrow([utterance.plan.key for utterance in utterances], replies, lent)
        failed = in_a_row = 0
        for utterance in utterances:
            plan, reply = utterance.plan, replies / f"{utterance.plan.key}.wav"
            try:
                if not reply.exists():
                    _keep(reply, server.speak(utterance.request))
            except NotSpoken as error:
                failed, in_a_row = failed + 1, in_a_row + 1
                if in_a_row == MAX_FAILURES_IN_A_ROW or failed > max(1, MAX_FAILED_SHARE * len(utterances)):
                    raise ServerFailed(
                        f"{failed} of {len(utterances)} clips of the voice {plan.speaker} could not be had "
                        f"from {server.url}, the last ({plan.transcript!r}) because of {error}; look at the "
                        "server's log and run again: the clips that it has spoken are kept"
                    ) from None
                yield Dropped(f"{plan.speaker}: {plan.transcript}", error.reason)
                continue
            in_a_row = 0
            # Read back even when it has just come: fresh and kept replies take one path to the same bytes.
            yield plan, Clip(decode(reply.read_bytes(), str(reply)))

    return make


def _keep(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _held_elsewhere(work: Workspace) -> dict[str, tuple[Path, str]]:
    """Clip's key -> tar and sha256 that hold it, of every finished corpus of this stage; the newest wins."""
    found: dict[str, tuple[Path, str]] = {}
    for directory in reversed(finished(work.directory.parent)):
        with contextlib.suppress(OSError, ValueError, KeyError):  # a damaged corpus lends nothing
            rows = (directory / "out" / CLIPS).read_text().splitlines()
            keys = iter([str(json.loads(row)["key"]) for row in rows])
            for shard in json.loads((directory / "out" / INDEX).read_text())["shards"]:
                place = (directory / "out" / shard["name"], shard["sha256"])
                found.update(dict.fromkeys(itertools.islice(keys, shard["num_clips"]), place))
    return found


def _borrow(keys: Sequence[str], replies: Path, lent: dict[str, tuple[Path, str]]) -> None:
    """Copy the clips of these keys that earlier corpora hold to `replies`, from tars that are whole."""
    wanted = {key for key in keys if key in lent and not (replies / f"{key}.wav").exists()}
    for tar, sha256 in {lent[key] for key in wanted}:
        if not tar.exists() or sha256_file(tar) != sha256:
            continue
        for key, content, _ in read_shard(tar):
            if key in wanted:
                _keep(replies / f"{key}.wav", content)
