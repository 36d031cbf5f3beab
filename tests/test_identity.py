"""Keys: what changes them, what must not, and that every Python agrees."""

import dataclasses
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from flows.planning import plan
from flows.recipes import RECIPES, resolve
from omni_model.config import BadInput, GptImportRecipe, LoraRecipe, OutsideFile, Recipe, added, unkeyed
from omni_model.plain import from_plain, identity, override, to_plain
from omni_model.storage import open_store
from tasks.fingerprint import CodeBase, read_module
from tasks.identity import Identifier, derive_seed, differences
from tasks.stage import REGISTRY

ROOT = Path(__file__).resolve().parent.parent

GAIN = '''
"""Loudness."""
from omni_model.audio.units import DECIBEL

TABLE = {"soft": 0.1, "loud": 1.0}


def gain(name: str) -> float:
    """Linear gain."""
    # a comment
    return TABLE[name] * DECIBEL


def unused() -> int:
    return 1
'''
STAGE = """
from pathlib import Path

from omni_model.audio import gains
from omni_model.storage import Workspace


def words() -> str:
    return Path(__file__).with_name("words.json").read_text()


def synthesize(recipe, *, work: Workspace, runtime) -> dict:
    from omni_model.audio.late import shape

    return {"clips": gains.gain("soft") * shape(), "words": words()}
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A little `omni_model` with an entry point that reaches code in several ways."""
    audio = tmp_path / "omni_model" / "audio"
    audio.mkdir(parents=True)
    for place in (audio.parent, audio):
        (place / "__init__.py").write_text('"""Nothing."""\n')
    (audio / "units.py").write_text("DECIBEL = 0.5\nOTHER = 2\n")
    (audio / "late.py").write_text("def shape() -> int:\n    return 3\n")
    (audio / "gains.py").write_text(GAIN)
    (audio / "stage.py").write_text(STAGE)
    (audio / "words.json").write_text('["one"]')
    (audio.parent / "storage.py").write_text("class Workspace:\n    pass\n")
    return tmp_path


def fingerprint(package: Path) -> dict[str, str]:
    return CodeBase(package).fingerprint("omni_model.audio.stage:synthesize")


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_reaches_symbols_lazy_imports_constants_and_data_files(package: Path) -> None:
    assert set(fingerprint(package)) == {
        "audio.gains.TABLE",
        "audio.gains.gain",
        "audio.late.shape",
        "audio.stage.synthesize",
        "audio.stage.words",
        "audio.units.DECIBEL",
        "words.json",
    }


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("gains.py", "# a comment", "# another one"),
        ("gains.py", '"""Linear gain."""', '"""Gain as a factor."""'),
        ("gains.py", '{"soft": 0.1, "loud": 1.0}', "{\n    'soft': 0.1,\n    'loud': 1.0,\n}"),
        ("gains.py", "return TABLE[name] * DECIBEL", "return (TABLE[name]\n            * DECIBEL)"),
        ("gains.py", "return 1\n", "return 2\n"),
        ("units.py", "OTHER = 2", "OTHER = 3"),
        ("../storage.py", "pass", "size = 1"),
    ],
)
def test_what_changes_no_meaning_changes_nothing(package: Path, file: str, old: str, new: str) -> None:
    before = fingerprint(package)
    edit(package / "omni_model" / "audio" / file, old, new)
    assert fingerprint(package) == before


@pytest.mark.parametrize(
    ("file", "old", "new", "symbol"),
    [
        ("gains.py", "TABLE[name] *", "TABLE[name] +", "audio.gains.gain"),
        ("gains.py", '"soft": 0.1', '"soft": 0.2', "audio.gains.TABLE"),
        ("units.py", "DECIBEL = 0.5", "DECIBEL = 0.25", "audio.units.DECIBEL"),
        ("late.py", "return 3", "return 4", "audio.late.shape"),
        ("words.json", "one", "two", "words.json"),
    ],
)
def test_a_change_that_is_reached_is_named(package: Path, file: str, old: str, new: str, symbol: str) -> None:
    before = fingerprint(package)
    edit(package / "omni_model" / "audio" / file, old, new)
    after = fingerprint(package)
    assert {name for name in after if after[name] != before[name]} == {symbol}


def test_a_module_passed_as_a_whole_counts_as_a_whole(package: Path) -> None:
    edit(package / "omni_model" / "audio" / "stage.py", 'gains.gain("soft")', "len(vars(gains))")
    assert "audio.gains.unused" in fingerprint(package)


