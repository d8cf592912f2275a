"""Metrics of evaluation against what published scorers give, by hand; ties and unparsable answers too."""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter

import pytest

from modeling_aim.evaluation import metrics
from modeling_aim.evaluation.metrics import (
    Captions,
    cut,
    exact_match,
    lcl_published,
    named,
    plain_tokens,
    roc_auc,
    scienceqa_choice,
    vl_icl_summary,
    vqa_accuracy,
    vqa_normalized,
    yes_or_no,
    yes_or_no_said,
)

# --- exact match


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("dax", "dax"),
        ("  dax \n\nThis is a wug", "dax "),
        ("dax. This is", "dax"),
        ("dax. or wug\nQ", "dax. or wug"),  # the newline goes first: no full stop is looked for
        (".5", ".5"),
        ("\n\n", ""),
        ("", ""),
    ],
)
def test_answers_are_cut_as_by_vl_icl(answer: str, kept: str) -> None:
    assert cut(answer) == kept


@pytest.mark.parametrize(
    ("answer", "right", "digits", "matches"),
    [
        ("Dax. It is", ["dax"], False, True),
        ("a dax", ["dax"], False, False),
        ("dax \nQ", ["dax"], False, False),  # the space before the newline stays, as in the published code
        ("dax", ["wug", "DAX"], False, True),
        ("", [""], False, True),
        ("The answer is 12 or 13", ["12"], True, True),
        ("3 + 4 = 7", ["7"], True, False),  # the first run
        ("7.5", ["7"], True, True),  # cut at the full stop
        ("seven", ["7"], True, False),
        ("", ["0"], True, False),
        ("-3", ["-3"], True, False),  # a sign is no digit
    ],
)
def test_exact_match(answer: str, right: list[str], digits: bool, matches: bool) -> None:
    assert exact_match(answer, right, digits) is matches


@pytest.mark.parametrize(
    ("answer", "published", "said"),
    [
        ("Yes, they do", ("yes",), ("yes",)),
        ("No.", ("no",), ("no",)),
        ("", ("no",), ()),  # whatever does not say yes is a no
        ("perhaps", ("no",), ()),
        ("eyes", ("yes",), ()),  # contained
        ("no, yes", ("yes",), ("no",)),
        ("no\nyes", ("no",), ("no",)),
    ],
)
def test_yes_and_no(answer: str, published: tuple[str, ...], said: tuple[str, ...]) -> None:
    assert tuple(right for right in ("yes", "no") if yes_or_no(answer, right)) == published
    assert tuple(right for right in ("yes", "no") if yes_or_no_said(answer, right)) == said


# --- names


@pytest.mark.parametrize(
    ("answer", "right", "other", "published", "normalized"),
    [
        ('there is "kit fox" in the image.', "Kit Fox", "wolf", True, True),
        ('there is "Kit Fox" in the image.', "Kit Fox", "wolf", False, True),  # the answer is not lower-cased there
        ('there is "kit fox" in the image.', "kit fox", "fox", True, True),  # taken out before the other is looked for
        ("a kit fox and a fox", "kit fox", "fox", False, False),
        ("kit fox, kit fox", "kit fox", "fox", True, True),
        ("a kit fox", "fox", "kit fox", True, False),  # what is left there is "a kit "
        ('there is "fox" in the image.', "kit fox", "fox", False, False),
        ("kit fox or Wolf", "kit fox", "Wolf", True, False),  # nor is there a capital in the other name
        ("a caterpillar", "cat", "dog", True, False),  # within a word
        ("a cat in the doghouse", "cat", "dog", False, True),
        ("kit  fox!", "kit fox", "wolf", False, True),
        ("", "cat", "dog", False, False),
        ("it is an animal", "cat", "dog", False, False),
    ],
)
def test_link_context_accuracy_as_published_and_normalized(
    answer: str, right: str, other: str, published: bool, normalized: bool
) -> None:
    assert lcl_published(answer, right, other) is published
    assert named(answer, right, [other]) is normalized


def test_none_of_several_other_names_may_be_said() -> None:
    assert named("a dax", "dax", ["wug", "blick"]) and not named("a dax, no blick", "dax", ["wug", "blick"])


# --- VQA


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The  Red Bus.", "red bus"),
        ("a man's hat", "man's hat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("10,000", "10000"),
        ("1,000 men/women", "1000 menwomen"),  # a comma between digits: all marks go without a space
        ("men/women", "men women"),
        ("yes, sir", "yes sir"),  # a space beside it: it goes without a trace, everywhere
        ("t-shirt", "t shirt"),
        ("3.5 miles.", "3.5 miles"),
        ("u.s.a.", "usa"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("line\nbreak\ttab", "line break tab"),
        ("an", ""),
        ("?", ""),
    ],
)
def test_answers_are_normalized_as_by_the_official_scorer(answer: str, normal: str) -> None:
    assert vqa_normalized(answer) == normal


