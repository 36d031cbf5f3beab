"""Statistics against known values, scorers and baselines against oracles, charts."""

import dataclasses
import json
from collections import Counter
from typing import Any

import numpy as np
import pytest

from omni_model.evaluation import baselines, page, report, report_sections, scorers
from omni_model.evaluation.answering import NOTHING_HEARD, Answerer, Asked
from omni_model.evaluation.benchmark_card import card
from omni_model.evaluation.benchmark_item import GROUPS, MACRO_GROUPS, Item, pairs_of
from omni_model.evaluation.charts import Bar, curve, interval_bars
from omni_model.evaluation.score_summary import Answers, Baseline, clusters_of, summarise
from omni_model.evaluation.statistics import Bootstrap, holm, mcnemar_exact, wilson_interval
from omni_model.text.questions import LETTERS, grammar
from tests.small_benchmark import corpora, items_of

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


def test_clusters_are_drawn_as_a_whole() -> None:
    """Forty pairs of equal items say no more than forty items, and one cluster says nothing of its spread."""
    pairs = np.repeat(np.random.default_rng(0).integers(0, 2, 40), 2).astype(float)
    bootstrap = Bootstrap(seed=1, draws=2000)
    together = bootstrap.interval(pairs, np.repeat(np.arange(40), 2))
    assert together == bootstrap.interval(pairs[::2])
    alone = bootstrap.interval(pairs)
    assert together.high - together.low > 1.2 * (alone.high - alone.low)
    uneven = np.array([1.0, 0.0, 0.0])
    assert bootstrap.interval(uneven, np.zeros(3)).rounded() == [round(1 / 3, 6)] * 2
    assert bootstrap.interval(uneven, np.array([0, 1, 1])).rounded() == [0.0, 1.0]


def test_holm_equals_an_example_by_hand() -> None:
    p = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}
    assert holm(p) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(holm(p)) == list(p)
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@pytest.fixture(scope="module")
def items() -> list[Item]:
    return items_of(*corpora())


# --- scoring -------------------------------------------------------------------------------------


def knows_everything(asked: list[Asked]) -> np.ndarray:
    return np.eye(4)[[one.right for one in asked]]


def always_b(asked: list[Asked]) -> np.ndarray:
    return np.tile([0.1, 0.7, 0.1, 0.1], (len(asked), 1))


def test_a_perfect_listener_scores_one_and_a_constant_letter_exactly_a_quarter(items: list[Item]) -> None:
    own = [item.clips for item in items]
    perfect = scorers.ask(items, knows_everything, own)
    assert perfect.scores.mean() == 1.0
    assert perfect.strict.all()
    assert perfect.consistent.all()
    assert perfect.letters == dict.fromkeys(LETTERS, 200)
    assert (perfect.options.argmax(axis=1) == [item.answer for item in items]).all()
    blind = scorers.ask(items, always_b, own)
    assert (blind.scores == 0.25).all()
    assert not blind.strict.any()
    assert not blind.consistent.any()
    assert blind.letters == {"A": 0, "B": 800, "C": 0, "D": 0}
    assert np.allclose(blind.options, 0.25)


def always_wrong_alike(asked: list[Asked]) -> np.ndarray:
    wrong = [min(set(one.options) - {one.item.key}) for one in asked]
    return np.eye(4)[[one.options.index(option) for one, option in zip(asked, wrong, strict=True)]]


def test_consistent_is_about_options_and_not_about_being_right(items: list[Item]) -> None:
    stubborn = scorers.ask(items, always_wrong_alike, [item.clips for item in items])
    assert stubborn.consistent.all()
    assert stubborn.scores.sum() == 0


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("C", 2),
        (" c. ", 2),
        ("red", 2),
        ("C red", 2),
        ("C) Red.", 2),
        ("dark blue", 0),
        ("A: dark blue", 0),
        ("A red", scorers.UNREADABLE),
        ("It is red", scorers.UNREADABLE),
        ("C or D", scorers.UNREADABLE),
        ("E", scorers.UNREADABLE),
        ("", scorers.UNREADABLE),
    ],
)
def test_a_text_is_read_strictly(text: str, place: int) -> None:
    assert scorers.read_answer(text, ("dark blue", "white", "red", "green")) == place


def answers_of(items: list[Item], answer: Answerer, text: str = "none of these") -> Answers:
    own = [item.clips for item in items]
    right = np.eye(4)[[item.answer for item in items]]
    return Answers(scorers.ask(items, answer, own), right, [text] * len(items))


def beside(items: list[Item]) -> dict[str, Baseline]:
    unheard = scorers.ask(items, always_b, [NOTHING_HEARD] * len(items))
    return {
        "chance": Baseline("no_audio", baselines.guess_blindly(items)),
        "majority": Baseline("no_audio", baselines.guess_one_letter(items)),
        "longest option": Baseline("no_audio", baselines.guess_longest(items)),
        "no audio": Baseline.of("no_audio", unheard),
        "shuffled audio": Baseline.of("ablation", unheard),
        "linear probe": Baseline("ceiling", np.ones(len(items))),
    }


