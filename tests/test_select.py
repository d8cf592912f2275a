"""Choosing from a bank: most similar last, in turn over labels, without near-duplicates, for each row of a batch."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbones import Plugin, picture, plugin
from PIL import Image

from modeling_aim import DemonstrationBank
from modeling_aim.bank.select import NOT_COMPARED, Groups, SimilarityIndex, pick, sketched

NAMES = ("dax", "wug", "blicket")
DEMOS = [{"image": picture(seed), "label": NAMES[seed % 3 if seed < 6 else 0]} for seed in range(9)]


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> DemonstrationBank:
    """Nine demonstrations with three labels, of which `dax` has five."""
    return DemonstrationBank.build(plugin("llava").model, DEMOS, tmp_path_factory.mktemp("bank"))


def numbers(chosen: list[tuple[int, float]]) -> list[int]:
    return [number for number, _ in chosen]


def never(number: int, chosen: Any) -> bool:
    return False


def test_the_most_alike_image_is_last(bank: DemonstrationBank) -> None:
    for seed in range(9):
        chosen = bank.choose(picture(seed), 4, by="image", balanced=False)
        scores = [score for _, score in chosen]
        assert chosen[-1][0] == seed and scores == sorted(scores) and scores[-1] > 0.99
        rows = bank.similarity("image").rows(range(9))
        exact = rows @ rows[seed]
        assert set(numbers(chosen)) == set(exact.topk(4).indices.tolist())


def test_labels_are_taken_in_turn(bank: DemonstrationBank) -> None:
    for query in (picture(7), picture(30)):
        for by in ("image", "random", "fused"):
            chosen = numbers(bank.choose((query, "What is this?"), 3, by=by))
            assert sorted(bank.labels(chosen), key=str) == sorted(NAMES)
            six = numbers(bank.choose((query, "What is this?"), 6, by=by))
            assert sorted(bank.labels(six), key=str) == sorted(NAMES * 2)
    seen = bank.query_features(bank.model.query_inputs(picture(7)), "image")["image"][0]
    best = bank.similarity("image").scores(seen)
    wanted = {max((i for i in range(9) if bank.labels()[i] == name), key=lambda i: float(best[i])) for name in NAMES}
    assert set(numbers(bank.choose(picture(7), 3, by="image"))) == wanted


def test_random_repeats_with_its_seed_and_differs_without(bank: DemonstrationBank) -> None:
    drawn = {seed: numbers(bank.choose(k=4, seed=seed)) for seed in range(8)}
    assert all(numbers(bank.choose(k=4, seed=seed)) == found for seed, found in drawn.items())
    assert len({tuple(found) for found in drawn.values()}) > 4
    assert all(len(set(found)) == 4 for found in drawn.values())
    assert bank.select(k=4, seed=3).texts == tuple(bank.texts(drawn[3]))


def test_a_fixed_list_is_taken_as_it_comes(bank: DemonstrationBank) -> None:
    assert numbers(bank.choose(k=3, by=[4, 0, -1, 2])) == [4, 0, 8]
    keys = bank.keys()
    assert numbers(bank.choose(k=2, by=[keys[5], keys[1]])) == [5, 1]
    for wrong, message in (
        ([0, 9], "lists 9, which is not in this bank of 9"),
        (["ab" * 32], "lists 'abab"),
        ([1], "k=2"),
    ):
        with pytest.raises(ValueError, match=message):
            bank.choose(k=min(2, len(wrong) + (wrong == [1])), by=wrong)


@pytest.mark.parametrize("mask", [[True, False], np.array([True, False]), torch.tensor([True, False])], ids=repr)
def test_a_mask_is_no_list_of_numbers(bank: DemonstrationBank, mask: Any) -> None:
    with pytest.raises(ValueError, match="taken by number; got the truth values"):
        bank[mask]
    with pytest.raises(ValueError, match=r"by lists .*; expected numbers or keys"):
        bank.choose(k=2, by=mask)


def test_whole_numbers_of_arrays_are_numbers(bank: DemonstrationBank) -> None:
    for demos in (bank, bank.fused):
        for index in (np.int64(1), torch.tensor(1), np.array([1]), torch.tensor([-8])):
            assert demos[index].keys == demos[1].keys
        with pytest.raises(IndexError):
            demos[np.int64(9)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balanced": "false"}, "balanced='false': expected True or False"),
        *(({"near_duplicate": v}, f"near_duplicate={v}: expected a cosine") for v in (True, 98, 0, float("nan"))),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(llava: Plugin, bank: DemonstrationBank, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bank.choose(k=2, **options)
    with pytest.raises(ValueError, match=message):
        llava.answer(llava.query(), bank, shots=2, select={"by": "random", **options})


def test_near_duplicates_are_left_out_while_there_are_others(llava: Plugin, tmp_path: Path) -> None:
    def nearly(image: Image.Image, by: int) -> Image.Image:
        return Image.fromarray(np.clip(np.asarray(image).astype(int) + by, 0, 255).astype(np.uint8))

    same = [{"image": nearly(picture(1), by), "text": "a dax lies there, see."} for by in (0, 1, 2)]
    others = [{"image": picture(seed), "text": "a dax lies there, see."} for seed in (2, 3, 4)]
    named = {"image": picture(1), "text": "quite another thing that somebody says about it."}
    bank = DemonstrationBank.build(llava.model, [*same, *others, named], tmp_path)
    chosen = numbers(bank.choose(picture(1), 5, by="image"))
    assert len({0, 1, 2} & set(chosen)) == 1 and chosen[-1] in (0, 1, 2, 6)
    assert 6 in chosen, "another text about the same image is no duplicate"
    assert len(set(numbers(bank.choose(picture(1), 7, by="image")))) == 7  # then there are no others
    assert len({0, 1, 2} & set(numbers(bank.choose(picture(1), 4, by="image", near_duplicate=None)))) == 3
    for seed in range(5):
        assert len({0, 1, 2} & set(numbers(bank.choose(k=5, seed=seed)))) == 1


QUESTIONS = ("which colour has the thing on the table ?", "does it rain in the far north today ?")


def test_mmices_takes_texts_among_the_most_alike_images(llava: Plugin, tmp_path: Path) -> None:
    demos = [(picture(seed), question, f"number {seed}") for seed in range(6) for question in QUESTIONS]
    bank = DemonstrationBank.build(llava.model, demos, tmp_path)
    for seed in range(6):
        for asked in (0, 1):
            query = {"image": picture(seed), "question": QUESTIONS[asked]}
            chosen = numbers(bank.choose(query, 2, by="mmices"))
            pool = numbers(bank.choose(query, 8, by="image", near_duplicate=None))
            assert set(chosen) < set(pool), "not among the 4 k most similar images"
            assert all(number % 2 == asked for number in chosen), "another question is asked"
            assert chosen[-1] == 2 * seed + asked
    assert all(number % 2 == 0 for number in numbers(bank.choose(QUESTIONS[0], 6, by="text", near_duplicate=None)))


def test_mmices_keeps_the_order_of_the_images_where_texts_do_not_differ(
    llava: Plugin, bank: DemonstrationBank, tmp_path: Path
) -> None:
    asked = DemonstrationBank.build(
        llava.model, [(picture(seed), QUESTIONS[0], NAMES[seed % 3]) for seed in range(9)], tmp_path
    )
    for seed in range(12):
        for one in (bank, asked):  # names, where nothing is asked; and the same question each time
            query = {"image": picture(seed), "question": QUESTIONS[0]}
            assert numbers(one.choose(query, 4, by="mmices")) == numbers(one.choose(query, 4, by="image"))
    assert len({numbers(bank.choose((picture(seed), "a ?"), 1, by="mmices"))[0] for seed in range(9)}) == 9


def test_mmices_compares_questions_with_questions_alone(llava: Plugin, tmp_path: Path) -> None:
    captions = [(picture(seed), f"this is {NAMES[seed % 3]} number {seed} .") for seed in range(6)]
    bank = DemonstrationBank.build(llava.model, captions, tmp_path / "captions")
    for seed in range(9):
        for question in (*QUESTIONS, "this is dax ."):
            query = {"image": picture(seed), "question": question}
            assert numbers(bank.choose(query, 3, by="mmices")) == numbers(bank.choose(query, 3, by="image"))
    asked = [(picture(seed), question, f"number {seed}") for seed in (7, 8) for question in QUESTIONS]
    names = [{"image": picture(9), "label": "dax"}, {"image": picture(10), "label": "wug"}]
    mixed = DemonstrationBank.build(
        llava.model, [*captions, *names, *asked], tmp_path / "mixed", batch_size=5, shard_bytes=1
    )
    for one in (mixed, DemonstrationBank.from_pretrained(tmp_path / "mixed", llava.model)):
        alike, others = ([8, 10], [9, 11]), set(range(8))
        for asks in (0, 1):
            query = {"image": picture(20 + asks), "question": QUESTIONS[asks]}
            found = numbers(one.choose(query, 12, by="mmices", balanced=False, near_duplicate=None))
            assert set(found[-2:]) == set(alike[asks]) and set(found[:2]) == set(alike[1 - asks])
            by_image = numbers(one.choose(query, 12, by="image", balanced=False, near_duplicate=None))
            assert found[2:-2] == [number for number in by_image if number in others]
    mixed.save_pretrained(tmp_path / "copy", shard_bytes=10**9)
    copy = DemonstrationBank.from_pretrained(tmp_path / "copy", llava.model)
    assert numbers(copy.choose(query, 9, by="mmices")) == numbers(mixed.choose(query, 9, by="mmices"))


def test_what_a_query_must_have(bank: DemonstrationBank, llava: Plugin) -> None:
    for call, message in (
        (lambda: bank.choose(picture(1), 10, by="image"), "k=10 demonstrations were asked of a bank that has 9"),
        (lambda: bank.choose(picture(1), 0, by="image"), "k=0"),
        (
            lambda: bank.choose("What is this?", 2, by="image"),
            "Query 0 of 1 has no image, but images are compared",
        ),
        (lambda: bank.choose(picture(1), 2, by="text"), "Query 0 of 1 has no words"),
        (lambda: bank.choose(picture(1), 2, by="clip"), "by='clip': expected one of random, image, text"),
        (lambda: bank.choose(picture(1), 2, by=None), "by=None: expected one of random, .* list of numbers"),
        (lambda: DemonstrationBank(llava.model.read([])).choose(), "This bank is empty"),
        (lambda: DemonstrationBank.from_pretrained(bank.folder).choose(picture(1), 2, by="image"), "knows no model"),
        (
            lambda: DemonstrationBank(llava.model.read(DEMOS)).choose(picture(1), 2, by="image", model=llava.model),
            "no image features.*DemonstrationBank.build",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_bank_without_features_is_chosen_from_by_fused_tokens(llava: Plugin, bank: DemonstrationBank) -> None:
    read = DemonstrationBank(llava.model.read(DEMOS))
    query = {"image": picture(5), "question": "This is blicket."}
    assert numbers(read.choose(query, 9, by="fused", model=llava.model)) == numbers(bank.choose(query, 9, by="fused"))


def test_demonstrations_without_images_come_last(llava: Plugin, tmp_path: Path) -> None:
    demos = [
        {"text": "only words, no image."},
        *[{"image": picture(s), "text": f"it is {s} of them."} for s in (1, 2)],
    ]
    bank = DemonstrationBank.build(llava.model, demos, tmp_path)
    assert numbers(bank.choose(picture(2), 3, by="image")) == [0, 1, 2]


# --- for each row of a batch


def test_each_row_gets_what_is_chosen_for_it(aim: Plugin, tmp_path: Path) -> None:
    bank = DemonstrationBank.build(aim.model, DEMOS, tmp_path)
    inputs = aim.query("What is this?", "And what is that one there?", image=3)
    for by in ("image", "text", "fused", "mmices"):
        found = aim.answer(inputs, bank, shots=2, select=by)
        features = bank.query_features(inputs, by)
        rows = [bank.select({kind: one[row] for kind, one in features.items()}, 2, by) for row in range(2)]
        assert torch.equal(found, aim.answer(inputs, rows))
        if by == "image":
            assert [row.texts[-1] for row in rows] == ["This is dax.", "This is wug."]  # pictures 3 and 4
    assert torch.equal(
        aim.answer(inputs, bank, shots=3, select={"by": "random", "seed": 5}),
        aim.answer(inputs, bank.select(k=3, seed=5)),
    )
    assert torch.equal(aim.answer(inputs, bank, shots=2, select=[7, 1]), aim.answer(inputs, bank[[7, 1]]))
    assert torch.equal(aim.answer(inputs, [bank, None], shots=2), aim.answer(inputs, [bank.select(k=2), None]))
    assert torch.equal(aim.answer(inputs, bank, select="image"), aim.answer(inputs, bank, shots=8, select="image"))


def test_a_row_without_a_bank_needs_nothing_that_is_compared(aim: Plugin, tmp_path: Path) -> None:
    bank = DemonstrationBank.build(aim.model, DEMOS, tmp_path)
    prompts = [aim.processor.prompt("What is this?"), aim.processor.prompt("What is it?", images=0)]
    inputs = dict(aim.processor(images=[[picture(3)], []], text=prompts, padding=True, return_tensors="pt"))
    alone = aim.query(image=3)
    chosen = bank.select({kind: one[0] for kind, one in bank.query_features(alone, "image").items()}, 2, "image")
    found = aim.answer(inputs, [bank, None], shots=2, select="image")
    assert torch.equal(found, aim.answer(inputs, [chosen, None]))
    with pytest.raises(ValueError, match="Query 1 of 2 has no image"):
        aim.answer(inputs, bank, shots=2, select="image")


def test_a_list_is_used_whole_unless_shots_are_given(llava: Plugin, bank: DemonstrationBank) -> None:
    inputs = llava.query()
    for select in ([7, 1, 4], {"by": [7, 1, 4]}):
        assert torch.equal(llava.answer(inputs, bank, select=select), llava.answer(inputs, bank[[7, 1, 4]]))
        assert torch.equal(llava.answer(inputs, bank, shots=2, select=select), llava.answer(inputs, bank[[7, 1]]))


def test_a_query_is_compared_alone_as_in_a_padded_batch(aim: Plugin, tmp_path: Path) -> None:
    bank = DemonstrationBank.build(aim.model, DEMOS, tmp_path)
    both = aim.query("What is this?", "And what is that one there, the small one?", image=3)
    for by in ("image", "text", "fused"):
        alone = bank.query_features(aim.query("What is this?", image=3), by)[by]
        torch.testing.assert_close(bank.query_features(both, by)[by][:1], alone, rtol=1e-3, atol=1e-3)
    seen = bank.query_features(aim.query("What is this?", image=3), "image")["image"]
    kept = torch.cat([shard.feature("image") for shard in bank._shards])[3].float()
    assert float(seen[0] @ kept) > 0.999


def test_shots_ask_for_a_bank(llava: Plugin, bank: DemonstrationBank) -> None:
    inputs = llava.query()
    three, empty = (DemonstrationBank(llava.model.read(demos)) for demos in (DEMOS[:3], []))
    for call, message in (
        (lambda: llava.answer(inputs, llava.model.read(DEMOS), shots=2), "choose from a DemonstrationBank"),
        (lambda: llava.answer(inputs, None, shots=2), "choose from a DemonstrationBank"),
        (lambda: llava.answer(inputs, bank, shots=20, select="image"), "shots=20 demonstrations were asked"),
        (
            lambda: llava.answer(inputs, three, select="random"),
            r"shots=8 \(the default of a strategy\) demonstrations were asked of a bank that has 3",
        ),
        (
            lambda: llava.answer(inputs, empty, shots=2),
            "a DemonstrationBank that is empty",
        ),
        (lambda: llava.answer(inputs, bank, shots=[3]), r"shots=\[3\] demonstrations were asked for; expected"),
        (lambda: llava.answer(inputs, bank, select="nearest"), "by='nearest'"),
        (
            lambda: llava.answer(inputs, bank, select={"by": "image", "k": 2}),
            r"the keys \['k'\]; known are by, .*shots=",
        ),
        (lambda: llava.answer(llava.query(image=None), bank, select="image"), "Query 0 of 1 has no image"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_a_whole_bank_that_no_prompt_holds_is_not_loaded() -> None:
    aim = plugin("llava", max_fused_tokens=None)
    fused = aim.model.read(DEMOS)
    count = aim.backbone.config.get_text_config().max_position_embeddings // fused.num_tokens * 9 + 9
    large = DemonstrationBank(fused[[i % 9 for i in range(count)]])
    with pytest.raises(ValueError, match=r"The bank's \d+ demonstrations .* shots=8, select=.*bank\[:8\]"):
        aim.answer(aim.query(), large)
    assert aim.answer(aim.query(), large, shots=2).shape == (1, 6)


# --- the arithmetic


def slowly(scores: list[float], k: int, labels: list[int] | None) -> list[int]:
    """What `pick` means, written plainly."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    turn = {i: sum(labels is not None and labels[j] == labels[i] for j in order[: order.index(i)]) for i in order}
    chosen = sorted(order, key=lambda i: (turn[i], -scores[i]))[:k]
    return sorted(chosen, key=lambda i: scores[i])


