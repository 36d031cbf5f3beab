"""Finding a finished model: by its directory, in the latest run, or the newest of its kind in the store."""

from pathlib import Path
from typing import TypeVar

from flows import runs
from omni_model.artifacts import Artifact, GptCheckpoint, Manifest, TokenizerFiles
from omni_model.config import BadInput
from omni_model.storage import Store, damages, default_root, open_store

A = TypeVar("A", bound=Artifact)
CHAT_STAGE = "tune_chat"
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
