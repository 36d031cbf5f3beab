"""Statistics against known values, a benchmark that cannot be guessed, scorers against oracles, charts."""

import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from omni_model.audio.clips import clip_rng
from omni_model.config import (
    BadInput,
    BenchmarkRecipe,
)
from omni_model.evaluation import baselines, embedding_map, page, report, report_sections, scoring
from omni_model.evaluation.answering import Asked
from omni_model.evaluation.benchmark import GROUPS, Item, card, write_items
from omni_model.evaluation.charts import Bar, curve, interval_bars
from omni_model.evaluation.map_picture import part_labels
from omni_model.evaluation.statistics import Bootstrap, mcnemar_exact, wilson_interval
from omni_model.text.questions import LETTERS, grammar

SPOKEN = ("number", "colour", "animal", "voice", "pace", "loudness")
SOUNDED = ("pitch", "contour", "tremolo", "beeps", "noise", "loudness")


# --- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("right", "total", "low", "high"), [(80, 200, 33.5, 46.9), (16, 40, 26.3, 55.4), (10, 25, 23.4, 59.3)]
)
def test_wilson_interval_equals_published_values(right: int, total: int, low: float, high: float) -> None:
    found = wilson_interval(right, total)
    assert (round(100 * found.low, 1), round(100 * found.high, 1)) == (low, high)


def test_wilson_interval_stays_inside_and_refuses_nonsense() -> None:
    assert wilson_interval(0, 10).low == pytest.approx(0.0, abs=1e-12)
    assert wilson_interval(10, 10).high == pytest.approx(1.0)
    with pytest.raises(ValueError, match="not a proportion"):
        wilson_interval(11, 10)


def test_bootstrap_of_a_share_is_close_to_wilson_and_repeats() -> None:
    scores = np.repeat([1.0, 0.0], [80, 120])
    found = Bootstrap(seed=3).interval(scores)
    exact = wilson_interval(80, 200)
    assert abs(found.low - exact.low) < 0.01
    assert abs(found.high - exact.high) < 0.01
    uneven = np.random.default_rng(0).random(200)
    assert Bootstrap(seed=3).interval(uneven) == Bootstrap(seed=3).interval(uneven)
    assert Bootstrap(seed=3).interval(uneven) != Bootstrap(seed=4).interval(uneven)


def test_paired_margin_is_narrower_than_unpaired_and_zero_against_itself() -> None:
    rng = np.random.default_rng(0)
    first = rng.random(200)
    second = first - 0.1
    bootstrap = Bootstrap(seed=1, draws=2000)
    margin = bootstrap.margin(first, second)
    assert margin.low == pytest.approx(0.1)
    assert margin.high == pytest.approx(0.1)
    assert bootstrap.margin(first, first).rounded() == [0.0, 0.0]
    with pytest.raises(ValueError, match="cannot be paired"):
        bootstrap.margin(first, first[:-1])


def test_mcnemar_is_a_binomial_test_of_the_items_that_differ() -> None:
    first = np.array([1] * 8 + [0] * 2 + [1] * 30, dtype=bool)
    second = np.array([0] * 8 + [1] * 2 + [1] * 30, dtype=bool)
    assert mcnemar_exact(first, second) == pytest.approx(2 * (1 + 10 + 45) / 1024)
    assert mcnemar_exact(first, first) == 1.0


# --- the benchmark -------------------------------------------------------------------------------


def synthetic_clips(categories: tuple[str, ...], name: str, test: int) -> list[dict[str, Any]]:
    """Metadata of `test` test clips and a few train clips, with labels drawn independently."""
    known = grammar().categories
    clips = []
    for number in range(test + 40):
        rng = clip_rng(5, f"{name}-{number}")
        labels = {
            c: known[c].options[(number + int(rng.integers(2))) % len(known[c].options)] for c in categories
        }
        said = f"{labels['number']} {labels['colour']} {labels['animal']}" if "number" in labels else ""
        split = "test" if number < test else "train"
        clips.append(
            {
                "key": f"{name}-{number:04d}",
                "split": split,
                "labels": labels,
                "transcript": said,
                "licence": "CC0-1.0",
            }
        )
    return clips


