"""Link-context episodes: what is mined, drawn, renamed and asked; the published rows."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import linked_classes
import pytest
import torch
from backbones import Plugin
from linked_classes import CLASSES, IMAGES, NAMES, label, paint, read, seen

from modeling_aim.data import link_context, mining
from modeling_aim.data.mining import ClassFeatures, mined_neighbours, similarity
from modeling_aim.training import EpisodeCollator, open_source
from modeling_aim.training.episodes import ShotLaw
from modeling_aim.training.link_context import LclRows, LinkContext, LinkedClasses, Neighbour

folder, features = linked_classes.folder, linked_classes.features  # the fixtures

# --- mining


def test_similarity_is_the_papers_by_hand() -> None:
    text = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])  # unit: (1, 0), (0, 1), (.6, .8)
    images = torch.tensor([[0.0, 5.0], [1.0, 0.0], [0.8, 0.6]])  # unit: (0, 1), (1, 0), (.8, .6)
    alike = similarity(text, images)
    # classes 0 and 1: T.T = 0, I.I = 0, I0.T1 = 1, T0.I1 = 1
    assert alike[0, 1] == pytest.approx(0.8 * 2)
    # classes 0 and 2: T.T = .6, I.I = .6, I0.T2 = .8, T0.I2 = .8
    assert alike[0, 2] == pytest.approx(0.5 * 0.6 + 0.8 * 1.6 + 0.5 * 0.6)
    # classes 1 and 2: T.T = .8, I.I = .8, I1.T2 = .6, T1.I2 = .6
    assert alike[1, 2] == pytest.approx(0.5 * 0.8 + 0.8 * 1.2 + 0.5 * 0.8)
    # class 0 and itself: T.T = 1, I.I = 1, I0.T0 = 0 twice
    assert alike[0, 0] == pytest.approx(1.0)
    assert torch.equal(alike, alike.T)


def test_neighbours_come_one_from_each_bin_nearest_first() -> None:
    places = torch.rand(109, 1, generator=torch.Generator().manual_seed(0))
    alike = -(places - places.T).abs()
    found = mined_neighbours(alike, seed=1)
    for own, some in enumerate(found):
        ranked = [other for other in alike[own].argsort(descending=True).tolist() if other != own]
        assert [ranked.index(one) // 3 for one in some] == list(range(36))  # 108 others, 36 bins of 3
    assert found == mined_neighbours(alike, seed=1) != mined_neighbours(alike, seed=2)


@pytest.mark.parametrize("classes", [2, 3, 36, 37, 40, 75])
def test_bins_are_equal_and_as_many_as_there_are_classes(classes: int) -> None:
    alike = torch.arange(classes).float().expand(classes, classes)  # the class with the highest number is nearest
    drawn: list[set[int]] = [set() for _ in range(min(36, classes - 1))]
    for seed in range(200):
        some = mined_neighbours(alike, seed)[0]
        assert some == sorted(some, reverse=True) and len(some) == len(drawn)
        for seen_in, one in zip(drawn, some, strict=True):
            seen_in.add(one)
    assert set().union(*drawn) == set(range(1, classes))  # every class can be drawn,
    assert sum(map(len, drawn)) == classes - 1  # and lies in one bin
    assert max(map(len, drawn)) - min(map(len, drawn)) <= 1


def test_nearest_neighbours_are_drawn_most_often_with_linearly_falling_weight(folder: Path) -> None:
    classes = [mining.ImageClass(str(number), f"c{number}", ("a", "b")) for number in range(37)]
    neighbours = [Neighbour(number, 36 - place) for place, number in enumerate(range(1, 37))]
    source = LinkedClasses(classes, [neighbours] * 37, name="weights")
    rng, draws = random.Random(0), 40_000
    found = Counter(source._negatives(0, rng)[0].number for _ in range(draws))
    expected = {number: draws * (37 - number) / 666 for number in range(1, 37)}  # 36 + 35 + ... + 1 = 666
    chi_square = sum((found[number] - expected[number]) ** 2 / expected[number] for number in expected)
    assert chi_square < 66.6  # 35 degrees of freedom: exceeded once in a thousand
    flat = sum((found[number] - draws / 36) ** 2 / (draws / 36) for number in expected)
    assert flat > 1000


def test_mined_neighbours_carry_the_falling_weights(folder: Path, features: ClassFeatures) -> None:
    source = LinkContext(folder, features=features)
    assert [(one.number, one.weight) for one in source.neighbours[0]] == [(k, 6 - k) for k in range(1, CLASSES)]
    alone = LinkContext(folder, neighbours="random")
    assert {one.weight for one in alone.neighbours[2]} == {1.0}
    assert [one.number for one in alone.neighbours[2]] == [0, 1, 3, 4, 5]


# --- episodes


def test_an_episode_binds_two_classes_and_asks_for_one(folder: Path, features: ClassFeatures) -> None:
    real = set(NAMES)
    names, positives, renamed = [], Counter(), 0
    for episode in read(LinkContext(folder, features=features), 300):
        *demos, query = episode.pairs
        assert episode.targets == (len(demos),) and len(demos) == 8
        assert query.question == "What is this?" and all(demo.is_label for demo in demos)
        bound = {seen(demo)[0]: label(demo) for demo in demos}
        assert len(bound) == 2 and all(bound[seen(demo)[0]] == label(demo) for demo in demos)
        assert Counter(seen(demo)[0] for demo in demos) == dict.fromkeys(bound, 4)
        assert label(query) == bound[seen(query)[0]]
        assert len({seen(pair) for pair in episode.pairs}) == len(episode.pairs)  # the query is shown nowhere else
        (positive,) = (number for number, name in bound.items() if name not in real)
        (negative,) = set(bound) - {positive}
        name = bound[positive]
        assert name.isalpha() and name.islower() and name.isascii() and 1 <= len(name) <= 10
        assert bound[negative] == NAMES[negative]
        names.append(name)
        positives[positive] += 1
        renamed += seen(query)[0] == positive
    assert positives == dict.fromkeys(range(CLASSES), 50)  # every class once in each pass
    assert len(set(names)) > 270 and {len(name) for name in names} == set(range(1, 11))
    assert 150 - 35 < renamed < 150 + 35  # four standard deviations


def test_demonstrations_are_shuffled(folder: Path) -> None:
    orders = {
        tuple(label(demo) in NAMES for demo in episode.pairs[:-1])
        for episode in read(LinkContext(folder, neighbours="random"), 60)
    }
    assert len(orders) > 20 and {order[0] for order in orders} == {True, False}


def test_a_random_name_is_no_name_of_the_set() -> None:
    taken = set("abcdefghijklmnopqrstuvwxyz")
    assert all(len(link_context.random_name(random.Random(seed), taken)) > 1 for seed in range(300))


def test_the_most_alike_class_is_the_most_frequent_negative(folder: Path, features: ClassFeatures) -> None:
    negatives: Counter[int] = Counter()
    for episode in read(LinkContext(folder, features=features), 720, ShotLaw(2)):
        numbers = {seen(demo)[0]: label(demo) in NAMES for demo in episode.pairs[:-1]}
        if numbers.get(0) is False:
            negatives[next(number for number, kept in numbers.items() if kept)] += 1
    assert [negatives[k] for k in range(1, CLASSES)] == sorted(negatives.values(), reverse=True)


def test_shots_follow_the_policy_and_both_counts_are_said(folder: Path) -> None:
    law, draws, found = ShotLaw(10), 20_000, {}
    for policy in ("2way_weight", "2way_uniform", "2way_random_shot"):
        source = LinkContext(folder, neighbours="random", policy=policy)
        rng = random.Random(policy)
        drawn = Counter(source._draw(5, rng) for _ in range(draws))
        found[policy] = [drawn[count] / draws for count in range(1, 6)]
        lengths = {len(episode.pairs) - 1 for episode in read(source, 60, law)}
        assert lengths == ({10} if policy == "2way_weight" else {2, 4, 6, 8, 10})
    assert found["2way_weight"] == [0, 0, 0, 0, 1]
    assert found["2way_uniform"] == pytest.approx([0.2] * 5, abs=0.015)  # five standard deviations
    weights = [2.718281828 ** (count / 2) for count in range(1, 6)]
    assert found["2way_random_shot"] == pytest.approx([weight / sum(weights) for weight in weights], abs=0.018)
    source = LinkContext(folder, neighbours="random", policy="2way_random_shot")
    assert source.counts(law) == "2way_random_shot: 1 to 5 demonstrations of each of 2 classes, 2 to 10 in all"
    fixed = LinkContext(folder, neighbours="random", shots=3)
    assert fixed.counts(law) == "2way_weight: 3 demonstrations of each of 2 classes, 6 in all"
    assert {len(episode.pairs) for episode in read(fixed, 20, law)} == {7}
    assert LinkContext(folder, neighbours="random").most(ShotLaw(100)) == 16


def test_the_law_must_have_room_for_the_shots(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"16 demonstrations of each of 2 classes are 32 in all.*may have 8 in all"):
        read(LinkContext(folder, neighbours="random", shots=16), 1)
    with pytest.raises(ValueError, match="1 demonstrations of each of 2 classes are 2 in all"):
        read(LinkContext(folder, neighbours="random"), 1, ShotLaw(1))


def test_mix_is_half_ordinary_pairs_under_true_names(folder: Path, features: ClassFeatures) -> None:
    ordinary = 0
    for episode in read(LinkContext(folder, features=features, policy="mix"), 300):
        *demos, query = episode.pairs
        assert episode.targets == (8,) and len({seen(pair) for pair in episode.pairs}) == 9
        if all(label(pair) == NAMES[seen(pair)[0]] for pair in demos):
            ordinary += 1
            assert label(query) == NAMES[seen(query)[0]]
            assert len({seen(demo)[0] for demo in demos}) > 1
    assert 150 - 35 < ordinary < 150 + 35


def test_both_classes_or_more_of_them_can_be_renamed(folder: Path, features: ClassFeatures) -> None:
    for episode in read(LinkContext(folder, features=features, rename="both"), 30):
        names = {label(pair) for pair in episode.pairs}
        assert len(names) == 2 and not names & set(NAMES)
    asked = Counter()
    for episode in read(LinkContext(folder, features=features, ways=4, shots=2), 200):
        bound = {seen(demo)[0]: label(demo) for demo in episode.pairs[:-1]}
        assert len(bound) == len(set(bound.values())) == 4 and len(set(bound.values()) - set(NAMES)) == 1
        query = episode.pairs[-1]
        assert label(query) == bound[seen(query)[0]]
        asked[label(query) in NAMES] += 1
    assert 150 - 30 < asked[True] < 150 + 30


def test_the_papers_words_fit_the_processor(folder: Path, llava: Plugin) -> None:
    episode = read(LinkContext(folder, neighbours="random", wording="paper", questions="one"), 1)[0]
    *demos, query = episode.pairs
    processor = llava.processor
    assert {processor.apply_template(demo)[0] for demo in demos} == {
        f'What is in the image? there is "{name}" in the image.' for name in {d.text.split('"')[1] for d in demos}
    }
    assert query.question == "Based on the previous examples, what is in the image?"
    assert query.text in {demo.text for demo in demos}
    plain = read(LinkContext(folder, neighbours="random"), 1)[0]
    worded = {processor.apply_template(demo)[0] for demo in plain.pairs[:-1]}
    assert worded == {f"This is {demo.text}." for demo in plain.pairs[:-1]}
    assert processor.prompt(plain.pairs[-1].question or "").count("What is this?") == 1
    own = link_context.Wording("Name it.", "It is {label}.", None, "Here: a {label}!")
    episode = read(LinkContext(folder, neighbours="random", wording=own), 1)[0]
    assert {processor.apply_template(demo)[0] for demo in episode.pairs[:-1]} == {d.text for d in episode.pairs[:-1]}
    assert episode.pairs[-1].text.startswith("It is ") and episode.pairs[-1].text.endswith(".")


def test_queries_vary_as_the_paper_trains(folder: Path) -> None:
    assert len(set(link_context.QUESTIONS)) == 65
    asked = {
        (wording, questions): {
            episode.pairs[-1].question
            for episode in read(LinkContext(folder, neighbours="random", **settings), 200, ShotLaw(2))
        }
        for wording, questions in (("paper", None), ("label", "varied"), ("label", None))
        for settings in [{"wording": wording, "questions": questions}]
    }
    assert asked["label", None] == {"What is this?"}
    for questions in (asked["paper", None], asked["label", "varied"]):
        assert len(questions) > 45 and questions <= set(link_context.QUESTIONS)


def test_images_under_names_of_their_own_are_told_by_class(folder: Path) -> None:
    source = LinkContext(folder, neighbours="random", policy="policy_2way_ref")
    lengths = Counter()
    for episode in read(source, 60, ShotLaw(10)):
        *demos, query = episode.pairs
        lengths[len(demos)] += 1
        names = [demo.text.split('"')[1] for demo in demos]
        same = [name for name, demo in zip(names, demos, strict=True) if seen(demo)[0] == seen(query)[0]]
        assert query.text == ", ".join(same) and len(same) == len(demos) // 2
        assert len(set(names)) == len(names) and not set(names) & set(NAMES)
        assert seen(query) not in [seen(demo) for demo in demos] and query.question == link_context.SAME_CLASS
    assert set(lengths) == {6, 8, 10} and source.counts(ShotLaw(10)).startswith("2way_ref: 3 to 5 demonstrations of ")
    both = read(LinkContext(folder, neighbours="random", policy="2way_ref_or_weight"), 300)
    assert 150 - 35 < sum(episode.pairs[-1].question == link_context.SAME_CLASS for episode in both) < 150 + 35
    with pytest.raises(ValueError, match="3 demonstrations of each of 2 classes are 6 in all"):
        read(source, 1, ShotLaw(4))


@pytest.mark.parametrize("wording", link_context.WORDINGS)
def test_only_the_answer_of_the_query_is_scored(folder: Path, llava: Plugin, wording: str) -> None:
    episode = read(LinkContext(folder, neighbours="random", wording=wording, shots=2), 1)[0]
    batch = EpisodeCollator(llava.model)([episode])
    scored = batch["labels"][batch["labels"] != -100]
    assert len(batch["labels"]) == 1 and len(batch["demos"][0]) == 4
    assert llava.processor.tokenizer.decode(scored, skip_special_tokens=True).strip() == episode.pairs[-1].text


def test_the_sources_open_by_their_names(folder: Path, features: ClassFeatures, tmp_path: Path) -> None:
    features.save(tmp_path / "f.safetensors")
    source, weight = open_source(
        f"link-context:{folder},features={tmp_path}/f.safetensors,policy=mix,shots=2,weight=3"
    )
    assert isinstance(source, LinkContext) and (source.policy, source.shots, weight) == ("mix", 2, 3.0)
    rows, _ = open_source(f"lcl:{published(tmp_path)},images={tmp_path},wording=paper,ordinary=0.25")
    assert isinstance(rows, LclRows) and rows.ordinary == 0.25
    assert [len(read(one, 1)[0].pairs) for one in (source, rows)] == [5, 9]


def test_the_seed_decides_everything(folder: Path, features: ClassFeatures) -> None:
    def content(seed: int, **settings: Any) -> list[Any]:
        source = LinkContext(folder, features=features, policy="2way_uniform", **settings)
        return [[pair.key for pair in episode.pairs] for episode in read(source, 20, seed=seed)]

    assert content(0) == content(0)
    assert content(0) != content(1)
    assert content(0, ordinary=0.5) == content(0, ordinary=0.5) != content(0)


def test_class_names_may_come_from_a_file(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "names.json"
    path.write_text(json.dumps({name: f"kit fox {number}" for number, name in enumerate(NAMES)} | {"other": "cat"}))
    source = LinkContext(folder, neighbours="random", names=path)
    kept = {label(pair) for episode in read(source, 40) for pair in episode.pairs if " " in label(pair)}
    assert kept == {f"kit fox {number}" for number in range(CLASSES)}
    path.write_text(json.dumps(dict.fromkeys(NAMES[1:], "x")))
    with pytest.raises(ValueError, match=r"1 class folders .* have no name in names=, for example \['thing 0'\]"):
        LinkContext(folder, neighbours="random", names=path)


def test_documents_are_the_folders_ordinary_pairs(folder: Path) -> None:
    pairs = [pair for document in LinkContext(folder, neighbours="random").documents(0) for pair in document]
    assert len(pairs) == CLASSES * IMAGES == len({pair["image"] for pair in pairs})
    assert all(Path(pair["image"]).parent.name == pair["label"] for pair in pairs)


# --- broken and missing


def test_broken_images_are_left_out_and_counted(tmp_path: Path) -> None:
    for number, image in itertools.product(range(3), range(6)):
        paint(tmp_path / f"class {number}" / "nested" / f"{image}.png", number, image)
        (tmp_path / f"class {number}" / f"broken {image % 2}.jpg").write_bytes(b"\xff\xd8 no image")
    (tmp_path / "class 0" / "notes.txt").write_text("no image at all")
    episodes = read(LinkContext(tmp_path, neighbours="random", policy="mix"), 90)
    assert sum(episode.skipped["unreadable or missing image"] for episode in episodes) > 30
    assert sum(len(episode.pairs) == 9 for episode in episodes) > 80  # others stand in the places of the broken ones
    assert {len(episode.pairs) for episode in episodes} <= {0, 9}
    assert {reason for episode in episodes for reason in episode.skipped} <= {
        "unreadable or missing image", "episode with a demonstration that cannot be read"
    }  # fmt: skip


def test_an_episode_of_a_class_that_broken_images_leave_too_few_of_is_left_out(tmp_path: Path) -> None:
    for number, image in itertools.product(range(4), range(5)):
        paint(tmp_path / str(number) / f"{image}.png", number, image)
    for path in sorted((tmp_path / "0").iterdir())[:3]:
        path.write_bytes(b"")
    episodes = read(LinkContext(tmp_path, neighbours="random"), 40)
    assert all(seen(pair)[0] != 0 for episode in episodes for pair in episode.pairs)
    left_out = sum(episode.skipped["episode with a demonstration that cannot be read"] for episode in episodes)
    assert left_out == sum(not episode.targets for episode in episodes) and 5 < left_out < 35


def test_errors_say_what_to_do(folder: Path, tmp_path: Path, features: ClassFeatures) -> None:
    def fails(message: str, path: Path = folder, **settings: Any) -> None:
        with pytest.raises(ValueError, match=message):
            LinkContext(path, **{"neighbours": "random", **settings})

    (tmp_path / "one" / "cat").mkdir(parents=True)
    fails(r"has 1 folder of images; expected .*one/LABEL/\*\.png with at least two labels", tmp_path / "one")
    fails("policy='3-way' is unknown; choose one of", policy="3-way")
    for old, new in (("2-way", "2way_weight"), ("2-way-weight", "2way_random_shot"), ("2-way-random", "2way_uniform")):
        fails(f"policy='{old}' is an old name.*it is '{new}'", policy=old)
    fails("policy='jigsaw' is not made", policy="policy_jigsaw")
    fails("shots=2: policy='2way_ref' shows at least 3", policy="2way_ref", shots=2)
    fails("questions='many' is unknown", questions="many")
    fails("means='raw' is of the features that a CLIP computes", means="raw")
    fails("rename='negative' is unknown", rename="negative")
    fails("wording='nice' is unknown", wording="nice")
    fails("neighbours='far' is unknown", neighbours="far")
    fails("give clip= .* features= .* or neighbours='random'", neighbours="similar")
    fails("ways=7 needs 6. Give more classes", ways=7)
    fails("shots=0", shots=0)
    fails("ordinary=2: expected a share", ordinary=2)
    with pytest.raises(ValueError, match=r"answer='yes' must contain \{label\}"):
        link_context.Wording("What?", "yes")
    with pytest.raises(FileNotFoundError, match=r"no folder of classes at .*nowhere"):
        LinkContext(tmp_path / "nowhere", neighbours="random")
    with pytest.raises(ValueError, match=r"need 13 images a class; 6 of 6 classes have fewer: 'thing 0' \(12\)"):
        read(LinkContext(folder, neighbours="random", shots=12), 1, ShotLaw(24))
    assert len(read(LinkContext(folder, neighbours="random", shots=11), 1, ShotLaw(24))[0].pairs) == 23
    other = ClassFeatures(("dax", *NAMES[1:]), features.text, features.images)
    message = r"1 without features: thing 0; 1 with features but without a folder: dax"
    fails(message, features=other, neighbours="similar")
    other.save(tmp_path / "other.safetensors")
    fails(r"features in .*other.safetensors are of other classes.*" + message, features=tmp_path / "other.safetensors",
          neighbours="similar")  # fmt: skip


# --- the published rows

SYNSETS = {"1": "kit fox", "2": "English setter", "3": "Siberian husky", "4": "weasel"}


def published(root: Path, **changes: Any) -> Path:
    """Rows as in the files published for training, with painted images."""
    rows = []
    for number, (key, name) in enumerate(SYNSETS.items()):
        samples = [f"train/n{number}/n{number}_{image}.JPEG.png" for image in range(IMAGES)]
        others = [other for other in SYNSETS if other != key]
        neighbours = [[other, SYNSETS[other], f"val/{other}.png"] for other in others] + [
            ["1000", "toast", "val/x.png"]
        ]
        for image, sample in enumerate(samples):
            paint(root / sample, number, image)
        paint(root / f"val/{key}.png", number, 20)
        rows.append({"class_id": key, "class_name": name, "samples": samples, "neighbors": neighbours})
    rows[0] |= changes
    path = root / "train900_pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def test_published_rows_give_episodes(tmp_path: Path) -> None:
    source = LclRows(published(tmp_path), policy="2way_random_shot")
    first = [(one.number, one.weight) for one in source.neighbours[0]]
    assert first == [(1, 4), (2, 3), (3, 2)]  # of 4, of which the last has no row
    names = [name.lower() for name in SYNSETS.values()]
    shown = Counter()
    for episode in read(source, 300):
        bound = {seen(demo)[0]: label(demo) for demo in episode.pairs[:-1]}
        assert len(bound) == 2 and label(episode.pairs[-1]) == bound[seen(episode.pairs[-1])[0]]
        (kept,) = (number for number, name in bound.items() if name == names[number])
        assert len({seen(pair) for pair in episode.pairs}) == len(episode.pairs)
        shown.update((seen(demo)[0] == kept, seen(demo)[1] == 20) for demo in episode.pairs)
    assert shown[True, True] > 0 and shown[False, True] == 0  # a neighbour's image is one of the negative
    elsewhere = tmp_path / "rows.jsonl"
    elsewhere.write_text(published(tmp_path / "images").read_text())
    assert len(read(LclRows(elsewhere, images=tmp_path / "images"), 2)) == 2


def test_bad_rows_are_named(tmp_path: Path) -> None:
    for changes, message in (
        ({"neighbors": [["2", "English setter"]]}, r"line 1: its neighbors are not lists \[class id"),
        ({"samples": "a.png"}, r"line 1: 'a.png' is not a list of image paths"),
        ({"class_name": " "}, r"line 1: class_name is ' '; expected a name"),
        ({"class_id": "2"}, r"has 4 rows of only 3 classes"),
        ({"neighbors": [["1000", "toast", "val/x.png"]]}, "class '1' has 0 neighbours"),
    ):
        with pytest.raises(ValueError, match=message):
            LclRows(published(tmp_path, **changes))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"class_id": "1", "class_name": "a", "context_samples": [], "test_samples": []}\n')
    with pytest.raises(ValueError, match=r"line 1: a row with \['samples', 'neighbors'\] missing"):
        LclRows(path)
    path.write_text('\n{"class_id"\n')
    with pytest.raises(ValueError, match=r"line 2: not JSON"):
        LclRows(path)
    with pytest.raises(FileNotFoundError):
        LclRows(tmp_path / "nothing.jsonl")


def test_test_pairs_are_rows_side_by_side(tmp_path: Path) -> None:
    def rows(count: int) -> Path:
        kinds = (("context_samples", 32), ("test_samples", 50))
        path = tmp_path / "test100_pairs.jsonl"
        lines = [
            {"class_id": str(k), "class_name": f"Class {k}"}
            | {key: [f"train/{k}/{key}{i}.JPEG" for i in range(many)] for key, many in kinds}
            for k in range(count)
        ]
        path.write_text("\n".join(map(json.dumps, lines)))
        return path

    pairs = list(link_context.test_pairs(rows(100), images="/imagenet"))
    assert len(pairs) == 50
    for number, pair in enumerate(pairs):
        for one, key in zip(pair, (2 * number, 2 * number + 1), strict=True):
            assert (one.key, one.name) == (str(key), f"Class {key}")
            assert len(one.context) == 32 and len(one.queries) == 50 and not set(one.context) & set(one.queries)
            assert one.context[0] == f"/imagenet/train/{key}/context_samples0.JPEG"
    beside = next(link_context.test_pairs(rows(2)))[0]
    assert beside.queries[0] == str(tmp_path / "train/0/test_samples0.JPEG")
    with pytest.raises(ValueError, match="has 3 rows; test pairs are rows 2i and 2i"):
        list(link_context.test_pairs(rows(3)))
    with pytest.raises(ValueError, match=r"\['context_samples', 'test_samples'\] missing"):
        list(link_context.test_pairs(published(tmp_path)))