def test_statements_that_run_at_import_count(package: Path) -> None:
    gains = package / "omni_model" / "audio" / "gains.py"
    gains.write_text(gains.read_text() + '\nTABLE["loud"] = 2.0\n')
    assert "audio.gains.(module)" in fingerprint(package)


def test_an_import_inside_a_condition_counts(package: Path) -> None:
    gains = package / "omni_model" / "audio" / "gains.py"
    text = gains.read_text().replace("return TABLE[name]", "return TABLE[name] * shape()")
    gains.write_text(
        "try:\n    from omni_model.audio.late import shape\nexcept ImportError:\n    pass\n" + text
    )
    edit(package / "omni_model" / "audio" / "stage.py", " * shape()", "")
    assert "audio.late.shape" in fingerprint(package)


def test_a_star_import_is_refused(package: Path) -> None:
    edit(
        package / "omni_model" / "audio" / "late.py",
        "def shape",
        "from omni_model.audio.units import *\n\n\ndef shape",
    )
    with pytest.raises(ValueError, match=r"late.py: line 1: import names, not \*"):
        fingerprint(package)


def test_a_data_file_must_be_named_literally(package: Path) -> None:
    edit(package / "omni_model" / "audio" / "stage.py", 'with_name("words.json")', "with_name(name)")
    with pytest.raises(ValueError, match="name the file next to the code literally"):
        fingerprint(package)


def test_memo_gives_the_same_answer_and_notices_changes(package: Path) -> None:
    memo = package / "memo.json"
    first = CodeBase(package, memo).fingerprint("omni_model.audio.stage:synthesize")
    assert CodeBase(package, memo).fingerprint("omni_model.audio.stage:synthesize") == first
    edit(package / "omni_model" / "audio" / "late.py", "return 3", "return 4444")
    assert CodeBase(package, memo).fingerprint("omni_model.audio.stage:synthesize") != first


def test_golden_hash_of_one_function() -> None:
    source = 'def f(x: int = 1_000, *, y=None) -> str:\n    """Doc."""\n    return f"{x!r:>{y}}" "é\\n"\n'
    assert read_module(source).symbols["f"].hashes == ["89d899e5929fc4ca"]


SCRIPT = """
import json, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from flows.recipes import RECIPES
from tasks.fingerprint import CodeBase
from tasks.identity import Identifier
from tasks.stage import REGISTRY
identifier = Identifier(CodeBase(Path({root!r})), 0, version=lambda name: "1.2.3")
keys = {{}}
for run in RECIPES.values():
    def runner(task, recipe, *inputs):
        stage = REGISTRY[task.__name__]
        inputs = dict.fromkeys(stage.inputs, "0" * 64)
        keys[run.name + "/" + stage.name] = identifier.identify(stage, recipe, inputs).key
    run.flow(runner, run.recipe)
print(json.dumps(keys))
"""


def keys_under(python: str) -> dict[str, str]:
    script = SCRIPT.format(root=str(ROOT))
    found = subprocess.run([python, "-c", script], capture_output=True, text=True, check=True)
    return dict(json.loads(found.stdout))


def other_pythons() -> list[str]:
    """Interpreters of another minor version that start, on the path or under pyenv."""
    found = {shutil.which(f"python3.{minor}") for minor in range(11, 16)} - {None}
    versions = Path.home() / ".pyenv" / "versions"
    found |= {str(path) for path in versions.glob("3.*/bin/python3")}
    probe = f"import sys; sys.exit(not ((3, 11) <= sys.version_info[:2] != {sys.version_info[:2]}))"
    return sorted(
        p for p in found if p and subprocess.run([p, "-c", probe], capture_output=True).returncode == 0
    )


def test_keys_are_equal_under_every_python_at_hand() -> None:
    mine = keys_under(sys.executable)
    assert len(mine) > 15
    for python in other_pythons():
        assert keys_under(python) == mine, python
    if not other_pythons():
        pytest.skip("no other Python of 3.11 or newer here")


def test_an_added_field_counts_only_away_from_its_old_meaning() -> None:
    @dataclass(frozen=True)
    class Later(LoraRecipe):
        dropout: float = added(0.0, as_before=0.0)
        may_be_zero = (*Recipe.may_be_zero, "dropout")

    assert identity(Later()) == identity(LoraRecipe())
    assert identity(Later(dropout=0.1)) != identity(LoraRecipe())