def test_picking_is_the_plain_definition() -> None:
    draw = random.Random(0)
    for _ in range(200):
        count = draw.randint(1, 30)
        scores = draw.sample(range(1000), count)
        labels = draw.choice([None, [draw.randint(0, 4) for _ in range(count)]])
        k = draw.randint(1, count)
        given = None if labels is None else Groups(torch.tensor(labels, dtype=torch.int32))
        assert pick(torch.tensor(scores, dtype=torch.float32), k, given, never) == slowly(scores, k, labels)


def test_a_sketch_keeps_who_is_alike() -> None:
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(40, 4096, generator=generator)
    wide[1:5] = wide[0] + 0.5 * torch.randn(4, 4096, generator=generator)
    small = sketched(wide, 512)
    assert small.shape == (40, 512)
    exact = torch.nn.functional.normalize(wide) @ torch.nn.functional.normalize(wide).T
    assert float((small @ small.T - exact).abs().max()) < 0.2
    assert set((small @ small[0]).topk(5).indices.tolist()) == {0, 1, 2, 3, 4}
    assert torch.equal(small, sketched(wide, 512))
    assert sketched(wide[:, :8], 512).shape == (40, 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_comparing_in_blocks_is_the_plain_definition(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr("modeling_aim.bank.select.BLOCK", 7 * 32)
    features = torch.nn.functional.normalize(3 + torch.randn(50, 32, generator=torch.Generator().manual_seed(0)))
    features[[4, 30]] = 0.0
    features = features.to(dtype)
    there = [i for i in range(50) if i not in (4, 30)]
    mean = features[there].double().mean(dim=0)
    centred = torch.nn.functional.normalize(features.double() - mean)
    query = torch.nn.functional.normalize(features[7] + 0.3 * features[9], dim=0).float()
    wanted = centred @ torch.nn.functional.normalize(query.double() - mean, dim=0)
    wanted[[4, 30]] = -2.0
    like = SimilarityIndex(features.split((20, 0, 30)))
    torch.testing.assert_close(like.scores(query).double(), wanted, rtol=0, atol=1e-5)
    torch.testing.assert_close(like.scores(query, among=[30, 8, 21]).double(), wanted[[30, 8, 21]], rtol=0, atol=1e-5)
    torch.testing.assert_close(like.alike(7, [9, 4]).double(), centred[[9, 4]] @ centred[7] * torch.tensor([1, 0]))
    assert like.alike(4, [30]).tolist() == [1.0]


def test_features_that_all_are_the_same_tell_nothing_apart() -> None:
    same = torch.nn.functional.normalize(torch.ones(6, 8) + 1e-5 * torch.randn(6, 8)).half()
    like = SimilarityIndex([same])
    assert like.scores(torch.randn(8)).tolist() == [0.0] * 6
    assert like.alike(0, [1, 2]).tolist() == [1.0, 1.0]


def test_faiss_finds_what_torch_finds() -> None:
    features = torch.nn.functional.normalize(torch.randn(500, 32, generator=torch.Generator().manual_seed(0)))
    like = SimilarityIndex(features.split((200, 300)))
    query = features[7] + 0.1 * features[9]
    found, exact = like.nearest(query, 20), like.scores(query)
    assert torch.equal(found.topk(20).indices, exact.topk(20).indices)
    torch.testing.assert_close(found.topk(20).values, exact.topk(20).values, rtol=1e-4, atol=1e-5)
    assert int((found == NOT_COMPARED).sum()) == 480


def test_faiss_can_be_asked_for_and_is_taken_for_large_banks(
    bank: DemonstrationBank, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, options = {"image": picture(30), "question": "What is this?"}, {"k": 4, "balanced": False}
    for by in ("image", "fused"):
        exact = bank.choose(query, by=by, search="torch", **options)
        assert bank.similarity(by).index is None and bank.choose(query, by=by, **options) == exact
        assert bank.similarity(by).index is None, "of nine demonstrations an index is made only when asked for"
        found = bank.choose(query, by=by, search="faiss", **options)
        assert bank.similarity(by).index is not None and numbers(found) == numbers(exact)
        assert [score for _, score in found] == pytest.approx([score for _, score in exact], abs=1e-4)
        bank.similarity(by).index = None
    monkeypatch.setattr("modeling_aim.bank.choosing.FAISS_FROM", 9)
    large = bank.choose(query, by="image", **options)
    assert numbers(large) == numbers(bank.choose(query, by="image", search="torch", **options))
    assert bank.similarity("image").index is not None
    bank.similarity("image").index = None
    bank.choose(query, 4, by="image")
    bank.choose(query, by="image", search="torch", **options)
    assert bank.similarity("image").index is None, "labels in turn are searched in torch"


def test_faiss_that_cannot_be_used_is_an_error_only_when_asked_for(
    llava: Plugin, bank: DemonstrationBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, options = {"image": picture(1), "question": "What is this?"}, {"balanced": False, "search": "faiss"}
    for by in ("random", "mmices", [1, 2]):
        with pytest.raises(ValueError, match="finds nearest neighbours by one of image, text, fused; got by="):
            bank.choose(query, 2, by=by, **options)
    with pytest.raises(ValueError, match=r"labels are to be taken in turn.*balanced=False"):
        bank.choose(query, 2, by="image", search="faiss")
    with pytest.raises(ValueError, match="search='annoy': expected one of auto, torch, faiss"):
        bank.choose(query, 2, by="image", search="annoy")
    with pytest.raises(ValueError, match="finds nearest neighbours by one of image, text, fused"):
        llava.answer(llava.query(), bank, shots=2, select={"by": "mmices", "search": "faiss"})
    words = [{"text": "only words, no image."}, {"image": picture(1), "text": "it is one of them."}]
    partly = DemonstrationBank.build(llava.model, words, tmp_path)
    with pytest.raises(ValueError, match=r"cannot be used .*have no such feature"):
        partly.choose(query, 1, by="image", **options)
    monkeypatch.setattr("modeling_aim.bank.choosing.FAISS_FROM", 1)
    assert numbers(partly.choose(query, 2, by="image")) == [0, 1]
    monkeypatch.setitem(sys.modules, "faiss", None)  # as where it is not installed
    with pytest.raises(ValueError, match=r"cannot be used .*faiss.*modeling-aim\[bank\]"):
        bank.choose(query, 2, by="image", **options)
    assert bank.choose(query, 1, by="image", balanced=False)[0][0] == 1