def test_summary_passes_the_perfect_and_not_the_blind(items: list[Item]) -> None:
    bootstrap = Bootstrap(seed=0, draws=1000)
    good = summarise(items, answers_of(items, knows_everything), beside(items), bootstrap)
    assert good["passed"] is True
    assert good["accuracy"] == 1.0
    assert good["margin_ci95"][0] > 0.5
    assert good["pairs"] == {
        "n": len(pairs_of(items)),
        "accuracy": 1.0,
        "ci95": [1.0, 1.0],
        "chance": 1 / 16,
    }
    assert good["scorers"]["likelihood"]["accuracy"] == 1.0
    assert good["scorers"]["text"] | {"ci95": []} == {"accuracy": 0.0, "ci95": [], "unreadable": 200}
    assert good["lures"] == {"n": 8, "followed": 0}
    bad = summarise(items, answers_of(items, always_b, "B"), beside(items), bootstrap)
    assert bad["passed"] is False
    assert bad["margin_ci95"][0] <= 0
    assert bad["pairs"]["accuracy"] == 1 / 16
    assert bad["scorers"]["text"]["accuracy"] == 0.25
    for found, better in ((good, True), (bad, False)):
        assert list(found["groups"]) == list(MACRO_GROUPS)
        assert list(found["parts"]) == list(GROUPS)
        for parts in (found["groups"], found["parts"]):
            assert sum(part["n"] for part in parts.values()) == 200
        assert all(group["above_shuffled"] is better for group in found["groups"].values())
        assert all((part["holm_p"] < 0.05) is better for part in found["parts"].values())
        assert all(part["holm_p"] >= part["mcnemar_p"] for part in found["parts"].values())
        categories = [c["n"] for group in found["groups"].values() for c in group["categories"].values()]
        assert sum(categories) == 200
    assert {b["kind"] for b in bad["baselines"].values()} <= {"no_audio", "ablation", "ceiling"}
    assert {"voice (speaker)", "voice (quality)", "pace"} == set(good["groups"]["voice"]["categories"])
    json.dumps(good, allow_nan=False)


def test_items_that_share_a_clip_are_one_cluster(items: list[Item]) -> None:
    def item(name: str, *clips: str) -> Item:
        return dataclasses.replace(items[0], id=name, clips=clips)

    chain = [item("a", "x"), item("b", "y", "z"), item("c", "w"), item("d", "z", "x"), item("e", "v")]
    clusters = clusters_of(chain)
    assert len(set(clusters)) == 3
    assert clusters[0] == clusters[1] == clusters[3]


def test_simple_baselines(items: list[Item]) -> None:
    assert baselines.guess_one_letter(items).mean() == 0.25
    tied = dataclasses.replace(items[0], options=("ab", "cd", "e", "f"), answer=1)
    assert baselines.guess_longest([tied]).tolist() == [0.5]
    heard = baselines.silent_clips(items, ["s", "t"])
    assert [len(clips) for clips in heard] == [len(item.clips) for item in items]
    assert {clip for clips in heard for clip in clips} == {"s", "t"}


def test_shuffles_are_derangements_inside_the_group_and_across(items: list[Item]) -> None:
    drawn = baselines.shuffled_clips(items, 3, seed=9)
    across = baselines.shuffled_clips(items, 3, seed=9, across=True)
    assert drawn == baselines.shuffled_clips(items, 3, seed=9)
    assert drawn[0] != drawn[1]
    for clips in (*drawn, *across):
        assert all(not set(heard) & set(item.clips) for heard, item in zip(clips, items, strict=True))
        assert Counter(clips) == Counter(item.clips for item in items)
    for clips in drawn:
        for group in GROUPS:
            rows = [row for row, item in enumerate(items) if item.group == group]
            assert Counter(clips[row] for row in rows) == Counter(items[row].clips for row in rows)
    owner = {item.clips: item.group for item in items}
    moved = [owner[heard] != item.group for heard, item in zip(across[0], items, strict=True)]
    assert sum(moved) > 100
    with pytest.raises(ValueError, match="another clip"):
        baselines.derange([("a",), ("a",), ("b",)], np.random.default_rng(0))


def test_probe_reads_what_the_features_hold(items: list[Item]) -> None:
    class Planted:
        """Features whose mean over time is the label itself, one number per possible answer."""

        def __init__(self) -> None:
            self.clips = [clip for corpus in corpora() for clip in corpus]
            self._labels = {clip["key"]: clip["labels"] for clip in self.clips}

        def by_split(self, split: str) -> list[dict[str, Any]]:
            return [clip for clip in self.clips if clip["split"] == split]

        def frames(self, key: str) -> np.ndarray:
            row = [
                float(self._labels[key].get(name) == option)
                for name, category in grammar().categories.items()
                for option in category.options
            ]
            return np.tile(np.array(row, dtype=np.float32), (3, 1))

    taken = baselines.probe(items, Planted())  # type: ignore[arg-type]
    right = taken == [item.answer for item in items]
    assert right.mean() > 0.95
    assert right[[row for row, item in enumerate(items) if item.asked == 1]].mean() > 0.95


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