def test_an_unkeyed_field_never_counts_and_still_travels() -> None:
    @dataclass(frozen=True)
    class Placed(LoraRecipe):
        place: str = unkeyed("")

    assert identity(Placed(place="/here")) == identity(LoraRecipe())
    moved = [GptImportRecipe(model=OutsideFile("ab", place), step=5) for place in ("/here", "/there")]
    assert identity(moved[0]) == identity(moved[1])
    assert identity(GptImportRecipe(model=OutsideFile("cd", "/here"), step=5)) != identity(moved[0])
    assert from_plain(GptImportRecipe, json.loads(json.dumps(to_plain(moved[0])))) == moved[0]


def test_recipes_survive_the_trip_through_json() -> None:
    for run in RECIPES.values():
        plain = json.loads(json.dumps(to_plain(run.recipe)))
        assert from_plain(type(run.recipe), plain) == run.recipe


def test_values_without_a_stable_form_are_refused() -> None:
    for value in ({1, 2}, object(), len):
        with pytest.raises(TypeError, match="stable JSON form"):
            to_plain(value)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ("lora.rnk=8", "did you mean 'rank'"),
        ("lora=8", "is a group of fields; set one of: rank"),
        ("lora.rank=x", "lora.rank wants int, not 'x'"),
        ("lora.rank=0", "LoraRecipe.rank must be more than zero"),
        ("lora.rank.x=1", "goes too deep"),
        ("runtime.thread=1", "did you mean 'threads'"),
        ("lora.rank", "write it as path=value"),
        ("tokenizer.kind=word", "must be one of bpe, bytes"),
    ],
)
def test_bad_settings_are_one_sentence(setting: str, sentence: str) -> None:
    with pytest.raises(BadInput, match=sentence):
        resolve("demo", [setting])


def test_override_changes_one_field() -> None:
    recipe = RECIPES["demo"].recipe
    changed = override(recipe, "lora.rank", "8")
    assert changed.lora == dataclasses.replace(recipe.lora, rank=8)
    assert dataclasses.replace(changed, lora=recipe.lora) == recipe


def test_no_two_stages_share_a_key_and_runtime_is_not_in_any(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    stages: dict[str, str] = {}
    for name in RECIPES:
        found = []
        for settings in ([], ["runtime.threads=7", "runtime.parallel_stages=1", "runtime.inline=true"]):
            steps, _ = plan(resolve(name, settings), store)
            found.append([step.identity.key for step in steps if step.identity])
            for step in steps:
                if step.identity:
                    assert stages.setdefault(step.identity.key, step.stage.name) == step.stage.name
        assert found[0] == found[1]
        assert len(set(found[0])) == len(found[0])


def test_seeds_differ_by_purpose() -> None:
    assert derive_seed(0, "a") != derive_seed(0, "b") != derive_seed(1, "b")
    assert 0 <= derive_seed(5, "x") < 2**63


def test_every_stage_has_an_identity() -> None:
    identifier = Identifier(CodeBase(ROOT), seed=3)
    for stage in REGISTRY.values():
        found = identifier.identify(stage, stage.recipe(), dict.fromkeys(stage.inputs, "1" * 64))
        assert len(found.key) == 64
        assert found.components["code"]


def test_a_missing_extra_names_the_command_that_brings_it() -> None:
    def version(name: str) -> str:
        import importlib.metadata

        if name == "espeakng-loader":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0"

    stage = REGISTRY["synthesize_speech"]
    with pytest.raises(BadInput, match=r"pip install 'nanochat-omni\[espeak\]'"):
        Identifier(CodeBase(ROOT), 0, version).identify(stage, stage.recipe(), {})


def test_versions_count_by_release_and_the_synthesizer_exactly() -> None:
    def components(**versions: str) -> dict[str, Any]:
        identifier = Identifier(CodeBase(ROOT), 0, lambda name: versions.get(name.replace("-", "_"), "1.0"))
        return identifier.identify(
            REGISTRY["synthesize_speech"], REGISTRY["synthesize_speech"].recipe(), {}
        ).components

    base = components(numpy="2.4.1", espeakng_loader="0.2.4")
    assert components(numpy="2.4.9+local", espeakng_loader="0.2.4") == base
    assert differences(base, components(numpy="2.5.0", espeakng_loader="0.2.4")) == ["numpy 2.4 -> 2.5"]
    assert differences(base, components(numpy="2.4.1", espeakng_loader="0.2.5")) == [
        "espeakng-loader 0.2.4 -> 0.2.5"
    ]
