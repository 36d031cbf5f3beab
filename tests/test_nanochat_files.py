"""nanochat's own files: read with the original's numbers, refused when strange, written as it has them."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import random
import sys
import types
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flows import cli as command
from flows.nanochat import describe
from omni_model.artifacts import (
    GptCheckpoint,
    Instructions,
    ProjectorCheckpoint,
    TokenizerFiles,
    hash_payload,
    sha256_file,
)
from omni_model.cli import export_nanochat
from omni_model.config import BadInput, OutsideFile, TokenizerImportRecipe
from omni_model.evaluation.learning_sections import curves
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.nanochat_files import import_gpt, read_checkpoint, weight_shapes
from omni_model.model.weights import load_gpt, save_gpt
from omni_model.text.nanochat_tokenizer import (
    import_tokenizer,
    pickle_ranks,
    ranks_of,
    read_ranks,
    recover_merges,
    spelling,
)
from omni_model.text.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer, load_tokenizer, train_bpe
from omni_model.training.align import align
from omni_model.training.instructions import build_instructions
from tasks.fingerprint import CodeBase
from tests.test_model import formula_weights
from tests.test_stages import ALIGN, MIX, make, make_clips, write_clips, write_features

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = json.loads((ROOT / "tests" / "golden" / "nanochat_eras.json").read_text())
CURRENT, BEFORE_SMEAR = "92d63d4", "6ed7d1d"
VOCAB_SIZE = GOLDEN["model_config"]["vocab_size"]


# --- folders as nanochat writes them -------------------------------------------------------------


def state_dict(era: str = CURRENT, **config: Any) -> dict[str, Tensor]:
    shapes = weight_shapes(GPTConfig(**(GOLDEN["model_config"] | config)))
    return {name: formula_weights(name, torch.Size(shapes[name])) for name in GOLDEN["eras"][era]["names"]}


def meta_of(step: int) -> dict[str, Any]:
    more = {"user_config": {"depth": 3}, "device_batch_size": 32, "loop_state": {"smooth_train_loss": 1.0}}
    return {"step": step, "val_bpb": 1.25, "model_config": GOLDEN["model_config"], **more}


def small_ranks() -> dict[bytes, int]:
    """Ranks as rustbpe makes them: the bytes in their own order, then merges learned from a text."""
    words = ["the heard sound of a loud dog that barks", "déjà vu", "你好 你们", Path(__file__).read_text()]
    shown = {character: byte for byte, character in enumerate(spelling())}
    plain = json.loads(train_bpe(words, VOCAB_SIZE).to_str())
    merged = [bytes(shown[c] for c in left + right) for left, right in plain["model"]["merges"]]
    ranks = {bytes([byte]): byte for byte in range(256)} | {t: 256 + i for i, t in enumerate(merged)}
    assert len(ranks) + len(SPECIAL_TOKENS) == VOCAB_SIZE
    return ranks


def encoding_state(ranks: dict[bytes, int]) -> dict[str, Any]:
    special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
    return {
        "name": "rustbpe",
        "pat_str": SPLIT_PATTERN,
        "mergeable_ranks": ranks,
        "special_tokens": special,
    }


class Encoding:
    """Pickles, and is unpickled, as tiktoken's class of that name."""

    def __init__(self, state: object) -> None:
        self.state = state

    def __getstate__(self) -> object:
        return self.state

    def __setstate__(self, state: object) -> None:
        self.state = state


@pytest.fixture
def tiktoken_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    core = types.ModuleType("tiktoken.core")
    core.Encoding = Encoding  # type: ignore[attr-defined]
    monkeypatch.setattr(Encoding, "__module__", "tiktoken.core")
    monkeypatch.setitem(sys.modules, "tiktoken", types.ModuleType("tiktoken"))
    monkeypatch.setitem(sys.modules, "tiktoken.core", core)


