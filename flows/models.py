"""Finding a finished model: by its directory, in the latest run, or the newest of its kind in the store."""

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from flows import runs
from omni_model.artifacts import (
    AdapterCheckpoint,
    Artifact,
    EncoderFiles,
    Familiarity,
    FeatureShards,
    GptCheckpoint,
    Manifest,
    TokenizerFiles,
)
from omni_model.config import BadInput, FeatureRecipe
from omni_model.plain import from_plain
from omni_model.storage import Store, damages, default_root, open_store
from tasks.stage import REGISTRY

A = TypeVar("A", bound=Artifact)
CHAT_STAGE = "tune_chat"
LISTENER_STAGE, FAMILIARITY_STAGE = "finetune_lora", "learn_familiarity"
TOKENIZER_STAGES = ("train_tokenizer", "import_tokenizer")


def artifact_at(directory: str, kind: type[A]) -> A:
    """The finished artifact in a directory.

    Raises:
        BadInput: there is none, it is of another kind, or it is damaged.
    """
    path = Path(directory).absolute()
    try:
        manifest = Manifest.read(path)
    except (FileNotFoundError, NotADirectoryError):
        raise BadInput(f"{path} is not a finished artifact: it has no manifest.json") from None
    handle = kind.from_manifest(manifest, path)
    if found := damages(path, manifest, trust=True):
        raise BadInput(f"{found[0]}; make the artifact again")
    return handle


def newest(store: Store, kind: type[A]) -> A:
    """The last artifact of a kind that the latest run made or reused.

    Raises:
        BadInput: there was no run yet, or none that makes this kind.
    """
    latest = store.root / "latest"
    if not (latest / "summary.json").exists():
        raise BadInput(f"there was no run in {store.url} yet; omni run makes one, or name a model with --gpt")
    for row in reversed(runs.read_rows(latest)):
        stage = row.name.partition(":")[0]
        manifest = store.find(stage, row.key)
        if manifest is not None and issubclass(Artifact.kinds[manifest.handle], kind):
            store.fetch(stage, row.key)
            return artifact_at(str(store.directory(stage, row.key)), kind)
    raise BadInput(f"the latest run in {store.url} made no {kind.__name__}; name a model with --gpt")


def talker(gpt: str | None, tokenizer: str | None) -> tuple[GptCheckpoint, TokenizerFiles]:
    """The chat model in a directory, else the newest in the store, and the tokenizer it was taught with.

    Raises:
        BadInput: there is none, or its tokenizer is not in the store and none was named.
    """
    store = open_store(default_root())
    chat = artifact_at(gpt, GptCheckpoint) if gpt else _newest_talker(store)
    if tokenizer:
        return chat, artifact_at(tokenizer, TokenizerFiles)
    digest = Manifest.read(Path(chat.uri)).components.get("inputs", {}).get("tokenizer")
    for stage in TOKENIZER_STAGES:
        for manifest in store.manifests(stage):
            if manifest.digest == digest:
                store.fetch(stage, manifest.key)
                return chat, artifact_at(str(store.directory(stage, manifest.key)), TokenizerFiles)
    raise BadInput(f"the tokenizer of {chat.uri} is not in {store.url}; name its directory with --tokenizer")


def _newest_talker(store: Store) -> GptCheckpoint:
    found = next(iter(store.manifests(CHAT_STAGE)), None)  # newest first
    if found is None:
        raise BadInput(f"no model in {store.url} has learned to chat; omni run base-tiny makes one")
    store.fetch(CHAT_STAGE, found.key)
    return artifact_at(str(store.directory(CHAT_STAGE, found.key)), GptCheckpoint)


# --- listeners -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Listening:
    """All that a listener is made of. `features` is how its encoder is read."""

    gpt: GptCheckpoint
    adapter: AdapterCheckpoint
    tokenizer: TokenizerFiles
    encoder: EncoderFiles
    features: FeatureRecipe
    familiarity: Familiarity | None


def listener(run: str | None, directory: str | None) -> Listening:
    """The listener of a run's directory, or in a directory of its own; else the newest in the store.

    What it was made of is found in the same store by what its manifest says.

    Raises:
        BadInput: there is none, or a part of it is no longer there.
    """
    if run and directory:
        raise BadInput("--run and --listener both name a listener; give one of them")
    named = Path(run or directory or "").absolute().resolve()
    store = open_store(str(named.parents[1]) if run or directory else default_root())
    if directory:
        adapter = artifact_at(directory, AdapterCheckpoint)
    else:
        adapter = _made_by(store, named) if run else _newest_listener(store)
    inputs: dict[str, str] = Manifest.read(Path(adapter.uri)).components.get("inputs", {})
    heard = {digest for name, digest in inputs.items() if name.startswith("features")}
    features = next((m for m in _manifests(store, FeatureShards) if m.digest in heard), None)
    if features is None:
        raise BadInput(f"the features that {adapter.uri} was taught on are not in {store.url}; run it again")
    parts = features.components
    return Listening(
        gpt=_with_digest(store, GptCheckpoint, inputs.get("gpt")),
        adapter=adapter,
        tokenizer=_with_digest(store, TokenizerFiles, inputs.get("tokenizer")),
        encoder=_with_digest(store, EncoderFiles, parts.get("inputs", {}).get("encoder")),
        features=from_plain(FeatureRecipe, parts["recipe"]),
        familiarity=_familiarity(store, heard),
    )


def _made_by(store: Store, run: Path) -> AdapterCheckpoint:
    if not (run / "summary.json").exists():
        raise BadInput(f"{run} is no run: it has no summary.json; name a directory of {store.url}/runs")
    for row in reversed(runs.read_rows(run)):
        stage = row.name.partition(":")[0]
        if (manifest := store.find(stage, row.key)) and manifest.handle == AdapterCheckpoint.__name__:
            return _fetched(store, manifest, AdapterCheckpoint)
    raise BadInput(f"the run {run} taught no listener; name another")


def _newest_listener(store: Store) -> AdapterCheckpoint:
    found = next(iter(store.manifests(LISTENER_STAGE)), None)  # newest first
    if found is None:
        raise BadInput(f"no model in {store.url} has learned to listen; omni run makes one")
    return _fetched(store, found, AdapterCheckpoint)


def _familiarity(store: Store, heard: set[str]) -> Familiarity | None:
    """The newest that was learned on these features."""
    for manifest in store.manifests(FAMILIARITY_STAGE):
        inputs = manifest.components.get("inputs", {})
        if heard == {digest for name, digest in inputs.items() if name.startswith("features")}:
            return _fetched(store, manifest, Familiarity)
    return None


def _manifests(store: Store, kind: type[Artifact]) -> list[Manifest]:
    names = [name for name, stage in REGISTRY.items() if issubclass(stage.makes, kind)]
    return [manifest for name in names for manifest in store.manifests(name)]


def _with_digest(store: Store, kind: type[A], digest: str | None) -> A:
    for manifest in _manifests(store, kind):
        if manifest.digest == digest:
            return _fetched(store, manifest, kind)
    raise BadInput(f"the {kind.__name__} that the listener was made with is not in {store.url}; run it again")


def _fetched(store: Store, manifest: Manifest, kind: type[A]) -> A:
    store.fetch(manifest.stage, manifest.key)
    return artifact_at(str(store.directory(manifest.stage, manifest.key)), kind)
