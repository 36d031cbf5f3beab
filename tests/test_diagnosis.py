"""What goes on inside a listener: what was planted is found where it was, and nothing where nothing is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from omni_model.artifacts import AdapterCheckpoint, Diagnosis, FeatureShards, GptCheckpoint, TokenizerFiles
from omni_model.audio import shards
from omni_model.audio.reader import FeatureReader
from omni_model.config import BadInput, DiagnosisRecipe
from omni_model.evaluation import (
    diagnosis,
    diagnosis_geometry,
    diagnosis_map,
    diagnosis_probes,
    diagnosis_sections,
    diagnosis_states,
    diagnosis_words,
    page,
)
from omni_model.evaluation.map_picture import part_labels
from omni_model.evaluation.statistics import Bootstrap
from omni_model.model.gpt import GPT, GPTConfig
from omni_model.model.lora import add_lora, save_adapter
from omni_model.model.omni import OmniModel, Sounds
from omni_model.model.projector import Projector
from omni_model.model.weights import load_listener, save_gpt, save_projector
from omni_model.text.tokenizer import Tokenizer, load_tokenizer
from tests.small_sound import make

SHAPE = GPTConfig(
    sequence_len=128, vocab_size=257, n_layer=4, n_head=2, n_kv_head=2, n_embd=32, window_pattern="L"
)
WIDTH = 12  # of one encoder layer; two lie side by side
COLOURS, PITCHES = ("red", "green", "blue", "yellow"), ("deep", "low", "high", "shrill")
MELODIES = ("rising", "falling", "lively", "flat")
SPLITS = ["train"] * 100 + ["validation"] * 30 + ["test"] * 50
QUICK = DiagnosisRecipe(clips=12, probe_clips=90, transcribed_clips=10, bootstrap_draws=200)


def planted(number: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames (F, 2 WIDTH): the first layer tells the colour, the second the pitch, neither the melody."""
    rng = np.random.default_rng(number)
    colour, pitch, melody = (int(rng.integers(4)) for _ in range(3))
    frames = 0.4 * rng.normal(size=(10 + number % 13, 2 * WIDTH))
    frames[:, colour] += 2.0
    frames[:, WIDTH + pitch] += 2.0
    labels = {"colour": COLOURS[colour], "pitch": PITCHES[pitch], "melody": MELODIES[melody]}
    said = f"{COLOURS[colour]} dog {number}" if number % 2 else ""
    return frames.astype(np.float16), {"split": SPLITS[number], "labels": labels, "transcript": said}


def write_features(directory: Path, numbers: Sequence[int]) -> FeatureShards:
    (directory / "out").mkdir(parents=True)
    clips = [(f"clip-{number:03d}", *planted(number)) for number in numbers]
    keyed = [(key, frames, {"key": key, **metadata}) for key, frames, metadata in clips]
    record = shards.write_shard(directory / "out" / "features-00000.tar", "planted", keyed)
    policy = {"encoder": "e", "layers": ["1", "last"], "mix": "concat", "dtype": "float32"}
    facts = {"num_layers": 2, "policy": policy, "width": 2 * WIDTH}
    shards.write_index(directory / "out" / shards.INDEX, facts, [record])
    return FeatureShards(
        "f", "0" * 64, str(directory), "d", record["num_clips"], record["num_frames"], 2 * WIDTH, 2, 50
    )


@dataclass(frozen=True)
class World:
    gpt: GptCheckpoint
    adapter: AdapterCheckpoint
    tokenizer: TokenizerFiles
    features: tuple[FeatureShards, ...]
    model: OmniModel
    words: Tokenizer
    reader: FeatureReader

    @property
    def inputs(self) -> tuple[Any, ...]:
        return self.gpt, self.adapter, self.tokenizer, *self.features


