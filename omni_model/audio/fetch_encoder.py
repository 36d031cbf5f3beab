"""Somebody's trained encoder, brought into the store: found by its name, pinned by its bytes, checked.

A name says nothing about bytes: a hub may change them, a mirror may hold others. So the sha256 of the weights
is written down when they are first used, and weights that are not those are refused from then on.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

from omni_model import hardware
from omni_model.artifacts import canonical_json, sha256_file, sha256_text, write_atomically
from omni_model.audio.hubs import PREPROCESSOR, Place, places, weight_names
from omni_model.audio.pretrained import CONFIG, load_pretrained
from omni_model.audio.waveform import ENCODER_FRAME_RATE_HZ
from omni_model.config import JSON, BadInput, PretrainedEncoderRecipe, Runtime
from omni_model.downloads import DownloadFailed
from omni_model.storage import Workspace, finished

LOCK = "weights.lock.json"  # model -> sha256, beside the artifacts of this stage
W2V_BERT_WINDOW_S = 30.0  # it has no window of its own; attention grows with the square of it


def fetch_encoder(recipe: PretrainedEncoderRecipe, *, work: Workspace, runtime: Runtime) -> dict[str, JSON]:
    """A trained encoder's model directory. Stage function; returns EncoderFiles' facts.

    Looked for in `recipe.place` alone where that is given, else among what this stage fetched before, in the
    caches of ModelScope and Hugging Face, at ModelScope, and at each Hugging Face server of
    `hardware.network`.

    Raises:
        BadInput: it is nowhere, or not with the weights that were pinned; the sentence names every attempt.
    """
    lock = work.directory.parent / LOCK
    wanted = recipe.sha256.lower() or _pins(lock).get(recipe.model, "")
    reasons = []
    for place in _places(recipe, work):
        try:
            facts, sha256 = _take(place.bring(wanted), wanted, work.out)
        except DownloadFailed as error:
            reasons.append(f"{place.name}: {', '.join(error.reasons)}")
        except BadInput as error:
            reasons.append(f"{place.name}: {str(error).rstrip('.')}")
        else:
            if not wanted:
                write_atomically(lock, json.dumps({**_pins(lock), recipe.model: sha256}, indent=1) + "\n")
                print(f"{recipe.model} is pinned from now on to the sha256 {sha256}, in {lock}")
            work.metrics.summary(
                weights_sha256=sha256, weights_from=place.name, pinned="before" if wanted else "now"
            )
            name = "own weights" if recipe.place else recipe.model
            return {**facts, "weights": f"{name} {sha256[:12]}"}
    raise BadInput(_nowhere(recipe, wanted, reasons, lock))


def _places(recipe: PretrainedEncoderRecipe, work: Workspace) -> list[Place]:
    if recipe.place:
        directory = Path(recipe.place).expanduser()
        return [Place(str(directory), lambda _: directory)]

    def progress(done: int, total: int) -> None:
        work.metrics.log(done, total)

    found = places(recipe.model, hardware.network(), work.partial / "hub", progress)
    return [Place("this store", lambda wanted: _fetched_before(work.directory.parent, wanted)), *found]


def _fetched_before(stage: Path, wanted: str) -> Path:
    """An earlier artifact of this stage with the weights wanted: code that changed asks for no network."""
    for directory in finished(stage) if wanted else ():
        with contextlib.suppress(BadInput, OSError):
            weights = [directory / "out" / name for name in weight_names(directory / "out")]
            if _weights_digest(weights) == wanted:
                return directory / "out"
    raise BadInput("no such weights in it" if wanted else "no weights are pinned yet")


def _nowhere(recipe: PretrainedEncoderRecipe, wanted: str, reasons: list[str], lock: Path) -> str:
    advice = (
        "check the network, set HF_ENDPOINT or WHISPER_MS_ID, or name a directory that holds it as `place`"
    )
    if recipe.place:
        advice = "name another directory, or none to have it fetched"
    which = recipe.model
    if wanted:
        pin = "as the recipe's sha256 demands" if recipe.sha256 else f"to which {lock} pins it"
        which = f"{recipe.model} with weights of the sha256 {wanted}, {pin},"
        advice += f"; if other weights are meant, {_way_out(recipe, lock)}"
    return f"{which} is not to be had: {'; '.join(reasons)}; {advice}"


def _way_out(recipe: PretrainedEncoderRecipe, lock: Path) -> str:
    return "change the recipe's sha256" if recipe.sha256 else f"set the recipe's sha256 or delete {lock}"


def _pins(lock: Path) -> dict[str, str]:
    try:
        return dict(json.loads(lock.read_text()))
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError):
        raise BadInput(f"{lock} cannot be read; delete it to have the weights pinned anew") from None


def _take(directory: Path, wanted: str, out: Path) -> tuple[dict[str, JSON], str]:
    """Copy a model that is whole to `out`; returns its facts and the sha256 of its weights."""
    facts = _check(directory)
    weights = weight_names(directory)
    others = [CONFIG, *(name for name in (PREPROCESSOR,) if (directory / name).exists())]
    for name in (*others, *weights):
        shutil.copyfile(directory / name, out / name)
    sha256 = _weights_digest([out / name for name in weights])
    if wanted and sha256 != wanted:
        for name in (*others, *weights):
            (out / name).unlink()
        raise BadInput(f"its weights have the sha256 {sha256}, not {wanted}")
    return facts, sha256


def _weights_digest(files: list[Path]) -> str:
    """sha256 of the one file of weights; of several, that of the table of their names and sha256."""
    if len(files) == 1:
        return sha256_file(files[0])
    return sha256_text(canonical_json({path.name: sha256_file(path) for path in files}))


def _check(directory: Path) -> dict[str, JSON]:
    """The facts of a directory that holds every weight of an encoder that can be read.

    Raises:
        BadInput: it does not.
    """
    import transformers

    try:
        family = json.loads((directory / CONFIG).read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"{directory} has no {CONFIG} that describes a model") from None
    if family == "whisper":
        config = load_pretrained(transformers.WhisperModel, directory, ("encoder.",)).config
        window_s = config.max_source_positions / ENCODER_FRAME_RATE_HZ
        return _facts("whisper", config.d_model, config.encoder_layers, window_s)
    if family == "wav2vec2-bert":
        needed = ("feature_projection.", "encoder.")
        config = load_pretrained(transformers.Wav2Vec2BertModel, directory, needed).config
        if config.add_adapter or config.use_intermediate_ffn_before_adapter:
            raise BadInput(f"{directory} holds a w2v-BERT with an adapter, and only one without can be read")
        return _facts("w2v-bert", config.hidden_size, config.num_hidden_layers, W2V_BERT_WINDOW_S)
    raise BadInput(
        f"{directory} holds a model of the family {family!r}; whisper and wav2vec2-bert can be read"
    )


def _facts(family: str, width: int, num_layers: int, max_audio_s: float) -> dict[str, Any]:
    return {
        "family": family,
        "width": width,
        "num_layers": num_layers,
        "frame_rate_hz": ENCODER_FRAME_RATE_HZ,
        "max_audio_s": max_audio_s,
    }
