"""What a base model is worth: bits per byte of text, CORE, and what it writes on.

Bits per byte compare models of any tokenizer on one corpus, CORE on tasks that everybody knows, and a glance
at greedy continuations tells what neither figure does. Every figure is kept as soon as it is there, so an
evaluation that is killed goes on with the next one.

Legend: B rows, T tokens a row is judged on (a row has one more), V vocabulary.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from omni_model import hardware
from omni_model.artifacts import CoreBundle, GptCheckpoint, TextCorpus, TokenizerFiles, write_atomically
from omni_model.config import JSON, BadInput, BaseEvaluationRecipe, Runtime
from omni_model.evaluation.core import in_order, judge
from omni_model.evaluation.core_tasks import Task, read_bundle, read_items
from omni_model.model.backends import equip
from omni_model.model.gpt import GPT
from omni_model.model.greedy import continue_greedily
from omni_model.model.weights import load_gpt
from omni_model.storage import Workspace
from omni_model.text.loader import validation_rows
from omni_model.text.tokenizer import Tokenizer, load_tokenizer, token_bytes
from omni_model.training.bits_per_byte import bits_per_byte
from omni_model.training.pretrain import PROMPTS, SAMPLE_TOKENS
from omni_model.training.setup import WIDE, settled_dtype

SCORES = "scores.json"
KEPT = "figures.json"
BATCH_TOKENS = 2**14
TENTHS = 10  # of a task are told of


def evaluate_base(
    recipe: BaseEvaluationRecipe,
    gpt: GptCheckpoint,
    tokenizer: TokenizerFiles,
    text: TextCorpus,
    core: CoreBundle,
    *,
    work: Workspace,
    runtime: Runtime,
) -> dict[str, JSON]:
    """Stage: `scores.json` of a base model.

    Raises:
        BadInput: GPT and tokenizer do not belong together, the corpus is too small, or the bundle is damaged.
    """
    words = load_tokenizer(tokenizer.out)
    if words.vocab_size != gpt.vocab_size:
        raise BadInput(
            f"the GPT in {gpt.uri} has {gpt.vocab_size} tokens and the tokenizer in {tokenizer.uri} "
            f"{words.vocab_size}; judge the GPT with the tokenizer it was trained with"
        )
    bundle = read_bundle(core.out)
    model = open_gpt(gpt.out, recipe.dtype, work)
    kept = Kept(work, total=len(bundle.tasks) + 3)

    scores: dict[str, Any] = {"bundle": bundle.name}
    for split, name in (("train", "train_bpb"), ("validation", "val_bpb")):
        measure = partial(split_bpb, model, words, text.out, tokenizer.out, split, recipe)
        scores[name] = kept.figure(name, measure)
    scores["continuations"] = kept.figure("continuations", partial(continuations, model, words))
    scores["tasks"] = {
        task.label: kept.figure(
            f"task {task.label}", partial(judged, task, core.out, model, words, recipe, kept)
        )
        for task in bundle.tasks
    }
    scores["core"] = sum(task["centered"] for task in scores["tasks"].values()) / len(bundle.tasks)
    scores = rounded(scores)
    (work.out / SCORES).write_text(json.dumps(scores, sort_keys=True, indent=1) + "\n", encoding="utf-8")
    work.metrics.summary(**{name: scores[name] for name in ("val_bpb", "train_bpb", "core")})
    return {"val_bpb": scores["val_bpb"], "core": scores["core"]}


class Kept:
    """Figures that survive a kill, each computed once; tells how far the evaluation is."""

    def __init__(self, work: Workspace, total: int) -> None:
        work.partial.mkdir(exist_ok=True)
        self._path, self._metrics = work.partial / KEPT, work.metrics
        self._figures: dict[str, Any] = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._done, self._total = 0, total

    def figure(self, name: str, compute: Callable[[], Any]) -> Any:
        """What was kept under this name, else what `compute` returns (plain JSON), kept from now on."""
        if name not in self._figures:
            self._figures[name] = compute()
            write_atomically(self._path, json.dumps(self._figures))
        self._done += 1
        self.tell(0.0)
        return self._figures[name]

    def tell(self, share: float) -> None:
        """This share of the figure at work is done."""
        self._metrics.log(int(TENTHS * (self._done + share)), TENTHS * self._total)


def open_gpt(directory: Path, dtype: str, work: Workspace) -> GPT:
    """A trained GPT on this machine's device, computing in `dtype` ("auto": what the machine likes)."""
    gpt = load_gpt(directory, settled_dtype(dtype)).eval().requires_grad_(False)
    gpt.to(hardware.device())
    if gpt.cos.device.type == "cuda":
        equip(gpt, work.directory.parent.parent / ".kernels" / "attention.json")
    elif gpt.config.n_embd >= WIDE:
        hardware.speed_up_products(work.partial / "products.json")
    return gpt


def split_bpb(
    gpt: GPT, words: Tokenizer, corpus: Path, tokenizer: Path, split: str, recipe: BaseEvaluationRecipe
) -> float:
    """Bits per byte of the first `recipe.split_tokens` tokens of a split, packed as for training."""
    num_tokens = gpt.config.sequence_len
    rows = torch.from_numpy(
        validation_rows(corpus, tokenizer, num_tokens + 1, max(1, recipe.split_tokens // num_tokens), split)
    )
    batches = (
        part.to(gpt.cos.device, torch.int64) for part in rows.split(max(1, BATCH_TOKENS // num_tokens))
    )
    return bits_per_byte(gpt, batches, torch.tensor(token_bytes(words)))


def judged(
    task: Task, bundle: Path, gpt: GPT, words: Tokenizer, recipe: BaseEvaluationRecipe, kept: Kept
) -> dict[str, Any]:
    """How well the model does in one task of CORE.

    As in nanochat, whose scores these are compared with, a prompt may be longer than the rows of training: it
    is read whole as far as there are positions, and only beyond that it loses its beginning.
    """
    items = in_order(read_items(bundle, task), recipe.core_items_per_task)
    right = judge(
        task,
        items,
        gpt,
        words,
        max_tokens=len(gpt.cos),
        progress=lambda done: kept.tell(done / len(items)),
    )
    accuracy = sum(right) / len(right)
    return {
        "kind": task.kind,
        "accuracy": accuracy,
        "baseline": task.baseline,
        "centered": task.centered(accuracy),
        "n": len(right),
    }


def continuations(gpt: GPT, words: Tokenizer) -> list[dict[str, str]]:
    """What the model writes, most likely token by token, after the prompts that pretraining shows too."""
    found = []
    for prompt in PROMPTS:
        ids = [words.bos_id, *words.encode(prompt)]
        written = continue_greedily(gpt, ids, SAMPLE_TOKENS, stop=(words.bos_id,))
        found.append({"prompt": prompt, "text": words.decode(written)})
    return found


def rounded(value: Any) -> Any:
    """Every number that is not whole, to six digits."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return round(value, 6) if isinstance(value, float) else value