def handle(kind: type[Any], directory: Path, **facts: Any) -> Any:
    """A handle with these facts; others, which nobody reads here, are empty."""
    known: dict[str, Any] = dict.fromkeys(kind.fact_names(), "") | facts
    return kind("s", "0" * 64, str(directory), "d", **known)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("diagnosis")
    features = (
        write_features(root / "even", range(0, len(SPLITS), 2)),
        write_features(root / "odd", range(1, len(SPLITS), 2)),
    )
    (root / "tokenizer" / "out").mkdir(parents=True)
    (root / "tokenizer" / "out" / "tokenizer.json").write_text('{"kind":"bytes"}')
    gpt, projector = GPT(SHAPE), Projector(2 * WIDTH, width=32, stack=3, hidden=48, num_layers=2)
    shake = torch.Generator().manual_seed(1)
    with torch.no_grad():  # fresh weights end in zeros, and a model that ignores its input proves nothing
        for parameter in gpt.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=shake)
        assert projector.layer_logits is not None
        projector.layer_logits += torch.tensor([-20.0, 20.0])  # it reads the second layer and no other
    for place in ("gpt", "adapter"):
        (root / place / "out").mkdir(parents=True)
    save_gpt(gpt, root / "gpt" / "out")
    save_projector(projector, root / "adapter" / "out" / "projector")
    save_adapter(add_lora(gpt, rank=2, alpha=4, seed=0), root / "adapter" / "out" / "adapter")
    checkpoints = (handle(GptCheckpoint, root / "gpt"), handle(AdapterCheckpoint, root / "adapter"))
    tokenizer = handle(TokenizerFiles, root / "tokenizer", vocab_size=257)
    model, words = load_listener(*checkpoints), load_tokenizer(tokenizer.out)
    return World(*checkpoints, tokenizer, features, model, words, FeatureReader(*features))


@pytest.fixture(scope="module")
def made(world: World, tmp_path_factory: pytest.TempPathFactory) -> Diagnosis:
    root = tmp_path_factory.mktemp("made")
    found = make(Diagnosis, diagnosis.diagnose, root / "one", QUICK, *world.inputs)
    assert isinstance(found, Diagnosis)
    return found


# --- the stage -----------------------------------------------------------------------------------


def test_labels_are_found_where_they_were_planted_and_lost_where_they_were_dropped(made: Diagnosis) -> None:
    numbers = diagnosis.read_diagnosis(made.out)
    ears = ["ear, layer 1", "ear, last layer"]
    assert numbers["places"] == [*ears, "projector", "GPT, half-way"]
    assert numbers["layer_weights"] == {ears[0]: 0.0, ears[1]: 1.0}
    assert numbers["clips"] == {"train": 90, "validation": 30, "test": 50}
    colour, pitch, melody = (numbers["probes"][name] for name in ("colour", "pitch", "melody"))
    assert colour["best_layer"] == ears[0]
    assert colour["places"][ears[0]]["accuracy"] > 0.9
    assert colour["lost_at"] == "projector"
    assert pitch["best_layer"] == ears[1]
    assert pitch["places"]["projector"]["accuracy"] > 0.9
    assert pitch["lost_at"] is None
    for place in numbers["places"]:
        low, high = melody["places"][place]["ci95"]
        assert low < 0.35, "noise is not read"
        assert high > 0.2