@pytest.mark.parametrize(
    ("same", "accuracy"),
    # n of 10 said the same: (10 - n) of the others see n matches, n of them n - 1
    [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)],
)
def test_vqa_accuracy_leaves_one_annotator_out(same: int, accuracy: float) -> None:
    given = ["cat"] * same + [f"other {number}" for number in range(10 - same)]
    by_hand = sum(min(1, sum(g == "cat" for g in given[:k] + given[k + 1 :]) / 3) for k in range(10)) / 10
    assert vqa_accuracy("The cat.", given) == pytest.approx(accuracy) == pytest.approx(by_hand)


def test_vqa_accuracy_of_unanimous_annotators() -> None:
    assert vqa_accuracy("two", ["2"] * 10) == 1
    assert vqa_accuracy("two", ["2"] * 10, always=False) == 0  # the official scorer then leaves answers as they are
    assert vqa_accuracy(" 2\n", ["2"] * 10, always=False) == 1
    assert vqa_accuracy("two", ["2"] * 9 + ["3"], always=False) == 1
    assert vqa_accuracy("", ["a"] * 5 + ["cat"] * 5) == 1  # an answer that is nothing but an article is empty
    assert (vqa_accuracy("cat", ["a cat"]), vqa_accuracy("dog", ["cat"])) == (1, 0)


# --- ScienceQA

RIGHT = ("{0}", "{0}. a magnet", "I see. The answer is {0}.", "The answer is {0}, as The answer was.")
FAILED = (
    "", "b", "(B)", "B.", "B) iron", "iron", "the answer is B.", "The answer is B", "The answer is B\n",
    "The answer is B. The answer is B.",
)  # fmt: skip


@pytest.mark.parametrize("form", RIGHT)
def test_forms_of_a_choice(form: str) -> None:
    assert [scienceqa_choice(form.format(letter)) for letter in "ABCDE"] == list("ABCDE")


def test_what_is_no_choice() -> None:
    assert [scienceqa_choice(answer) for answer in FAILED] == [None] * len(FAILED)
    assert scienceqa_choice("F") is None and scienceqa_choice("The answer is Z.") == "Z"  # a letter, and a wrong one
    assert scienceqa_choice("A. no. The answer is B.") == "A"  # how it begins goes first


# LLaVA-13B's published answers: v0 3 855 of 4 241 right, v1.3 3 863. How the wrong ones divide is not published.
@pytest.mark.parametrize(("right", "failed"), [(3855, 17), (3863, 0)])
def test_the_two_published_totals(right: int, failed: int) -> None:
    letters = itertools.cycle("ABCD")
    golds = [next(letters) for _ in range(4241)]
    answers = []
    for number, gold in enumerate(golds):
        other = "ABCD"[("ABCD".index(gold) + 1 + number % 3) % 4]
        if number < right:
            answers.append(RIGHT[number % len(RIGHT)].format(gold))
        elif number < right + failed:
            answers.append(FAILED[number % len(FAILED)])
        else:
            answers.append(RIGHT[number % len(RIGHT)].format(other))
    mixed = list(zip(answers, golds, strict=True))[::-1]
    counts = Counter(
        "failed" if (chosen := scienceqa_choice(answer)) is None else "right" if chosen == gold else "wrong"
        for answer, gold in mixed
    )
    assert counts["right"] == right and counts["failed"] == failed and counts.total() == 4241


# --- ROC-AUC


def test_roc_auc_counts_pairs_and_half_of_ties() -> None:
    scores = [(-1.0, -2.0), (-2.0, -1.0), (-1.0, -2.0), (-3.0, -1.0)]  # P(yes): .73, .27, .73, .12
    # positive .73 against .73 (half) and .12 (1), positive .27 against .73 (0) and .12 (1)
    assert roc_auc(scores, [True, True, False, False]) == pytest.approx(2.5 / 4)
    assert roc_auc(scores, [True, False, True, False]) == 1
    assert roc_auc(scores, [False, True, False, True]) == 0
    assert roc_auc([(-5.0, -5.0)] * 4, [True, True, False, False]) == 0.5
    assert math.isnan(roc_auc(scores, [True] * 4))


def test_roc_auc_looks_at_yes_against_no_only_and_bears_what_is_impossible() -> None:
    # the first is likelier to say yes though both its words are less likely than those of the second
    assert roc_auc([(-9.0, -12.0), (-1.0, -1.5)], [True, False]) == 1
    never = -math.inf
    assert roc_auc([(-1.0, never), (never, -1.0), (never, never)], [True, False, False]) == 1
    assert roc_auc([(-2000.0, -1.0), (-1.0, -2000.0)], [False, True]) == 1


# --- CIDEr

REFERENCES = [["a dog runs", "the dog runs fast"], ["two cats sleep", "cats asleep"], ["a red bus", "one bus"]]


