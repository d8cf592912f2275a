"""A bank through any sequence of builds, saves, kills at counted events, damage and reopening: never wrong content."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from backbones import Plugin, plugin
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from modeling_aim import DemonstrationBank
from modeling_aim.bank.manifest import BANK_MANIFEST, PARTS_FOLDER

TEXTS = [f"the thing number {number} lies here." for number in range(9)]
BAD = {"text": "b " * 3000}  # longer than the backbone
OPTIONS: dict[str, Any] = {"batch_size": 2, "shard_bytes": 8_000, "keep_states": True}
EVENTS = (
    "replace",
    "fsync",
    "unlink",
    "mkdir",
    "rmdir",
    "open",
)  # of the file system, in which a process may be killed


class Killed(BaseException):
    """The process is gone: what it was doing ends there."""


@contextmanager
def killed_at(event: int | None) -> Iterator[None]:
    """Kill what runs in the block before its `event`-th change of the file system: from then on it changes nothing."""
    count = 0
    real = {name: getattr(os, name) for name in EVENTS}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            changes = name != "open" or (len(args) > 1 and args[1] & os.O_CREAT)
            count += bool(changes)
            if changes and event is not None and count >= event:
                raise Killed
            return real[name](*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in EVENTS:
            patch.setattr(os, name, counted(name))
        with suppress(Killed):
            yield


class Bank(RuleBasedStateMachine):
    """One folder, and what may be in it."""

    model: Plugin
    wanted: dict[str, torch.Tensor]

    @classmethod
    def setup_class(cls) -> None:
        if not hasattr(cls, "model"):
            cls.model = plugin("llava")
            read = cls.model.model.read([{"text": text} for text in TEXTS])
            cls.wanted = {one.texts[0]: one.vectors for one in read}

    def __init__(self) -> None:
        super().__init__()
        self.setup_class()
        self.scratch = Path(tempfile.mkdtemp())
        self.folder = self.scratch / "bank"
        self.known: set[str] = set()  # texts that a bank in the folder may hold
        self.sure: set[str] = set()  # texts that it must hold: no kill and no damage since they were written
        self.damaged = False

    def teardown(self) -> None:
        shutil.rmtree(self.scratch)

    @initialize()
    def nothing_yet(self) -> None:
        with pytest.raises(FileNotFoundError):
            DemonstrationBank.from_pretrained(self.folder)

    def opened(self, damaged: str = "raise") -> DemonstrationBank:
        return DemonstrationBank.from_pretrained(self.folder, self.model.model, damaged=damaged)

    def check(self, bank: DemonstrationBank, damage: bool = False) -> set[str]:
        """All that a bank gives is right; of a damaged one parts may be refused."""
        found = set()
        for number in range(len(bank)):
            try:
                one = bank[number]
            except ValueError:
                assert damage
                continue
            text = one.texts[0]
            assert text in self.known
            torch.testing.assert_close(one.vectors, self.wanted[text], rtol=1e-3, atol=1e-3)
            found.add(text)
        assert len(bank) == len({*bank.keys()}), "a demonstration is there twice"
        return found

    @rule(count=st.integers(1, len(TEXTS)), bad=st.booleans(), kill=st.one_of(st.none(), st.integers(1, 40)))
    def build(self, count: int, bad: bool, kill: int | None) -> None:
        """Build, extend or resume: the first `count` demonstrations, maybe with a bad row among them."""
        rows: list[Any] = [{"text": text} for text in TEXTS[:count]]
        rows[1:1] = [BAD] * bad
        before = set(self.known)
        self.known |= set(TEXTS[:count])
        bank = None
        try:
            with killed_at(kill):
                bank = DemonstrationBank.build(self.model.model, rows, self.folder, **OPTIONS)
        except ValueError as error:  # a saved bank has no settings to resume with; damage is named
            assert self.damaged or "was begun with" in str(error), error
            self.known = before if "was begun with" in str(error) else self.known
            return
        if bank is None:
            return  # killed: what was complete stays
        assert [row.number for row in bank.bad_rows] == [1] * bad
        self.sure |= set(TEXTS[:count])
        if not self.damaged:
            bank.verify()
            assert self.check(bank) >= self.sure and not (self.folder / PARTS_FOLDER).exists()

    @precondition(lambda self: self.sure and not self.damaged)
    @rule(
        chosen=st.lists(st.integers(0, 8), min_size=1, max_size=4, unique=True),
        storage=st.sampled_from(["auto", "float32"]),
        kill=st.one_of(st.none(), st.integers(1, 20)),
    )
    def save(self, chosen: list[int], storage: str, kill: int | None) -> None:
        """Put another bank in the folder's place: some of what is there, in another order."""
        bank = self.opened()
        part = DemonstrationBank(bank[[number % len(bank) for number in dict.fromkeys(n % len(bank) for n in chosen)]])
        old, new = self.check(bank), set(part.texts())
        done = False
        with killed_at(kill):
            part.save_pretrained(self.folder, storage=storage, shard_bytes=1)
            done = True
        now = self.check(self.opened())
        assert now == new if done else now in (old, new)
        self.sure = now

    @precondition(lambda self: self.sure and not self.damaged)
    @rule(kill=st.one_of(st.none(), st.integers(1, 20)))
    def reproject(self, kill: int | None) -> None:
        bank = self.opened()
        if not bank.has_states:
            with pytest.raises(ValueError, match="keeps no hidden states"):
                bank.reproject(self.model.model, self.folder)
            return
        with killed_at(kill):
            bank.reproject(self.model.model, self.folder)
        assert self.check(self.opened()) >= self.sure

    @precondition(lambda self: self.folder.exists())
    @rule(which=st.integers(0, 30), at=st.floats(0, 1), how=st.sampled_from(["flip", "cut", "remove"]))
    def damage(self, which: int, at: float, how: str) -> None:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file() and path.name != "README.md")
        if not files:
            return
        path = files[which % len(files)]
        raw = path.read_bytes()
        place = min(int(at * len(raw)), max(len(raw) - 1, 0))
        if how == "remove" or not raw:
            path.unlink()
        elif how == "cut":
            path.write_bytes(raw[:place])
        else:
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 16]) + raw[place + 1 :])
        self.damaged, self.sure = True, set()

    @precondition(lambda self: self.damaged)
    @rule()
    def start_again(self) -> None:
        """What the messages say: build again, elsewhere or in an empty folder."""
        shutil.rmtree(self.folder)
        self.known, self.sure, self.damaged = set(), set(), False

    @rule(damaged=st.sampled_from(["raise", "skip"]))
    def reopen(self, damaged: str) -> None:
        try:
            bank = self.opened(damaged)
        except FileNotFoundError:
            assert not (self.folder / BANK_MANIFEST).exists() or self.damaged
        except ValueError:
            assert self.damaged
        else:
            assert self.check(bank, self.damaged) >= self.sure

    @rule(by=st.sampled_from(["random", "text", "fused"]), k=st.integers(1, 4))
    def select(self, by: str, k: int) -> None:
        try:
            bank = self.opened("skip")
            chosen = bank.select("the thing number 2 ?", k, by)
        except (ValueError, FileNotFoundError):
            return  # too few, no such features, or damaged: `reopen` says whether that may be
        assert len(chosen) == k == len(set(chosen.keys)) and set(chosen.texts) <= self.known

    @invariant()
    def nothing_is_left_of_a_bank_that_is_whole(self) -> None:
        if self.sure and not self.damaged:
            assert (self.folder / BANK_MANIFEST).exists()


@pytest.mark.timeout(900)
def test_a_bank_is_never_wrong() -> None:
    Bank.TestCase.settings = settings(
        max_examples=40, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
    )
    Bank.TestCase().runTest()