def test_diagnosis_is_complete_and_repeats_byte_for_byte(
    world: World, made: Diagnosis, tmp_path: Path
) -> None:
    again = make(Diagnosis, diagnosis.diagnose, tmp_path / "again", QUICK, *world.inputs)
    assert again.digest == made.digest
    numbers = diagnosis.read_diagnosis(made.out)
    assert (made.out / diagnosis.DIAGNOSIS).read_text() == json.dumps(
        numbers, sort_keys=True, indent=1
    ) + "\n"
    # Of the grammar's answers those that some clip could have: melodies are not asked about.
    assert {word["category"] for word in numbers["words"]} == {"colour", "pitch"}
    assert made.num_points == len(numbers["words"]) + 12
    names = ["input", "after 1 of 4 layers", "after 2 of 4 layers", "last layer"]
    assert [depth["name"] for depth in numbers["depths"]] == names
    for depth in numbers["depths"]:
        for fit in ("text", "joint"):
            assert len(depth[fit]["words"]) == len(numbers["words"])
            assert len(depth[fit]["clips"]) == len(numbers["drawn"]) == 12
    assert numbers["depths"][0]["categories"]["pitch"]["centroid_accuracy"] > 0.9
    assert set(numbers["retrieval"]["transcript"]) == set(names)
    assert numbers["transcription"]["n"] == 10
    assert numbers["transcription"]["wer"] > 0.9
    assert numbers["transcription"]["sources"]["unknown"]["n"] == 10
    assert len(numbers["lens"]) == 8
    lens = numbers["lens"][0]
    assert len(lens["soft_tokens"]) == -(-world.reader.frames(lens["key"]).shape[0] // 3)
    for name in diagnosis_map.PICTURES.values():
        assert (made.out / name).read_bytes().startswith(b"\x89PNG")
        assert (made.out / name).stat().st_size < 150_000


def test_sections_tell_what_was_measured(made: Diagnosis) -> None:
    probes = diagnosis_sections.probes_section(made)
    assert "<th>best layer</th>" in probes
    assert "<td>ear, layer 1</td><td>projector</td>" in probes
    assert "reads ear, layer 1 0.0 %, ear, last layer 100.0 %" in probes
    assert diagnosis_sections.map_section(made).count("data:image/png") == 2
    words = diagnosis_sections.words_section(made)
    for told in ("WER on the wrong clip", "found first (R@1)", 'class="lens"'):
        assert told in words
    text = page.page("t", [probes, words])
    for tag in ("section", "table", "details", "article", "ol", "li"):
        assert text.count(f"<{tag}>") + text.count(f"<{tag} ") == text.count(f"</{tag}>")
    assert diagnosis_sections.readable(" red") == "red"
    assert diagnosis_sections.readable("\ufffd") == diagnosis_sections.readable("  ") == "·"


def test_what_cannot_be_measured_is_refused(world: World, tmp_path: Path) -> None:
    untested = write_features(tmp_path / "untested", range(20))
    with pytest.raises(BadInput, match="no test clips"):
        make(Diagnosis, diagnosis.diagnose, tmp_path / "a", QUICK, *world.inputs[:3], untested)
    recipe = DiagnosisRecipe(components=99)
    with pytest.raises(BadInput, match=r"diagnosis\.components is 99; use 2 to"):
        make(Diagnosis, diagnosis.diagnose, tmp_path / "b", recipe, *world.inputs)


# --- what passes through -------------------------------------------------------------------------


def test_rows_are_those_of_a_clip_alone_and_of_one_with_text_behind_it(world: World) -> None:
    clips, model = world.reader.by_split("test")[:7], world.model
    together = {
        heard.key: heard for heard in diagnosis_states.hear_clips(model, world.reader, clips, (0, 2, 4))
    }
    assert list(together) == [
        clip["key"] for clip in sorted(clips, key=lambda c: (c["num_frames"], c["key"]))
    ]
    for key, heard in together.items():
        frames = torch.from_numpy(world.reader.frames(key))[None]
        lengths = torch.tensor([frames.size(1)])
        soft = model.projector(frames, lengths)[0][0, 1:-1].detach().numpy()
        np.testing.assert_allclose(heard.rows[0], soft, atol=1e-5)
        blocks = model.gpt.transformer["h"]
        with diagnosis_states.outputs_of({2: blocks[1], 4: blocks[3]}) as seen, torch.inference_mode():
            model(torch.tensor([[256, 65, 66]]), sounds=Sounds.in_front(frames, lengths))
        for depth in (2, 4):
            np.testing.assert_allclose(heard.rows[depth], seen[depth][0, 1 : len(soft) + 1], atol=1e-4)
    assert not any(block._forward_hooks for block in model.gpt.transformer["h"])


def test_texts_are_read_behind_their_carrier_whatever_the_batch(world: World) -> None:
    readings = [
        diagnosis_states.reading_of(world.words, "red", carrier="The colour is"),
        diagnosis_states.reading_of(world.words, "a longer text", limit=8),
    ]
    assert world.words.decode(readings[0].ids[readings[0].first :]) == " red"
    assert world.words.decode(readings[1].ids[readings[1].first :]) == "a longer"
    both = diagnosis_states.read_texts(world.model, readings, (0, 4))
    (alone,) = diagnosis_states.read_texts(world.model, readings[:1], (0, 4))
    assert [len(rows[4]) for rows in both] == [4, 8]
    np.testing.assert_allclose(both[0][4], alone[4], atol=1e-4)
    table = world.model.gpt.transformer["wte"].weight.detach().numpy()
    np.testing.assert_array_equal(both[0][0], table[readings[0].ids[readings[0].first :]])


def test_depths_that_coincide_are_measured_once() -> None:
    assert diagnosis_states.depths_of(1) == (0, 1)
    assert diagnosis_states.depths_of(3) == (0, 1, 3)
    assert diagnosis_states.depths_of(12) == (0, 3, 6, 12)


# --- probes --------------------------------------------------------------------------------------


def test_shuffled_labels_are_read_at_chance() -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(4, size=600)
    clips = [
        {
            "key": f"c{number}",
            "split": SPLITS[number % len(SPLITS)],
            "labels": {"true": str(value), "shuffled": str(rng.integers(4))},
        }
        for number, value in enumerate(values)
    ]
    rows = np.eye(12)[values] + 0.1 * rng.normal(size=(600, 12))
    place = diagnosis_probes.Place("ear", {clip["key"]: row for clip, row in zip(clips, rows, strict=True)})
    found: dict[str, Any] = diagnosis_probes.probe_places(clips, [place], ["ear"], 0.95)
    assert found["true"]["places"]["ear"]["accuracy"] == 1.0
    low, high = found["shuffled"]["places"]["ear"]["ci95"]
    assert low < 0.25 < high


def test_lost_is_what_lies_clearly_below_an_earlier_place() -> None:
    encoder = {"first", "last"}
    kept = {"first": [0.8, 0.9], "last": [0.3, 0.4], "projector": [0.75, 0.85], "gpt": [0.7, 0.81]}
    assert diagnosis_probes.lost_at(kept, encoder) is None
    assert diagnosis_probes.lost_at({**kept, "gpt": [0.5, 0.7]}, encoder) == "gpt"
    assert diagnosis_probes.lost_at({**kept, "projector": [0.5, 0.7]}, encoder) == "projector"


def test_every_label_gets_its_share_of_the_chosen_clips() -> None:
    clips = [
        {"key": f"k{n:03d}", "labels": {"common": "a"} | ({"rare": "b"} if n < 4 else {})} for n in range(300)
    ]
    chosen = diagnosis_probes.choose_clips(clips, 20, seed=3)
    assert len(chosen) == 20
    assert sum("rare" in clip["labels"] for clip in chosen) == 4
    assert chosen == diagnosis_probes.choose_clips(clips[::-1], 20, seed=3)
    assert chosen != diagnosis_probes.choose_clips(clips, 20, seed=4)
    assert diagnosis_probes.choose_clips(clips[:5], 20, seed=3) == clips[:5]


def test_layers_side_by_side_are_pooled_one_by_one() -> None:
    frames = np.random.default_rng(2).normal(size=(9, 8))
    first, second = diagnosis_probes.pool_layers(frames, 2)
    np.testing.assert_allclose(first, diagnosis_probes.pool(frames[:, :4]))
    np.testing.assert_allclose(second, diagnosis_probes.pool(frames[:, 4:]))
    policy = {"layers": ["2", "last"], "mix": "concat"}
    assert diagnosis_probes.encoder_places(policy) == ["ear, layer 2", "ear, last layer"]
    assert diagnosis_probes.encoder_places({**policy, "mix": "mean"}) == ["ear, mean of 2 layers"]


# --- geometry ------------------------------------------------------------------------------------


def test_centroid_numbers_find_clusters_and_see_none_in_noise() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(80) % 4
    noise = rng.normal(size=(80, 16))
    apart: dict[str, Any] = diagnosis_geometry.centroid_numbers(noise + 6 * np.eye(16)[truth], truth)
    assert apart["centroid_accuracy"] == 1.0
    assert apart["separation"] > 0.3
    mixed: dict[str, Any] = diagnosis_geometry.centroid_numbers(noise, truth)
    assert mixed["centroid_accuracy"] < 0.45
    assert mixed["separation"] < 0.05


def test_plane_is_fitted_on_its_clouds_alone_with_fixed_signs() -> None:
    points = np.random.default_rng(1).normal(size=(30, 8)) * np.array([5, 3, 1, 1, 1, 1, 1, 1])
    plane = diagnosis_geometry.fit_plane([points], 2)
    assert np.allclose(plane.axes @ plane.axes.T, np.eye(2))
    assert plane.explained[0] > plane.explained[1]
    assert np.allclose(diagnosis_geometry.fit_plane([points[::-1]], 2).axes, plane.axes)
    with pytest.raises(BadInput, match=r"diagnosis\.components"):
        diagnosis_geometry.fit_plane([points], 9)
    # A small cloud far off counts as much as a large one, so what divides them comes first.
    far = np.random.default_rng(2).normal(size=(5, 8)) + 30 * np.eye(8)[7]
    joint = diagnosis_geometry.fit_plane([points, far], 2)
    assert abs(joint.axes[0, 7]) > 0.99
    assert np.allclose(joint.mean, (points.mean(axis=0) + far.mean(axis=0)) / 2)


def test_modality_gap_is_zero_for_equal_clouds() -> None:
    cloud = np.random.default_rng(1).normal(size=(50, 4))
    assert diagnosis_geometry.modality_gap(cloud, cloud) == 0.0
    assert diagnosis_geometry.modality_gap(cloud + 10, cloud) > 5


def test_retrieval_finds_its_own_and_guesses_among_strangers() -> None:
    rng = np.random.default_rng(5)
    texts = rng.normal(size=(200, 24))
    found: dict[str, Any] = diagnosis_geometry.retrieval(
        texts + 0.3 * rng.normal(size=texts.shape) + 7, texts, 0.95
    )
    assert found["r1"] > 0.95
    assert found["r1_ci95"][0] > found["r1_chance"] == 0.005
    strangers: dict[str, Any] = diagnosis_geometry.retrieval(rng.normal(size=texts.shape), texts, 0.95)
    assert strangers["r10_ci95"][0] < strangers["r10_chance"] < strangers["r10_ci95"][1]
    assert diagnosis_geometry.retrieval(np.ones((20, 3)), np.ones((20, 3)), 0.95)["r1"] == 0.0


def test_labels_are_parted() -> None:
    moved = part_labels(np.array([[0.0, 0.0], [5.0, 1.0], [300.0, 0.0]]), width=60, gap=20)
    assert abs(moved[0, 1] - moved[1, 1]) >= 20
    assert moved[2, 1] == 0.0


# --- words ---------------------------------------------------------------------------------------


def test_error_rates_are_totals_with_intervals_around_them() -> None:
    said, heard = ["one two three", "red dog", "seven"], ["one tree three four", "red dog", ""]
    errors = diagnosis_words.Errors.between(said, heard)
    assert errors.words.tolist() == [2, 0, 1]
    assert errors.num_words.tolist() == [3, 2, 1]
    rates: dict[str, Any] = errors.rates(Bootstrap(0, 500))
    assert rates["wer"] == 0.5
    assert rates["wer_ci95"][0] < 0.5 < rates["wer_ci95"][1]
    assert errors.of([1]).rates(Bootstrap(0, 50))["wer"] == 0.0
    clips = [{"provenance": {"part": "test-clean"}}, {"provenance": {"generator": "espeak-ng"}}, {}]
    assert diagnosis_words._by_source(clips) == {"espeak-ng": [1], "test-clean": [0], "unknown": [2]}
    assert diagnosis_words.PLAIN(" Twenty-one,  RED dogs! ") == "twenty one red dogs"


def test_answers_are_those_of_each_clip_alone(world: World) -> None:
    clips = world.reader.by_split("test")[:6]
    asked = (world.model, world.words, world.reader)
    together = diagnosis_words.answer(*asked, clips, "What is said?", 5)
    for clip in clips:
        assert diagnosis_words.answer(*asked, [clip], "What is said?", 5) == {
            clip["key"]: together[clip["key"]]
        }


def test_perfect_answers_have_no_errors_and_those_of_other_clips_do(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def heard_rightly(*args: Any) -> dict[str, str]:
        return {clip["key"]: clip["transcript"].upper() + "." for clip in args[3]}

    monkeypatch.setattr(diagnosis_words, "answer", heard_rightly)
    clips = world.reader.by_split("test")
    bootstrap = Bootstrap(0, 200)
    found: Any = diagnosis_words.transcription(world.model, world.words, world.reader, clips, bootstrap, 1)
    assert (found["wer"], found["cer"], found["flawless"], found["n"]) == (0.0, 0.0, 1.0, 25)
    assert found["shuffled"]["wer"] > 0.3  # the number differs in every clip, the colour in most
    silent = [clip for clip in clips if not clip["transcript"]]
    assert diagnosis_words.transcription(world.model, world.words, world.reader, silent, bootstrap, 1) is None


def test_a_soft_token_that_is_a_word_is_seen_as_that_word(world: World) -> None:
    ids = world.words.encode("dog")
    rows = 3.0 * world.model.gpt.transformer["wte"].weight[ids].detach().numpy()
    (found,) = diagnosis_words.nearest_words(world.model, world.words, [rows])
    nearest: list[Any] = [near[0] for near in found]
    assert [one["text"] for one in nearest] == ["d", "o", "g"]
    assert all(one["cosine"] > 0.999 for one in nearest)
    assert all(len(near) == diagnosis_words.NEAREST for near in found)
