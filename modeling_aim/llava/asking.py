"""Many requests to a text model: some at once, failures asked again later, within a budget, every answer kept.

Answers are kept in a jsonl file, each on disk before the next step; after a kill they are not asked for again.
"""

from __future__ import annotations

import heapq
import random
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..bounds import check_least_options
from ..data.jsonl import append_lines, cut_torn_line, numbered_json
from ..progress import show_progress
from .text_model import Answer, EndpointModel, Failed, LocalModel, Request, TextModel

FIRST_WAIT = 1.0  # seconds before a request is asked again; doubled each time
MOST_WAIT = 60.0  # of these seconds
LONGEST_PAUSE = 900.0  # seconds that a server may ask to wait
ANSWERS = "answers.jsonl"


@dataclass(frozen=True, kw_only=True)
class AskingSettings:
    """Which text model is asked, and how.

    Args:
        model: chat model: a folder or a Hub id; with --endpoint the name that the endpoint knows.
        endpoint: address of an OpenAI-compatible endpoint, such as https://api.openai.com/v1; without it the model is
            loaded here by transformers.
        key_from: environment variable that holds the key of the endpoint; AIM_ENDPOINT_KEY by default. The key is
            written nowhere.
        concurrency: requests that are under way at once at an endpoint.
        retries: how often a request is asked again after a failure that may pass.
        timeout: seconds until a request is given up.
        max_requests: stop after so many requests, those of earlier starts included.
        max_total_tokens: stop before prompts and answers together have more tokens than this, earlier starts included.
        answer_tokens: most tokens of an answer.
        temperature: 0 takes the most likely token each time.
        dtype: precision of a model loaded here: bfloat16, float16 or float32; by default its own.
        device_map: where a model loaded here goes, such as "auto" or "cuda".
        dry_run: show what would be asked and its cost, and stop.
    """

    model: str | None = None
    endpoint: str | None = None
    key_from: str | None = None
    concurrency: int = 4
    retries: int = 5
    timeout: float = 120.0
    max_requests: int | None = None
    max_total_tokens: int | None = None
    answer_tokens: int = 1024
    temperature: float = 0.0
    dtype: str | None = None
    device_map: str | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        check_least_options(self, 1, "concurrency", "max_requests", "max_total_tokens", "answer_tokens")
        check_least_options(self, 0, "retries")
        if not self.timeout > 0:
            raise ValueError(f"--timeout {self.timeout}: expected seconds above 0.")
        if not 0 <= self.temperature <= 2:
            raise ValueError(f"--temperature {self.temperature}: expected 0 to 2.")

    def opened(self) -> TextModel:
        """The text model.

        Raises:
            ValueError: none is named, the key is missing, the address is none, or the model has no chat template.
            OSError: there is no such model.
        """
        if self.model is None:
            raise ValueError("--model must be given: a chat model, or with --endpoint its name there.")
        if self.endpoint is None:
            return LocalModel(self.model, self.dtype, self.device_map)
        return EndpointModel(self.model, self.endpoint, self.key_from, self.timeout)