@pytest.fixture(scope="module")
def items() -> list[Item]:
    clips = {
        "sounds": synthetic_clips(SOUNDED, "sound", 240),
        "speech": synthetic_clips(SPOKEN, "speech", 240),
    }
    return write_items(BenchmarkRecipe(), clips)


def test_benchmark_has_fifty_keys_a_letter_and_equal_keys_in_each_group(items: list[Item]) -> None:
    assert len(items) == 200
    assert set(Counter(item.answer for item in items).values()) == {50}
    for group in GROUPS:
        keys = Counter(item.answer for item in items if item.group == group)
        assert len(set(keys.values())) == 1, (group, keys)
    assert len({item.id for item in items}) == 200


def test_every_answer_is_key_and_wrong_option_about_equally_often(items: list[Item]) -> None:
    for name, category in grammar().categories.items():
        asked = [item for item in items if item.category == name]
        if name == "recording":  # these clips carry no such label, so nothing asks for it
            assert not asked
            continue
        keys = Counter(item.key for item in asked)
        wrong = Counter(option for item in asked for option in item.options if option != item.key)
        assert max(keys.values()) - min(keys[o] for o in category.options) <= 1, (name, keys)
        assert max(wrong.values()) - min(wrong[o] for o in category.options) <= 2, (name, wrong)
        assert max(Counter(item.answer for item in asked).values()) <= -(-len(asked) // 4), name
    shares = {g: Counter(i.category for i in items if i.group == g) for g in GROUPS}
    assert all(max(s.values()) - min(s.values()) <= 1 for s in shares.values())


def test_items_use_test_clips_once_a_category_and_ask_what_the_clip_holds(items: list[Item]) -> None:
    clips = {
        c["key"]: c for c in synthetic_clips(SOUNDED, "sound", 240) + synthetic_clips(SPOKEN, "speech", 240)
    }
    assert all(clips[item.clip]["split"] == "test" for item in items)
    assert len({(item.category, item.clip) for item in items}) == 200
    for item in items:
        assert item.key == clips[item.clip]["labels"][item.category]
        assert len(set(item.options)) == 4
        assert item.question in grammar().category(item.category).questions
    assert {item.source for item in items if item.category == "loudness"} <= {"sounds", "speech"}


def test_benchmark_depends_on_its_own_seed_and_not_on_the_order_of_clips(items: list[Item]) -> None:
    sounds, speech = synthetic_clips(SOUNDED, "sound", 240), synthetic_clips(SPOKEN, "speech", 240)
    clips = {"speech": speech[::-1], "sounds": sounds[::-1]}
    assert write_items(BenchmarkRecipe(), clips) == items
    assert write_items(BenchmarkRecipe(seed=1), clips) != items


def test_too_few_clips_and_unbalanced_sizes_are_refused_in_words() -> None:
    few = {"sounds": synthetic_clips(SOUNDED, "sound", 8), "speech": synthetic_clips(SPOKEN, "speech", 8)}
    with pytest.raises(BadInput, match=r"make more test clips or lower benchmark\.words"):
        write_items(BenchmarkRecipe(), few)
    with pytest.raises(BadInput, match="multiple of 4"):
        write_items(BenchmarkRecipe(words=61), few)


def test_card_says_what_the_benchmark_is_not(items: list[Item]) -> None:
    text = card(items)
    for phrase in ("200 questions", "closed", "synthetic", "micro encoder", "AudioLLMs/AudioBench"):
        assert phrase in text


# --- scoring -------------------------------------------------------------------------------------


def knows_everything(asked: list[Asked]) -> np.ndarray:
    return np.eye(4)[[one.right for one in asked]]


def always_b(asked: list[Asked]) -> np.ndarray:
    return np.tile([0.1, 0.7, 0.1, 0.1], (len(asked), 1))


def test_a_perfect_listener_scores_one_and_a_constant_letter_exactly_a_quarter(items: list[Item]) -> None:
    own = [item.clip for item in items]
    perfect = scoring.ask(items, knows_everything, own)
    assert perfect.scores.mean() == 1.0
    assert perfect.strict.all()
    assert perfect.letters == dict.fromkeys(LETTERS, 200)
    assert (perfect.options.argmax(axis=1) == [item.answer for item in items]).all()
    blind = scoring.ask(items, always_b, own)
    assert (blind.scores == 0.25).all()
    assert not blind.strict.any()
    assert blind.letters == {"A": 0, "B": 800, "C": 0, "D": 0}
    assert np.allclose(blind.options, 0.25)


def beside(items: list[Item]) -> dict[str, scoring.Baseline]:
    return {
        "chance": scoring.Baseline("no_audio", baselines.guess_blindly(items)),
        "majority": scoring.Baseline("no_audio", baselines.guess_one_letter(items)),
        "longest option": scoring.Baseline("no_audio", baselines.guess_longest(items)),
        "no audio": scoring.Baseline("no_audio", scoring.ask(items, always_b, [None] * len(items)).scores),
        "linear probe": scoring.Baseline("ceiling", np.ones(len(items))),
    }


def test_summary_passes_the_perfect_and_not_the_blind(items: list[Item]) -> None:
    bootstrap = Bootstrap(seed=0, draws=1000)
    own = [item.clip for item in items]
    second = np.zeros(len(items))
    good = scoring.summarise(
        items, scoring.ask(items, knows_everything, own), beside(items), second, bootstrap
    )
    assert good["passed"] is True
    assert good["accuracy"] == 1.0
    assert good["margin_ci95"][0] > 0.5
    bad = scoring.summarise(items, scoring.ask(items, always_b, own), beside(items), second, bootstrap)
    assert bad["passed"] is False
    assert bad["margin_ci95"][0] <= 0
    assert sum(group["n"] for group in bad["groups"].values()) == 200
    assert {b["kind"] for b in bad["baselines"].values()} <= {"no_audio", "ablation", "ceiling"}
    json.dumps(good, allow_nan=False)


def test_simple_baselines(items: list[Item]) -> None:
    assert baselines.guess_one_letter(items).mean() == 0.25
    tied = Item("x", "g", "c", "k", "sounds", "?", ("ab", "cd", "e", "f"), 1, "", "")
    assert baselines.guess_longest([tied]).tolist() == [0.5]


def test_shuffles_are_derangements_inside_the_group(items: list[Item]) -> None:
    drawn = scoring.shuffled_clips(items, 3, seed=9)
    assert drawn == scoring.shuffled_clips(items, 3, seed=9)
    assert drawn[0] != drawn[1]
    for clips in drawn:
        assert all(clip != item.clip for clip, item in zip(clips, items, strict=True))
        for group in GROUPS:
            rows = [row for row, item in enumerate(items) if item.group == group]
            assert Counter(clips[row] for row in rows) == Counter(items[row].clip for row in rows)
    with pytest.raises(ValueError, match="another clip"):
        baselines.derange(["a", "a", "b"], np.random.default_rng(0))


def test_probe_reads_what_the_features_hold(items: list[Item]) -> None:
    class Planted:
        """Features whose mean over time is the label itself, one number per possible answer."""

        def __init__(self) -> None:
            plain = synthetic_clips(SOUNDED, "sound", 240) + synthetic_clips(SPOKEN, "speech", 240)
            self.clips = plain
            self._labels = {clip["key"]: clip["labels"] for clip in plain}

        def by_split(self, split: str) -> list[dict[str, Any]]:
            return [clip for clip in self.clips if clip["split"] == split]

        def frames(self, key: str) -> np.ndarray:
            row = [
                float(self._labels[key].get(name) == option)
                for name, category in grammar().categories.items()
                for option in category.options
            ]
            return np.tile(np.array(row, dtype=np.float32), (3, 1))

    assert baselines.probe(items, Planted()).mean() > 0.95  # type: ignore[arg-type]


# --- the map -------------------------------------------------------------------------------------


def test_centroid_numbers_find_clusters_and_see_none_in_noise() -> None:
    rng = np.random.default_rng(0)
    truth = np.arange(80) % 4
    noise = rng.normal(size=(80, 16))
    apart = embedding_map.centroid_numbers(noise + 6 * np.eye(16)[truth], truth)
    assert apart["centroid_accuracy"] == 1.0
    assert apart["separation"] > 0.3
    mixed = embedding_map.centroid_numbers(noise, truth)
    assert mixed["centroid_accuracy"] < 0.45
    assert mixed["separation"] < 0.05


def test_plane_is_fitted_on_its_points_alone_with_fixed_signs() -> None:
    points = np.random.default_rng(1).normal(size=(30, 8)) * np.array([5, 3, 1, 1, 1, 1, 1, 1])
    plane = embedding_map.fit_plane(points, 2)
    assert np.allclose(plane.axes @ plane.axes.T, np.eye(2))
    assert plane.explained[0] > plane.explained[1]
    assert np.allclose(embedding_map.fit_plane(points[::-1], 2).axes, plane.axes)
    with pytest.raises(BadInput, match=r"embedding_map\.components"):
        embedding_map.fit_plane(points, 9)


def test_modality_gap_is_zero_for_equal_clouds() -> None:
    cloud = np.random.default_rng(1).normal(size=(50, 4))
    assert embedding_map.modality_gap(cloud, cloud) == 0.0
    assert embedding_map.modality_gap(cloud + 10, cloud) > 5


def test_labels_are_parted() -> None:
    moved = part_labels(np.array([[0.0, 0.0], [5.0, 1.0], [300.0, 0.0]]), width=60, gap=20)
    assert abs(moved[0, 1] - moved[1, 1]) >= 20
    assert moved[2, 1] == 0.0


# --- charts and page -----------------------------------------------------------------------------


def test_charts_say_in_words_what_they_show() -> None:
    svg = interval_bars("Overall", [Bar("this <model>", 0.285, (0.24, 0.331), "model")], chance=0.25)
    assert 'aria-label="Overall: this &lt;model&gt; 28.5 %, 24.0 % to 33.1 %"' in svg
    assert "<model>" not in svg
    assert "from 5.00 to 1.00" in curve("Loss", [("loss", [(s, 5 - s / 100) for s in range(401)])])
    assert "No curve" in curve("Loss", [("loss", [])])


def test_prose_renders_the_card_and_escapes(items: list[Item]) -> None:
    html = page.prose(card(items) + "\n\n- a <b>\n- c")
    assert "<h3>What it is not</h3>" in html
    assert "<li>a &lt;b&gt;</li>" in html


def test_listed_items_are_half_right_and_from_every_group(items: list[Item]) -> None:
    answers = {item.id: {"right": row % 3 == 0} for row, item in enumerate(items)}
    chosen = report_sections.choose_items(items, answers, 12)
    assert len({item.id for item in chosen}) == 12
    assert sum(answers[item.id]["right"] for item in chosen) == 6
    assert {item.group for item in chosen} == set(GROUPS)
    assert chosen == report_sections.choose_items(items, answers, 12)
    none_right = {item.id: {"right": False} for item in items}
    assert len(report_sections.choose_items(items, none_right, 12)) == 12


def test_headline_sentence_follows_the_margin() -> None:
    plain = {
        "confidence": 0.95,
        "margin_over": "no audio",
        "letters": {"A": 799, "B": 1, "C": 0, "D": 0},
        "baselines": {"linear probe": {"accuracy": 0.5}},
        "passed": False,
    }
    meaning, why = report.meaning_of(plain | {"margin_ci95": [-0.01, 0.05]}, "random")
    assert meaning == "Not distinguishable from guessing."
    assert "random weights" in why
    assert "It answered A in 799 of 800" in why
    assert "less than the pass mark" in report.meaning_of(plain | {"margin_ci95": [0.01, 0.05]}, "random")[0]
    assert report.meaning_of(plain | {"margin_ci95": [0.2, 0.3], "passed": True}, "random")[0].startswith(
        "It hears:"
    )