@pytest.fixture
def base(tmp_path: Path, tiktoken_stand_in: None) -> Path:
    """nanochat's base directory with a tokenizer and one step of a model of depth 3."""
    (tmp_path / "base" / "tokenizer").mkdir(parents=True)
    with (tmp_path / "base" / "tokenizer" / "tokenizer.pkl").open("wb") as file:
        pickle.dump(Encoding(encoding_state(small_ranks())), file)
    write_step(model_directory(tmp_path / "base"), 1500, state_dict())
    return tmp_path / "base"


def model_directory(base: Path) -> Path:
    return base / "base_checkpoints" / "d3"


def write_step(directory: Path, step: int, weights: dict[str, Any], **meta: Any) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    torch.save(weights, directory / f"model_{step:06d}.pt")
    (directory / f"meta_{step:06d}.json").write_text(json.dumps(meta_of(step) | meta, indent=2))


def import_from(directory: Path, into: Path, tokenizer: str | None = None) -> tuple[GptCheckpoint, Any]:
    """Both handles, through the stage functions themselves."""
    gpt_recipe, words_recipe = describe(directory, None, tokenizer)
    words = make(import_tokenizer, TokenizerFiles, words_recipe, directory=into / "words")
    return make(import_gpt, GptCheckpoint, gpt_recipe, words, directory=into / "gpt"), words


# --- the model ------------------------------------------------------------------------------------


def test_the_table_of_weights_is_the_models_own() -> None:
    for changes in ({}, {"n_layer": 4, "n_kv_head": 4, "vocab_size": 300}, {"n_layer": 1}):
        config = GPTConfig(**(GOLDEN["model_config"] | changes))
        with torch.device("meta"):
            own = {name: tuple(value.shape) for name, value in GPT(config).state_dict().items()}
        assert weight_shapes(config) == own


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("era", [CURRENT, BEFORE_SMEAR])
def test_both_eras_give_the_originals_logits(base: Path, tmp_path: Path, era: str, compiled: bool) -> None:
    weights = {("_orig_mod." if compiled else "") + name: value for name, value in state_dict(era).items()}
    write_step(model_directory(base), 1500, weights)
    gpt, _ = import_from(model_directory(base), tmp_path)
    expected = GOLDEN["eras"][era]
    ids = ((torch.arange(300) ** 2 * 7 + 3) % VOCAB_SIZE).view(1, 300)
    with torch.no_grad():
        logits = load_gpt(gpt.out)(ids)
    torch.testing.assert_close(
        logits[0, GOLDEN["positions"], :4], torch.tensor(expected["logits"]), rtol=0, atol=1e-4
    )
    assert logits.double().square().sum().item() == pytest.approx(expected["square_sum"], rel=1e-5)


def test_what_an_era_lacks_is_neutral_and_its_constants_are_stated(base: Path) -> None:
    directory = model_directory(base)
    write_step(directory, 1500, state_dict(BEFORE_SMEAR))
    paths = directory / "model_001500.pt", directory / "meta_001500.json"
    config, weights = read_checkpoint(*paths)
    assert (config.qk_scale, config.short_window_divisor, config.rotary_base) == (1.15, 3, 100_000.0)
    assert (config.ve_gate_channels, config.ve_gate_scale, config.softcap) == (12, 3.0, 15.0)
    for name in ("smear_gate.weight", "smear_lambda", "backout_lambda"):
        assert not weights[name].any()
    write_step(directory, 1500, state_dict(CURRENT))
    config, weights = read_checkpoint(*paths)
    assert (config.qk_scale, config.short_window_divisor) == (1.2, 4)
    assert weights["backout_lambda"].any()


