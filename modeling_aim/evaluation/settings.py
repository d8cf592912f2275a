"""What one evaluation takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..bounds import check_least
from ..runs import PRECISIONS
from .choosing import Choice
from .methods import BY_DEFAULT, METHODS, PROMPTS, check_methods, method_of


@dataclass(frozen=True)
class EvalSettings:
    """What `aim eval` takes.

    Args:
        tasks: tasks to evaluate on, `KIND[:PATH][,name=value...]`; plain names may be given as one list with commas.
        output: folder for predictions, results, table and pictures.
        repo: AIM repository: a folder or a Hub id.
        backbone: instead of `repo`, a model to evaluate without AIM.
        shots: numbers of demonstrations. At 0 all methods are the same: that is answered once, as `zero`.
        methods: of zero, text, full, aim, aim-shuffled, aim-random, aim-untrained and aim-untrained-shuffled (the
            last two also with :depth=K), by default all of these that the model can do; and of prefix-kv, text-kv,
            text-kv-together, parallel-icl, fastv, catp, snapkv, emloc and task-vector, with settings as in
            snapkv:ratio=.5:window=16.
        seeds: number of seeds: 0, 1, ... decide demonstrations, and examples where a task draws them.
        select: selection strategy for demonstrations: random, image, text, fused, mmices, or fixed:FILE.
        balanced: take labels in turn.
        drop_duplicates: leave out images that are nearly the query's, or another demonstration's.
        prompts: how prompts are written: plain, or chat, through the backbone's chat template.
        separator: what ends a demonstration of a plain prompt.
        skip_too_long: leave out methods that need more tokens than the backbone has positions, where they do, rather
            than answer beyond them.
        limit: examples of each task that are answered, drawn once for all seeds; by default all.
        revision: revision of the repository or backbone.
        dtype: precision of the backbone: bfloat16, float16 or float32; by default its own.
        load_in_4bit: load the backbone in 4-bit, for a laptop.
        device_map: where the backbone goes, such as "auto" or "cuda".
        image_settings: settings of the backbone's image processor by its own names, such as max_pixels=200704 or
            do_image_splitting=false: how many tokens an image is.
        batch_size: prompts answered together.
        images_at_once: most images in one batch, unless one prompt alone has more.
        memory: GiB of demonstrations' hidden states that are kept.
        overwrite: replace another run in the output folder.

    Raises:
        ValueError: a setting is wrong; the message has what was given and what is expected.
    """

    tasks: tuple[str, ...]
    output: str
    repo: str | None = None
    backbone: str | None = None
    shots: tuple[int, ...] = (0, 2, 4, 8, 16)
    methods: tuple[str, ...] = ()
    seeds: int = 3
    select: str = "random"
    balanced: bool = False
    drop_duplicates: bool = False
    prompts: str = "plain"
    separator: str = "\n"
    skip_too_long: bool = False
    limit: int | None = None
    revision: str | None = None
    dtype: str | None = None
    load_in_4bit: bool = False
    device_map: str | None = None
    image_settings: dict[str, Any] = field(default_factory=dict)
    batch_size: int = 8
    images_at_once: int = 64
    memory: float = 2.0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if (self.repo is None) == (self.backbone is None):
            raise ValueError(
                "Give an AIM repository (repo) or a model to evaluate without AIM (backbone), one of them."
            )
        if not self.tasks or len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks={self.tasks}: expected one or more, each once.")
        if not self.shots or min(self.shots) < 0 or len(set(self.shots)) < len(self.shots):
            raise ValueError(f"shots={self.shots}: expected numbers from 0 up, each once.")
        check_least(self, 1, "seeds", "batch_size", "images_at_once", "limit")
        check_least(self, 0, "memory")
        for name, known in (("dtype", (None, *PRECISIONS)), ("prompts", PROMPTS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of {known}.")
        _ = self.choice
        if self.select == "fused" and self.repo is None:
            raise ValueError("select='fused' compares fused tokens, so it needs an AIM repository (repo).")
        if not self.methods:
            can = [name for name in BY_DEFAULT if self.repo is not None or not METHODS[name].needs_aim]
            object.__setattr__(self, "methods", tuple(can))
        check_methods(self.methods, self.repo is not None)
        if not any(self.shots) and any(method_of(name).shots for name in self.methods):
            object.__setattr__(self, "methods", ("zero",))

    @property
    def choice(self) -> Choice:
        """How demonstrations are chosen."""
        return Choice(self.select, self.balanced, self.drop_duplicates)

    @property
    def counts(self) -> list[int]:
        """Numbers of demonstrations that are shown, the smallest first."""
        shows_any = any(method_of(name).shots for name in self.methods)
        return sorted(count for count in self.shots if count) if shows_any else []
