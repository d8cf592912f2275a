"""Rows of a stream as demonstrations: opened one at a time; bad ones are named, counted and left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from transformers.utils import logging

from ..demonstrations_aim import DEMONSTRATION_KEYS, READ_LINES, Demonstration
from ..images_aim import ImageRules, is_address

logger = logging.get_logger(__name__)

ON_BAD_ROW = ("skip", "raise")


class BadRow(NamedTuple):
    """A row that is not a demonstration, or that the model cannot read, and why."""

    number: int
    reason: str


class BadRows:
    """The bad rows of a stream.

    Args:
        on_bad_row: `"skip"` leaves bad rows out with a warning; `"raise"` makes the first one an error.
        limit: how many are left out before the stream is given up.

    Raises:
        ValueError: an argument is wrong.
    """

    def __init__(self, on_bad_row: str = "raise", limit: int = 0) -> None:
        if on_bad_row not in ON_BAD_ROW:
            raise ValueError(f"on_bad_row={on_bad_row!r:.40}: expected one of {', '.join(ON_BAD_ROW)}.")
        self.on_bad_row, self.limit = on_bad_row, limit
        self.rows: list[BadRow] = []

    def add(self, number: int, reason: str, cause: Exception | None = None) -> None:
        """Note a bad row, counted from 0.

        Raises:
            ValueError: bad rows are errors, or there are too many of them.
        """
        if self.on_bad_row == "raise":
            raise ValueError(f"Row {number}: {reason} What came before it is kept in the bank.") from cause
        self.rows.append(BadRow(number, reason))
        logger.warning(f"Row {number} is left out: {reason}")
        if len(self.rows) > self.limit:
            raise ValueError(
                f"{len(self.rows)} rows are bad, more than max_bad_rows={self.limit}; the last is row {number}: "
                f"{reason} What was read is kept in the bank."
            ) from cause

    def finish(self, good: bool) -> None:
        """Say how many rows were left out.

        Args:
            good: there was a row that could be used.

        Raises:
            ValueError: every row is bad.
        """
        if self.rows and not good:
            number, reason = self.rows[0]
            raise ValueError(f"All {len(self.rows)} rows are bad; row {number}: {reason}")
        if self.rows:
            logger.warning(f"{len(self.rows)} bad rows were left out.")


def open_rows(
    demos: Iterable[Any],
    columns: Mapping[str, str] | None,
    bad: BadRows | None = None,
    rules: ImageRules | None = None,
) -> Iterator[tuple[int, Demonstration]]:
    """Number and demonstration of each good row of a stream, opened one at a time.

    Of a row of a `datasets` dataset (or any row, where `columns` are given) the named columns are taken, numbers of
    classes as the classes' names. Images of a dataset are opened here, within `rules`, and not by `datasets`.

    Args:
        demos: the stream.
        columns: which column is which part of a demonstration.
        bad: takes the bad rows; where `None`, the first one is an error.
        rules: which images may be opened.

    Raises:
        ValueError: a row is not a demonstration and bad rows are errors, or a dataset has no column that is part of
            one; the message says which.
    """
    if isinstance(demos, (str, bytes, Mapping)):
        how = f" {READ_LINES.format(demos)}" if isinstance(demos, str) else ""
        raise ValueError(f"A bank is built from a stream of demonstrations; got {demos!r:.80}.{how}")
    kinds = getattr(demos, "features", None)
    kinds = kinds if isinstance(kinds, Mapping) else {}
    if columns is None and kinds:
        columns = {name: name for name in kinds if name in DEMONSTRATION_KEYS}
        if not columns:
            raise ValueError(
                f"The dataset has the columns {sorted(kinds)}, none of {sorted(DEMONSTRATION_KEYS)}. Say which is "
                'which, e.g. columns={"image": "img", "label": "fine_label"}.'
            )
    bad = BadRows() if bad is None else bad
    rules = rules or ImageRules()
    for number, row in enumerate(_undecoded(demos) if kinds else demos):
        try:
            demo = _opened(row, columns, kinds, rules)
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            bad.add(number, str(error), error)
        else:
            yield number, demo


def _undecoded(data: Any) -> Iterable[Any]:
    """A `datasets` dataset whose images are files: decoded by `datasets`, one that is bad would end the stream."""
    streamed = data.to_iterable_dataset() if hasattr(data, "to_iterable_dataset") else data
    return streamed.decode(False) if hasattr(streamed, "decode") else data


def _opened(
    row: object, columns: Mapping[str, str] | None, kinds: Mapping[str, Any], rules: ImageRules
) -> Demonstration:
    if columns is None or not isinstance(row, Mapping):
        demo = Demonstration.of(row, rules)
    else:
        missing = [name for name in columns.values() if name not in row]
        if missing:
            raise ValueError(f"It has no column {missing[0]!r}; it has {sorted(map(str, row))}. Check columns=.")
        taken = {part: _named(kinds.get(name), row[name]) for part, name in columns.items()}
        taken |= {part: _file(taken[part], rules) for part in ("image", "images") if part in taken}
        try:
            demo = Demonstration.of(taken, rules)
        except ValueError as error:
            raise ValueError(f"{error} Of each row {columns} were taken; columns= takes others.") from error
    for text in (demo.text, demo.question or ""):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Its text {text!a:.80} cannot be written as UTF-8 ({error.reason}).") from error
    return demo


def _file(image: object, rules: ImageRules) -> Any:
    """An image, or several, as `Demonstration` takes it, of what a dataset holds: `{"bytes": ..., "path": ...}`."""
    if isinstance(image, (list, tuple)):
        return [_file(item, rules) for item in image]
    if isinstance(image, Mapping) and set(image) == {"bytes", "path"}:
        image = image["bytes"] or image["path"]
    if isinstance(image, str) and "://" in image and not is_address(image) and rules.sources == "any":
        import fsspec  # as datasets does, for a place in a dataset that is streamed, such as hf:// and zip://

        try:
            with fsspec.open(image, "rb") as file:
                return file.read()
        except Exception as error:
            raise ValueError(f"Cannot read the image {image!r:.120} ({type(error).__name__}: {error}).") from error
    return image


def _named(kind: object, value: object) -> Any:
    """The name of a class where a column holds its number."""
    return kind.int2str(value) if hasattr(kind, "int2str") and isinstance(value, int) else value