def test_the_payload_is_what_our_own_training_leaves(base: Path, tmp_path: Path) -> None:
    gpt, words = import_from(model_directory(base), tmp_path)
    model = GPT(GPTConfig(**GOLDEN["model_config"]))
    model.load_state_dict(state_dict())
    (tmp_path / "own").mkdir()
    save_gpt(model, tmp_path / "own")
    own = hash_payload(tmp_path / "own")
    assert [file for file in hash_payload(gpt.out) if file.path != "curve.json"] == own
    assert (gpt.steps, gpt.n_embd, gpt.vocab_size) == (1500, 32, words.vocab_size)
    assert gpt.num_parameters == model.num_params()
    assert "No curve was recorded" in curves([("The text model", "loss", gpt)])
    assert json.loads((tmp_path / "gpt" / "summary.json").read_text()) == {"val_bpb": 1.25}


def test_bf16_embeddings_are_widened_and_pad_rows_kept(base: Path, tmp_path: Path) -> None:
    weights = state_dict()
    narrow = {n: v.bfloat16() if "wte" in n or "value_embeds" in n else v for n, v in weights.items()}
    write_step(model_directory(base), 1500, narrow)
    gpt, _ = import_from(model_directory(base), tmp_path)
    loaded = load_gpt(gpt.out).state_dict()
    for name, value in narrow.items():
        assert loaded[name].dtype == torch.float32
        assert torch.equal(loaded[name], value.float())
    assert loaded["transformer.wte.weight"].size(0) == 384  # 330 rounded up to blocks of 64