def test_cider_by_hand() -> None:
    scorer = Captions("plain")
    # 1-grams and 2-grams agree wholly, and of 3-grams and 4-grams there are none: 10 * (1 + 1 + 0 + 0) / 4
    scores = scorer.scores(["red bus", "red bus", "zebra"], [["red bus"], ["two cats"], ["old man"]])
    assert scores == pytest.approx([5, 0, 0])
    # one of two words that weigh the same: cosine 1 / 2; no 2-gram
    assert scorer.scores(["blue bus", "two cats"], [["red bus"], ["two cats"]])[0] == pytest.approx(10 * (1 / 2) / 4)
    # cosines 2 / sqrt(3 * 2) of words and 1 / sqrt(2) of 2-grams; one word longer: times exp(-1 / (2 * 6 ** 2))
    longer = 10 * (2 / math.sqrt(6) + 1 / math.sqrt(2)) / 4 * math.exp(-1 / 72)
    assert scorer.scores(["red bus now", "two cats"], [["red bus"], ["two cats"]])[0] == pytest.approx(longer)
    # against several references: the mean
    halved = scorer.scores(["red bus", "two cats"], [["red bus", "old man"], ["two cats"]])[0]
    assert halved == pytest.approx(2.5)


def test_cider_of_little() -> None:
    scorer = Captions("plain")
    assert scorer.scores([], []) == []
    assert scorer.scores(["a dog runs"], [["a dog runs"]]) == [0]  # all its words are in every image's references
    assert scorer.scores(["", "?!"], [["a dog"], ["two cats"]]) == [0, 0]
    again = Captions("plain").scores(["the dog", "cats"], REFERENCES[:2])
    scorer.scores(["a red cat", "the dog"], REFERENCES[:2])
    assert scorer.scores(["the dog", "cats"], REFERENCES[:2]) == again  # what is remembered changes nothing


TOKENS = {
    "A man's dog, isn't it? 3.5 miles -- away!": "a man 's dog is n't it 3.5 miles away",
    "Two t-shirts cost $5 (or 1,000 yen).": "two t-shirts cost $ 5 -lrb- or 1,000 yen -rrb-",
    "": "",
    "I cannot \"believe\" it's O'Neil's caf\u00e9...": "i can not believe it 's o'neil 's caf\u00e9",
    "He works in the u.s.a. now .": "he works in the u.s.a. now",
    "?": "",
}


def test_plain_tokens_are_nearly_those_of_the_treebank() -> None:
    assert [plain_tokens(one) for one in TOKENS] == list(TOKENS.values())


@pytest.mark.skipif(Captions().tokenizer != "ptb", reason="There is no Java.")
def test_javas_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Captions()
    assert scorer._by_java(list(TOKENS)) == list(TOKENS.values())
    scorer.scores(["one\ntwo\u2028three"], [["four"]])  # is one line to Java
    assert scorer._known["one\ntwo\u2028three"] == "one two three"
    captions = [one[0].upper() + ", isn't it?" for one in REFERENCES]
    assert scorer.scores(captions, REFERENCES) == pytest.approx(Captions("plain").scores(captions, REFERENCES))
    assert "Java" in scorer.note() and scorer.note() != Captions("plain").note()
    monkeypatch.setattr(metrics.subprocess, "run", None)
    scorer.scores(captions[::-1], REFERENCES[::-1])  # known already: Java does not start again


def test_what_cider_cannot_do_without_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"tokenizer='nltk' is unknown; choose one of \('ptb', 'plain'\)"):
        Captions("nltk")
    monkeypatch.setattr(metrics.shutil, "which", lambda name: None)
    assert Captions().tokenizer == "plain" and "no Java" not in Captions("plain").note()
    with pytest.raises(ValueError, match="needs Java"):
        Captions("ptb")
    for name in ("pycocoevalcap", "sklearn.metrics"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install modeling-aim\[eval\]"):
        Captions()
    with pytest.raises(ImportError, match=r"pip install modeling-aim\[eval\]"):
        roc_auc([], [])


# --- over numbers of demonstrations


def test_vl_icls_summary() -> None:
    found = vl_icl_summary({0: 0.2, 2: 0.6, 4: 0.5})
    # trapezoids above 0.2: 2 * (0 + .4) / 2 and 2 * (.4 + .3) / 2, of a width of 4
    assert found == pytest.approx({"zero_shot": 0.2, "peak": 0.6, "icl_efficiency": (0.4 + 0.7) / 4})
    assert vl_icl_summary({0: 0.5, 1: 0.5, 8: 0.5})["icl_efficiency"] == 0
    assert vl_icl_summary({8: 0.1, 0: 0.5})["icl_efficiency"] == pytest.approx(-0.2)
    for bad in ({1: 0.5, 2: 0.6}, {0: 0.5}):
        with pytest.raises(ValueError, match="0 and more demonstrations"):
            vl_icl_summary(bad)
