"""The verbs of `omni` that need a model, in this process. `flows/cli.py` hands over to them lazily."""

import os
import shutil
from pathlib import Path

from omni_model.artifacts import GptCheckpoint, TokenizerFiles
from omni_model.config import BadInput
from omni_model.model.nanochat_files import write_checkpoint, write_token_bytes
from omni_model.text.nanochat_tokenizer import pickle_ranks, ranks_of
from omni_model.text.tokenizer import SPECIAL_TOKENS


def export_nanochat(gpt: GptCheckpoint, tokenizer: TokenizerFiles | None, out: Path) -> list[Path]:
    """Write `out` as nanochat's base directory: `base_checkpoints/dN/` and, with a tokenizer, `tokenizer/`.

    Everything is built beside `out` and renamed: either all of it is there or nothing.

    Returns the files written.

    Raises:
        BadInput: `out` is there and not empty, or nanochat's files cannot say what is to be exported.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BadInput(f"{out} is there already; name a new or empty directory")
    if tokenizer is not None and tokenizer.vocab_size != gpt.vocab_size:
        raise BadInput(
            f"the GPT in {gpt.uri} has {gpt.vocab_size} tokens and the tokenizer in {tokenizer.uri} "
            f"{tokenizer.vocab_size}; export those that were trained together"
        )
    building = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    building.mkdir(parents=True)
    try:
        if tokenizer is not None:
            _write_tokenizer(tokenizer, building / "tokenizer")
        write_checkpoint(gpt.out, building)
        os.replace(building, out)
    except BaseException:
        shutil.rmtree(building)
        raise
    return sorted(path for path in out.rglob("*") if path.is_file())


def _write_tokenizer(tokenizer: TokenizerFiles, directory: Path) -> None:
    ranks = ranks_of(tokenizer.out)
    directory.mkdir()
    (directory / "tokenizer.pkl").write_bytes(pickle_ranks(ranks))
    num_bytes = [len(token) for token in sorted(ranks, key=lambda token: ranks[token])]
    write_token_bytes(num_bytes + [0] * len(SPECIAL_TOKENS), directory / "token_bytes.pt")