def test_a_later_stage_takes_the_imported_pair(base: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    clips = {"sounds": make_clips("tone", ("pitch", "loudness"), 16)}
    clips["speech"] = make_clips("speech", ("animal", "voice"), 16)
    heard = [write_features(tmp_path / name, each) for name, each in clips.items()]
    corpora = [write_clips(tmp_path / f"{name}-clips", each) for name, each in clips.items()]
    mix = make(build_instructions, Instructions, MIX, *corpora, directory=tmp_path / "mix")
    gpt, words = import_from(model_directory(base), tmp_path)
    recipe = dataclasses.replace(ALIGN, steps=2)
    place = tmp_path / "projector"
    made = make(align, ProjectorCheckpoint, recipe, gpt, words, mix, *heard, directory=place)
    assert made.n_embd == gpt.n_embd


def test_the_newest_step_is_chosen_as_a_number(base: Path) -> None:
    directory = model_directory(base)
    write_step(directory, 999_999, state_dict())
    write_step(directory, 1_000_000, state_dict())
    assert describe(directory, None, None)[0].step == 1_000_000
    recipe, words = describe(directory, 1500, None)
    assert recipe.model == OutsideFile(sha256_file(directory / "model_001500.pt"), recipe.model.path)
    assert Path(recipe.meta.path).name == "meta_001500.json"
    assert Path(words.pickle.path) == base / "tokenizer" / "tokenizer.pkl"


def test_the_tokenizer_may_lie_in_the_models_directory(base: Path) -> None:
    (base / "tokenizer").rename(model_directory(base) / "tokenizer")
    words = describe(model_directory(base), None, None)[1]
    assert Path(words.pickle.path).parent == model_directory(base) / "tokenizer"


# --- the model: refusals --------------------------------------------------------------------------


def spoil_weights(base: Path, change: str) -> None:
    weights: dict[str, Any] = state_dict()
    gate = "transformer.h.0.attn.ve_gate.weight"
    if change == "old gate":
        weights[gate] = torch.zeros(2, 32)
    elif change == "oldest":
        del weights["resid_lambdas"]
    elif change == "half an era":
        del weights["backout_lambda"]
    elif change == "unknown":
        weights["transformer.h.0.attn.router.weight"] = torch.zeros(3)
    elif change == "lacking":
        del weights["transformer.h.1.mlp.c_fc.weight"]
    elif change == "shape":
        weights["lm_head.weight"] = weights["lm_head.weight"][:-64]
    elif change == "nan":
        weights["lm_head.weight"][5, 5] = float("nan")
    elif change == "half precision":
        weights["lm_head.weight"] = weights["lm_head.weight"].half()
    elif change == "no tensor":
        weights["note"] = "hello"
    elif change == "twice":
        weights["_orig_mod.lm_head.weight"] = weights["lm_head.weight"]
    write_step(model_directory(base), 1500, weights)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            "old gate",
            r"h.0.attn.ve_gate.weight has the shape \(2, 32\).* only checkpoints .* since 2026-03-09",
        ),
        ("oldest", "no resid_lambdas; only checkpoints written since 2026-03-09"),
        ("half an era", "lacks the tensor backout_lambda"),
        ("unknown", "has the tensor transformer.h.0.attn.router.weight, which this version does not know"),
        ("lacking", "lacks the tensor transformer.h.1.mlp.c_fc.weight"),
        ("shape", r"lm_head.weight has the shape \(320, 32\) and its meta file asks for \(384, 32\)"),
        ("nan", "lm_head.weight has values that are not finite"),
        ("half precision", "lm_head.weight is torch.float16"),
        ("no tensor", "note is str"),
        ("twice", "both with and without _orig_mod."),
    ],
)
def test_strange_weights_are_named(base: Path, tmp_path: Path, change: str, sentence: str) -> None:
    spoil_weights(base, change)
    with pytest.raises(BadInput, match=sentence):
        import_from(model_directory(base), tmp_path)
    assert not list((tmp_path / "gpt" / "out").iterdir())


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"n_layer": 4}, "model_001500.pt has 3 layers and its meta file says n_layer 4"),
        ({"n_layer": 10**12}, "has 3 layers and its meta file says n_layer 1000000000000"),
        ({"rope_scaling": 2}, "unknown field model_config.rope_scaling; this version knows sequence_len"),
        ({"window_pattern": "XL"}, "does not describe a GPT: window_pattern 'XL'"),
        ({"n_embd": "32"}, "does not describe a GPT: n_embd must be a positive integer, not '32'"),
        ({"n_embd": 64}, "h.0.attn.c_k.weight has the shape|wte.weight has the shape"),
        ({"vocab_size": 331}, "says vocab_size 331 and the tokenizer has 330; .* --tokenizer"),
    ],
)
def test_a_meta_file_that_does_not_fit_is_named(
    base: Path, tmp_path: Path, changes: dict[str, Any], sentence: str
) -> None:
    write_step(model_directory(base), 1500, state_dict(), model_config=GOLDEN["model_config"] | changes)
    with pytest.raises(BadInput, match=sentence):
        import_from(model_directory(base), tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is not JSON"),
        ("[1]", "has no model_config"),
        ('{"model_config": {}}', "lacks model_config.sequence_len; only checkpoints"),
        ('{"step": 7, "model_config": ' + json.dumps(GOLDEN["model_config"]) + "}", "about step 7, not 1500"),
    ],
)
def test_a_meta_file_of_another_kind_is_named(base: Path, tmp_path: Path, text: str, sentence: str) -> None:
    (model_directory(base) / "meta_001500.json").write_text(text)
    with pytest.raises(BadInput, match=f"meta_001500.json.*{sentence}"):
        import_from(model_directory(base), tmp_path)


def test_what_is_missing_is_named(base: Path, tmp_path: Path) -> None:
    directory = model_directory(base)
    with pytest.raises(BadInput, match="has no step 7; choose from 1500"):
        describe(directory, 7, None)
    with pytest.raises(BadInput, match="there is no tokenizer at .*elsewhere.*--tokenizer"):
        describe(directory, None, str(tmp_path / "elsewhere"))
    with pytest.raises(BadInput, match="nowhere is not a directory"):
        describe(tmp_path / "nowhere", None, None)
    (directory / "meta_001500.json").rename(tmp_path / "meta")
    with pytest.raises(BadInput, match="meta_001500.json is missing"):
        describe(directory, None, None)
    (directory / "model_001500.pt").unlink()
    with pytest.raises(BadInput, match="holds no model_NNNNNN.pt"):
        describe(directory, None, None)