class Ledger:
    """Every answer and failure of a run, in a jsonl file; a line is on disk when `add` returns.

    Args:
        path: the file. A last line that a kill cut off is taken away.

    Raises:
        ValueError: a line is damaged; the message has its number.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.answers: dict[str, Answer] = {}
        self.requests = self.tokens = 0
        if path.exists():
            cut_torn_line(path)
            for number, row in numbered_json(path):
                self._count(row, number)

    def _count(self, row: object, number: int) -> None:
        try:
            assert isinstance(row, dict)
            self.requests += 1
            if "answer" in row:
                answer = Answer(**row["answer"])
                self.answers[row["request"]] = answer
                self.tokens += answer.prompt_tokens + answer.answer_tokens
        except (AssertionError, KeyError, TypeError) as error:
            raise ValueError(
                f"{self.path}, line {number} is no answer of a text model. Restore the file, or give another --output."
            ) from error

    def add(self, request: Request, note: str, answer: Answer) -> None:
        """Keep an answer."""
        self.answers[request.digest] = answer
        self.tokens += answer.prompt_tokens + answer.answer_tokens
        self._write({"request": request.digest, "for": note, "answer": asdict(answer)})

    def add_failure(self, request: Request, note: str, failure: Failed) -> None:
        """Note that a request got no answer: it counts too."""
        self._write({"request": request.digest, "for": note, "failure": str(failure)})

    def _write(self, row: Mapping[str, object]) -> None:
        self.requests += 1
        append_lines(self.path, [row])


@dataclass(frozen=True)
class Costs:
    """What is about to be asked.

    Args:
        requests: different ones.
        kept: how many of them have an answer from an earlier start.
        prompt_tokens: of the others, estimated.
        answer_tokens: of the others, at most.
    """

    requests: int
    kept: int
    prompt_tokens: int
    answer_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.requests:,} requests, {self.kept:,} of them answered before; to ask: "
            f"{self.requests - self.kept:,}, with about {self.prompt_tokens:,} prompt tokens and at most "
            f"{self.answer_tokens:,} answer tokens."
        )


def costs_of(requests: Mapping[str, Request], ledger: Ledger) -> Costs:
    """What the requests will cost, by their names."""
    by_digest = {request.digest: request for request in requests.values()}
    open_requests = [request for digest, request in by_digest.items() if digest not in ledger.answers]
    prompts = sum(request.estimated_tokens for request in open_requests)
    return Costs(
        len(by_digest), len(by_digest) - len(open_requests), prompts, sum(r.max_tokens for r in open_requests)
    )


@dataclass
class Outcome:
    """The result of a run.

    Args:
        answers: by the name of the request.
        unanswered: why there is no answer, by the name of the request.
        stopped: why the run ended early; `None` where it did not.
    """

    answers: dict[str, Answer] = field(default_factory=dict)
    unanswered: dict[str, str] = field(default_factory=dict)
    stopped: str | None = None

    def reasons(self) -> Counter[str]:
        """How often each reason for no answer was given."""
        return Counter(self.unanswered.values())


class Stopped(OSError):
    """A run ended early; what was answered is kept."""


def _sentence(failure: Failed) -> str:
    """What happened, with a full stop."""
    text = str(failure)
    return text if text.endswith((".", "!", "?")) else text + "."


@dataclass(order=True)
class _Turn:
    """A request that waits to be asked.

    Args:
        due: moment from which it may be asked.
        number: its place in the run.
        attempt: from 0.
        successes: of the run, when it was asked first.
    """

    due: float
    number: int
    attempt: int = field(compare=False, default=0)
    successes: int | None = field(compare=False, default=None)


class Asking:
    """One run of requests to a text model.

    Args:
        model: answers.
        ledger: keeps the answers.
        settings: how many at once, how often again, the budget.
    """

    def __init__(self, model: TextModel, ledger: Ledger, settings: AskingSettings) -> None:
        self.model, self.ledger, self.settings = model, ledger, settings
        self.at_once = min(settings.concurrency, model.most_at_once or settings.concurrency)
        self.successes = 0
        self._paused_until = 0.0
        self._reserved: dict[int, int] = {}  # tokens that a request under way may take
        self._random = random.Random()

    def run(self, requests: Mapping[str, Request], what: str) -> Outcome:
        """Ask all that have no answer yet.

        Args:
            requests: by name; equal ones are asked once.
            what: the work, for the progress.

        Returns:
            The answers; `stopped` has the reason where the endpoint is down, refuses the key or has no such model, or
            where the budget is used up.
        """
        self._names = {request.digest: name for name, request in requests.items()}
        self._requests = list({r.digest: r for r in requests.values() if r.digest not in self.ledger.answers}.values())
        self._turns = [_Turn(0.0, number) for number in range(len(self._requests))]
        self._failures: dict[str, str] = {}
        stopped = self._ask_all(what)
        outcome = Outcome(stopped=stopped)
        for name, request in requests.items():
            answer = self.ledger.answers.get(request.digest)
            if answer is not None:
                outcome.answers[name] = answer
            else:
                outcome.unanswered[name] = self._failures.get(request.digest, "not asked")
        return outcome

    def _ask_all(self, what: str) -> str | None:
        under_way: dict[Future[Answer], _Turn] = {}
        stopped: str | None = None
        with ThreadPoolExecutor(self.at_once) as pool, show_progress(what, "answers", len(self._turns)) as report:
            try:
                while under_way or (self._turns and not stopped):
                    pause = 0.0
                    while self._turns and len(under_way) < self.at_once and not stopped:
                        pause = max(self._turns[0].due, self._paused_until) - time.monotonic()
                        if pause > 0:
                            break
                        over = self._over_budget(self._requests[self._turns[0].number])
                        if over:
                            stopped = None if under_way else over
                            break
                        turn = heapq.heappop(self._turns)
                        under_way[pool.submit(self.model.answer, self._send(turn))] = turn
                    if not under_way:
                        time.sleep(max(0.0, pause))
                        continue
                    done, _ = wait(under_way, pause if pause > 0 else None, FIRST_COMPLETED)
                    for future in done:
                        report(self._take(future, under_way.pop(future)), "")
            except Stopped as reason:
                stopped = str(reason)
            finally:
                for future, turn in under_way.items():
                    self._keep(future, turn)
        return stopped

    def _send(self, turn: _Turn) -> Request:
        request = self._requests[turn.number]
        turn.successes = self.successes if turn.successes is None else turn.successes
        self._reserved[turn.number] = request.estimated_tokens + request.max_tokens
        return request

    def _over_budget(self, request: Request) -> str | None:
        """Why a request does not fit into the budget, those under way counted in full."""
        limits, kept = self.settings, len(self.ledger.answers)
        if limits.max_requests is not None and self.ledger.requests + len(self._reserved) >= limits.max_requests:
            return (
                f"Stopped at the budget of --max-requests {limits.max_requests}; {kept} answers are kept. Rerun with "
                "a larger one to resume."
            )
        needed = request.estimated_tokens + request.max_tokens
        total = self.ledger.tokens + sum(self._reserved.values()) + needed
        if limits.max_total_tokens is not None and total > limits.max_total_tokens:
            return (
                f"Stopped at the budget of --max-total-tokens {limits.max_total_tokens}: {self.ledger.tokens} are "
                f"used, the next request may take {needed}; {kept} answers are kept. Rerun with more to resume."
            )
        return None

    def _keep(self, future: Future[Answer], turn: _Turn) -> Failed | None:
        """Store the result of a request; a failure is returned."""
        request = self._requests[turn.number]
        self._reserved.pop(turn.number, None)
        note = self._names[request.digest]
        try:
            self.ledger.add(request, note, future.result())
        except Failed as failure:
            self.ledger.add_failure(request, note, failure)
            return failure
        self.successes += 1
        return None

    def _take(self, future: Future[Answer], turn: _Turn) -> int:
        """Note an answer, or ask again later; how many requests are done with it."""
        failure = self._keep(future, turn)
        if failure is None:
            return 1
        if failure.stop:
            raise Stopped(f"{_sentence(failure)} {self._kept()}")
        if failure.again and turn.attempt < self.settings.retries:
            if failure.after is not None and failure.after > LONGEST_PAUSE:
                raise Stopped(f"{_sentence(failure)} It asks to wait {failure.after:.0f} seconds. {self._kept()}")
            wait_for = min(MOST_WAIT, FIRST_WAIT * 2**turn.attempt) * self._random.uniform(0.75, 1.25)
            if failure.after is not None:
                self._paused_until = max(self._paused_until, time.monotonic() + failure.after)
                wait_for = failure.after
            due = time.monotonic() + wait_for
            heapq.heappush(self._turns, _Turn(due, turn.number, turn.attempt + 1, turn.successes))
            return 0
        if failure.again and self.successes == turn.successes:
            tries = f"{turn.attempt + 1} times in a row" if turn.attempt else "once"
            raise Stopped(
                f"{_sentence(failure)} It failed {tries} and nothing else was answered meanwhile. {self._kept()}"
            )
        self._failures[self._requests[turn.number].digest] = str(failure)
        return 1

    def _kept(self) -> str:
        return f"{len(self.ledger.answers)} answers are kept; rerun the same command to go on."


def check_output(folder: Path) -> None:
    """Raise `ValueError` for an output folder that is a file, or holds something else than such a run."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"The output {folder} is a file; give a folder.")
    held = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.exists() else []
    if held and ANSWERS not in held:
        raise ValueError(
            f"The output folder {folder} holds {held[0]} and no {ANSWERS} of an earlier start. Choose an empty folder."
        )