def test_a_file_that_changes_meanwhile_is_refused(base: Path, tmp_path: Path) -> None:
    gpt_recipe, words_recipe = describe(model_directory(base), None, None)
    words = make(import_tokenizer, TokenizerFiles, words_recipe, directory=tmp_path / "words")
    write_step(model_directory(base), 1500, state_dict(BEFORE_SMEAR))
    with pytest.raises(BadInput, match="model_001500.pt changed while it was being imported"):
        make(import_gpt, GptCheckpoint, gpt_recipe, words, directory=tmp_path / "gpt")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_a_truncated_model_file_is_damaged(base: Path, tmp_path: Path, share: float) -> None:
    path = model_directory(base) / "model_001500.pt"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(BadInput, match="model_001500.pt is damaged or holds more than tensors"):
        import_from(model_directory(base), tmp_path)


# --- pickles that do more than hold data ----------------------------------------------------------


class Evil:
    """Calls a function with arguments when it is unpickled."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def evil_pickles(mark: Path) -> dict[str, bytes]:
    touch = f"touch {mark}"
    shell, code = Evil(os.system, touch), Evil(eval, f"open({str(mark)!r}, 'w')")
    state = encoding_state({bytes([b]): b for b in range(256)})
    short = touch.encode()
    pickles = {f"system{p}": pickle.dumps(shell, p) for p in range(6)}
    return pickles | {
        "eval": pickle.dumps(code),
        "inside the state": pickle.dumps(Encoding(state | {"name": shell})),
        "inside the ranks": pickle.dumps(Encoding(state | {"mergeable_ranks": {b"a": code}})),
        "beside the encoding": pickle.dumps([shell, Encoding(state)]),
        "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(short)]) + short + b"\x85R.",
        "inst": b"(S'" + short + b"'\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS'" + short + b"'\no.",
        "attribute of the encoding": b"\x80\x04\x8c\x0dtiktoken.core\x8c\x11Encoding.__init__\x93.",
        "module of the encoding": b"\x80\x04\x8c\x0dtiktoken.core\x8c\x02os\x93.",
        "tiktoken's loader": b"ctiktoken.load\nread_file\n(S'http://127.0.0.1/'\ntR.",
        "persistent": b"\x80\x04\x8c\x01aQ.",
        "a copy maker": b"ccopy_reg\n_reconstructor\n(ctiktoken.core\nEncoding\nc__builtin__\nobject\nNtR.",
    }


@pytest.mark.usefixtures("tiktoken_stand_in")
def test_no_pickle_runs_anything(tmp_path: Path) -> None:
    mark, path = tmp_path / "mark", tmp_path / "tokenizer.pkl"
    for name, content in evil_pickles(mark).items():
        path.write_bytes(content)
        with pytest.raises(BadInput, match="tokenizer.pkl is not a .*tokenizer of nanochat's"):
            read_ranks(path)
        assert not mark.exists(), name
    for name in ("system4", "inside the state", "stack global", "inst", "eval"):  # they are live
        pickle.loads(evil_pickles(mark)[name])
        assert mark.exists(), name
        mark.unlink()


def test_what_a_pickle_asks_for_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(Evil(os.system, "true")))
    with pytest.raises(BadInput, match=r"it asks for (posix|nt)\.system"):
        read_ranks(path)


def test_a_model_file_runs_nothing_either(base: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    weights = state_dict() | {"resid_lambdas": Evil(os.system, f"touch {mark}")}
    write_step(model_directory(base), 1500, weights)
    with pytest.raises(BadInput, match="model_001500.pt is damaged or holds more than tensors"):
        import_from(model_directory(base), tmp_path)
    assert not mark.exists()


# --- the tokenizer --------------------------------------------------------------------------------


def load_ranks(ranks: dict[bytes, int], directory: Path) -> Tokenizer:
    """Our tokenizer of these ranks, by way of the file and the stage."""
    directory.mkdir(exist_ok=True)
    path = directory / "tokenizer.pkl"
    path.write_bytes(pickle_ranks(ranks))
    recipe = TokenizerImportRecipe(OutsideFile(sha256_file(path), str(path)))
    return load_tokenizer(make(import_tokenizer, TokenizerFiles, recipe, directory=directory).out)


def join_by_rank(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule in its plainest form: of all neighbours join the lowest rank, leftmost first."""
    parts = [word[i : i + 1] for i in range(len(word))]
    while True:
        found = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not found:
            return [ranks[part] for part in parts]
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def test_merges_make_the_ids_that_ranks_make(tmp_path: Path) -> None:
    ranks, rng = small_ranks(), random.Random(1)
    tokenizer = load_ranks(ranks, tmp_path)
    words = ["".join(rng.choices("theloudargn你好éïs", k=rng.randrange(1, 40))) for _ in range(500)]
    expected = [join_by_rank(word.encode(), ranks) for word in words]
    assert [tokenizer.encode(word) for word in words] == expected
    assert any(max(ids) > 256 for ids in expected)
    assert [tokenizer.special(name) for name in SPECIAL_TOKENS] == list(range(321, 330))


def test_ids_are_tiktokens_for_every_kind_of_character(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {bytes([byte]): byte for byte in range(256)}
    for letter in b"a1. '":  # join every byte with its neighbours, so that ids show where text was split
        for byte in range(256):
            for token in (bytes([letter, byte]), bytes([byte, letter])):
                ranks.setdefault(token, len(ranks))
    letters = [*range(0x3400), *range(0xA000, 0xAC00), *range(0xF900, 0x20000)]  # not the blocks of Han
    texts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("*.py"))]
    for first in range(0, len(letters), 64):
        some = [chr(code) for code in letters[first : first + 64]]
        texts += ["".join(f"a{c}a.{c}{c}1" for c in some), "".join(f" {c} '{c}" for c in some)]
    for number, known in enumerate((small_ranks(), ranks)):
        ours = load_ranks(known, tmp_path / str(number))
        truth = tiktoken.Encoding(**encoding_state(known))
        for text in texts if known is ranks else texts[:20]:
            assert ours.encode(text) == truth.encode_ordinary(text), text[:20]
        assert pickle.loads(pickle_ranks(known)).__getstate__() == encoding_state(known)
        (tmp_path / "real.pkl").write_bytes(pickle.dumps(truth))
        assert read_ranks(tmp_path / "real.pkl") == known


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.usefixtures("tiktoken_stand_in")
def test_the_pickle_says_what_it_was_given(tmp_path: Path, protocol: int) -> None:
    ranks, path = small_ranks(), tmp_path / "tokenizer.pkl"
    opened = pickle.load(io.BytesIO(pickle_ranks(ranks)))
    assert type(opened) is Encoding
    assert opened.state == encoding_state(ranks)
    path.write_bytes(pickle.dumps(opened, protocol))
    if protocol == 2:  # it spells bytes as calls of codecs.encode, and nanochat never wrote one
        with pytest.raises(BadInput, match="it asks for _codecs.encode"):
            read_ranks(path)
    else:
        assert read_ranks(path) == ranks


STRANGE: dict[str, Any] = {
    "it splits text by another pattern": {"pat_str": SPLIT_PATTERN.replace("{1,2}", "{1,3}")},
    "its special tokens are not <|bos|>": {"special_tokens": {"<|endoftext|>": 321}},
    "not the four fields": {"extra": 1},
    "only names tiktoken's own 'gpt2'": "gpt2",
    "its tokens are not bytes": {"mergeable_ranks": {"a": 1}},
}


@pytest.mark.parametrize("sentence", STRANGE)
@pytest.mark.usefixtures("tiktoken_stand_in")
def test_a_strange_encoding_is_named(tmp_path: Path, sentence: str) -> None:
    change, path = STRANGE[sentence], tmp_path / "tokenizer.pkl"
    state = change if isinstance(change, str) else encoding_state(small_ranks()) | change
    path.write_bytes(pickle.dumps(Encoding(state)))
    with pytest.raises(BadInput, match=sentence.replace("|", r"\|")):
        read_ranks(path)


@pytest.mark.usefixtures("tiktoken_stand_in")
def test_strange_ranks_are_named(tmp_path: Path) -> None:
    whole, path = small_ranks(), tmp_path / "tokenizer.pkl"

    def refusal(ranks: dict[Any, Any]) -> str:
        path.write_bytes(pickle.dumps(Encoding(encoding_state(ranks))))
        with pytest.raises(BadInput) as error:
            recover_merges(read_ranks(path))
        return str(error.value)

    assert "do not count from 0" in refusal({token: rank + 1 for token, rank in whole.items()})
    assert "do not count from 0" in refusal(whole | {b"zq": True})
    assert "lacks single bytes" in refusal({t: i for i, t in enumerate(t for t in whole if t != b"a")})
    assert "b'qqq', is not made of two earlier tokens" in refusal(whole | {b"qqq": len(whole)})
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(BadInput, match="is not a pickled tokenizer"):
        read_ranks(path)


# --- export ---------------------------------------------------------------------------------------


def test_an_export_comes_back_byte_for_byte(base: Path, tmp_path: Path) -> None:
    gpt, words = import_from(model_directory(base), tmp_path)
    files = export_nanochat(gpt, words, tmp_path / "out")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in files] == [
        "base_checkpoints/d3/meta_000000.json",
        "base_checkpoints/d3/model_000000.pt",
        "tokenizer/token_bytes.pt",
        "tokenizer/tokenizer.pkl",
    ]
    assert not list(tmp_path.glob(".out*"))
    directory = model_directory(tmp_path / "out")
    written = torch.load(directory / "model_000000.pt", weights_only=True)
    assert list(written) == GOLDEN["eras"][CURRENT]["names"]
    assert all(torch.equal(value, written[name]) for name, value in state_dict().items())
    meta = json.loads((directory / "meta_000000.json").read_text())
    assert (meta["step"], meta["model_config"]) == (0, GOLDEN["model_config"])
    again, words_again = import_from(directory, tmp_path / "again")
    assert hash_payload(again.out) == hash_payload(gpt.out)
    assert hash_payload(words_again.out) == hash_payload(words.out)


def test_token_bytes_count_what_each_token_spells(base: Path, tmp_path: Path) -> None:
    gpt, words = import_from(model_directory(base), tmp_path)
    export_nanochat(gpt, words, tmp_path / "out")
    counts = torch.load(tmp_path / "out" / "tokenizer" / "token_bytes.pt", weights_only=True)
    assert (counts.dtype, counts.shape) == (torch.int32, (VOCAB_SIZE,))
    ranks = read_ranks(tmp_path / "out" / "tokenizer" / "tokenizer.pkl")
    assert all(counts[rank] == len(token) for token, rank in ranks.items())
    assert not counts[len(ranks) :].any()


def test_a_tokenizer_trained_here_goes_there_and_back(tmp_path: Path) -> None:
    """Its bytes are numbered in another order than nanochat's, which ranks can say as well."""
    own = tmp_path / "own"
    own.mkdir()
    model = train_bpe(["a loud low tone", "the dog barks and the bell rings"] * 5, 300)
    text = json.dumps(json.loads(model.to_str()), sort_keys=True, ensure_ascii=False) + "\n"
    (own / "tokenizer.json").write_text(text, encoding="utf-8")
    ranks = ranks_of(own)
    assert ranks[b"!"] == 0
    load_ranks(ranks, tmp_path / "back")
    assert (tmp_path / "back" / "out" / "tokenizer.json").read_text(encoding="utf-8") == text
    (own / "tokenizer.json").write_text(text.replace("{1,2}", "{1,3}"), encoding="utf-8")
    with pytest.raises(BadInput, match="is not a tokenizer that tiktoken's ranks can say"):
        ranks_of(own)
    (own / "tokenizer.json").write_text('{"kind":"bytes"}')
    with pytest.raises(BadInput, match="the tokenizer of plain bytes.*give --gpt alone"):
        ranks_of(own)


def test_what_nanochat_cannot_say_is_refused_and_leaves_nothing(base: Path, tmp_path: Path) -> None:
    gpt, words = import_from(model_directory(base), tmp_path)
    other = dataclasses.replace(words, vocab_size=400)
    with pytest.raises(BadInput, match="has 330 tokens and the tokenizer .* 400"):
        export_nanochat(gpt, other, tmp_path / "out")
    write_step(model_directory(base), 1500, state_dict(BEFORE_SMEAR))
    old, _ = import_from(model_directory(base), tmp_path / "old")
    with pytest.raises(BadInput, match="has qk_scale 1.15, and nanochat's code has 1.2"):
        export_nanochat(old, words, tmp_path / "out")
    assert not list(tmp_path.glob("*out*"))
    (tmp_path / "out").mkdir()
    export_nanochat(gpt, None, tmp_path / "out")  # an empty directory is as good as none
    assert not (tmp_path / "out" / "tokenizer").exists()
    with pytest.raises(BadInput, match="out is there already"):
        export_nanochat(gpt, words, tmp_path / "out")


# --- the command ----------------------------------------------------------------------------------


def omni(*words: object) -> int:
    return command.main([str(word) for word in words])


def test_the_command_imports_once_and_exports(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMNI_STORE", str(tmp_path / "store"))
    assert omni("import-nanochat", model_directory(base), "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in first] == ["computed", "computed"]
    base.rename(tmp_path / "moved")
    assert omni("import-nanochat", model_directory(tmp_path / "moved"), "--json") == 0
    again = json.loads(capsys.readouterr().out)
    assert [row["status"] for row in again] == ["reused", "reused"]
    assert [row["key"] for row in again] == [row["key"] for row in first]
    assert omni("verify") == 0
    words, gpt = (row["artifact"] for row in first)
    assert str(base) not in Path(gpt, "manifest.json").read_text()
    assert omni("export-nanochat", tmp_path / "out", "--gpt", gpt, "--tokenizer", words) == 0
    assert "model_000000.pt" in capsys.readouterr().out
    for refused in (
        ("export-nanochat", tmp_path / "two", "--gpt", words),
        ("export-nanochat", tmp_path / "two", "--gpt", tmp_path),
        ("export-nanochat", tmp_path / "two", "--tokenizer", words),
        ("export-nanochat", tmp_path / "two"),
        ("import-nanochat", model_directory(tmp_path / "moved"), "--step", 3),
    ):
        assert omni(*refused) == 2
        assert capsys.readouterr().err.count("\n") == 1
    latest = tmp_path / "store" / "latest"
    latest.mkdir()
    stages = [{name: value for name, value in row.items() if name != "artifact"} for row in first]
    (latest / "summary.json").write_text(json.dumps({"stages": stages}))
    assert omni("export-nanochat", tmp_path / "newest", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["gpt"] == gpt
    assert len(told["files"]) == 4
    Path(gpt, "out", "model.safetensors").write_bytes(b"x")
    assert omni("export-nanochat", tmp_path / "two", "--gpt", gpt) == 2
    assert "bytes instead of" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["import-nanochat", "export-nanochat"])
def test_both_verbs_have_help_with_examples(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        omni(verb, "--help")
    assert done.value.code == 0
    assert f"omni {verb}" in capsys.readouterr().out.split("examples:")[1]


def test_moving_weights_does_not_depend_on_how_they_compute() -> None:
    """A faster kernel must not ask for the files of an import again."""
    reached = CodeBase(ROOT).fingerprint("omni_model.model.nanochat_files:import_gpt")
    assert not [name for name in reached if name.startswith(("model.gpt.", "model.attention."))]
    assert "model.nanochat_files.ERA_CONSTANTS" in reached
