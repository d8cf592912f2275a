"""What counts as right, metric by metric, as the published scorers have it, with their oddities named."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

# --- exact match


def cut(answer: str) -> str:
    """An answer up to its first newline or, where it has none, up to its first full stop (VL-ICL, arXiv 2403.13164).

    A full stop at the very beginning cuts nothing.
    """
    answer = answer.strip()
    for end in ("\n", "."):
        place = answer.find(end)
        if place > 0:
            return answer[:place]
    return answer


def exact_match(answer: str, right: Sequence[str], digits: bool = False) -> bool:
    """Whether an answer, cut as by `cut`, is one of the right ones; case does not matter.

    Args:
        answer: as written.
        right: all answers that are right.
        digits: compare the first run of digits of what is left of the answer; without one it is wrong.
    """
    answer_text = cut(answer)
    if digits:
        run = re.search(r"\d+", answer_text)
        answer_text = run.group() if run else ""
    return answer_text.lower() in [reference.lower() for reference in right]


def yes_or_no(answer: str, right: str) -> bool:
    """VL-ICL's rule of `matching_mi`: right for "yes" if "yes" is in the cut answer, for "no" if it is not.

    So an answer that says neither is right where "no" is. `yes_or_no_said` is the rule without this.
    """
    return (right.lower() == "yes") == ("yes" in cut(answer).lower())


def yes_or_no_said(answer: str, right: str) -> bool:
    """Whether the first word of a cut answer that is "yes" or "no" is the right one."""
    match = re.search(r"\b(yes|no)\b", cut(answer).lower())
    return match is not None and match.group() == right.lower()


# --- names in answers


def lcl_published(answer: str, right: str, other: str) -> bool:
    """Accuracy of Link-Context Learning (arXiv 2308.07891) as its code has it.

    Right if the lower-cased name is in the answer and the other name, lower-cased, is not in what is left without it.
    The answer is not lower-cased, so one that keeps the capitals of a name is wrong; and a name counts within a word.
    Quotes, apostrophes and full stops are taken out of the right name, but not out of the answer or of the other name:
    an answer that says "st. bernard" as it is shown is wrong.
    """
    right, other = re.sub(r"['\".]", "", right).strip().lower(), other.lower()
    return right in answer and other not in answer.replace(right, "")


def named(answer: str, right: str, others: Sequence[str]) -> bool:
    """The same in a normalised form: case, quotes and punctuation do not matter, and names are whole words.

    Besides, a name is not taken out of a longer one: of "fox" and "kit fox", the answer "kit fox" says no fox.
    """
    text, name = _words(answer), _words(right)
    rest = text
    while name in rest:
        rest = rest.replace(name, " ")
    return name in text and not any(
        other_words in (text if name in other_words else rest) for other_words in map(_words, others)
    )


def _words(text: str) -> str:
    """The words of a text between single spaces, also at both ends."""
    return " " + " ".join(re.findall(r"\w+", text.lower())) + " "


# --- VQA accuracy

ARTICLES = ("a", "an", "the")
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# Words that people write without their apostrophes, as the official scorer lists them.
CONTRACTED = """
    ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's
    isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've
    shouldn't somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're
    there's they'd they'll they're they've wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
"""
TWICE_CONTRACTED = """
    couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
    something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'd've you'd've
"""


def _contractions() -> dict[str, str]:
    """Each contraction by its spellings without one of its apostrophes."""
    contractions = {whole.replace("'", ""): whole for whole in CONTRACTED.split()}
    for whole in TWICE_CONTRACTED.split():
        for place in (place for place, letter in enumerate(whole) if letter == "'"):
            contractions[whole[:place] + whole[place + 1 :]] = whole
    contractions |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    return contractions | {"twas": "'twas", "somebody'd": "somebodyd", "y'allll": "y'all'll", "yall'll": "y'all'll"}


CONTRACTIONS = _contractions()


def vqa_normalized(answer: str) -> str:
    """An answer as the official VQA scorer compares it: lower case, no articles, digits for number words to ten.

    Punctuation goes: without a trace beside a space, or anywhere in a text that has a comma between digits, and else
    a space takes its place. A full stop goes unless a digit follows it.
    """
    text = re.sub(r"[\n\t]", " ", answer).strip()
    thousands = re.search(r"\d,\d", text) is not None
    kept = text
    for mark in PUNCTUATION:
        kept = kept.replace(mark, "" if thousands or f"{mark} " in text or f" {mark}" in text else " ")
    kept = re.sub(r"\.(?!\d)", "", kept)
    digits = {"none": "0"} | {word: str(number) for number, word in enumerate(NUMBERS)}
    words = (digits.get(word, word) for word in kept.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def vqa_accuracy(answer: str, references: Sequence[str], always: bool = True) -> float:
    """VQA accuracy (arXiv 1505.00468): over the annotators, the mean of min(1, matches among the others / 3).

    Args:
        answer: as written.
        references: the answers of all annotators; of a single one, the answer must match it.
        always: normalise answers always, as lmms-eval does. The official scorer leaves answers as they are when all
            annotators agree to the letter.
    """
    if always or len({reference.strip() for reference in references}) > 1:
        answer, references = vqa_normalized(answer), [vqa_normalized(reference) for reference in references]
    else:
        answer, references = (" ".join(answer.split()), [reference.strip() for reference in references])
    matches = sum(reference == answer for reference in references)
    if len(references) == 1:
        return float(matches)
    # Without an annotator who said the same there is one match less.
    return sum(min(1.0, (matches - (reference == answer)) / 3) for reference in references) / len(references)


def openflamingo_answer(text: str) -> str:
    """An answer as OpenFlamingo cuts it: before a word of the prompt, wherever it stands, and before ", "."""
    return re.split("Question|Answer|Short", text, maxsplit=1)[0].split(", ", 1)[0]


def openflamingo_caption(text: str) -> str:
    """A caption as OpenFlamingo cuts it (its `eval/coco_metric.py`): before the prompt's word, and without quotes."""
    return text.split("Output", 1)[0].replace('"', "")


def openflamingo_accuracy(answer: str, references: Sequence[str], marks: Sequence[Hashable]) -> float:
    """VQA accuracy by OpenFlamingo's scorer (its `eval/vqa_metric.py`), which always normalises.

    It leaves out every annotation that equals the annotator's own. VizWiz's have no id, so all who said the same with
    the same confidence are left out at once, and figures come out 10 to 27 points lower.

    Args:
        answer: cut by `openflamingo_answer`.
        references: the answers of all annotators.
        marks: what else an annotation holds: its id, or a confidence that others share.
    """
    own = vqa_normalized(answer)
    notes = [(vqa_normalized(reference), mark) for reference, mark in zip(references, marks, strict=True)]
    matches = [sum(other[0] == own for other in notes if other != note) for note in notes]
    return sum(min(1.0, count / 3) for count in matches) / len(matches)


# --- ScienceQA

LETTERS = "ABCDE"


def scienceqa_choice(answer: str) -> str | None:
    """The letter that an answer chooses, as LLaVA's scorer of ScienceQA finds it; `None` if it fails.

    It is a bare letter; the letter of an answer that begins with "B. "; or else that of "The answer is B." if this
    occurs exactly once (for its full stop any character may stand but a newline, and one must).
    """
    if answer in tuple(LETTERS):
        return answer
    if answer[:1] in tuple(LETTERS) and answer[1:3] == ". ":
        return answer[0]
    choices = re.findall(r"The answer is ([A-Z]).", answer)
    return choices[0] if len(choices) == 1 else None


# --- ROC-AUC


def roc_auc(log_probabilities: Sequence[tuple[float, float]], positive: Sequence[bool]) -> float:
    """Area under the ROC curve of P(yes) over {yes, no}; equal ones count half. Not a number if one class is missing.

    Args:
        log_probabilities: of yes and of no, each the mean over its tokens.
        positive: whether yes is right.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.metrics import roc_auc_score
    except ImportError as error:
        raise ImportError("ROC-AUC needs scikit-learn: pip install modeling-aim[eval]") from error
    if len(set(positive)) < 2:
        return math.nan
    return float(roc_auc_score(list(positive), [_probability(yes, no) for yes, no in log_probabilities]))


def _probability(yes: float, no: float) -> float:
    """Of yes, by a softmax over the two."""
    if yes == no:  # also where both are impossible
        return 0.5
    difference = no - yes
    return 1 / (1 + math.exp(difference)) if difference < 700 else 0.0


# --- CIDEr

TOKENIZERS = ("ptb", "plain")
JAVA_SECONDS = 600.0


class Captions:
    """CIDEr (arXiv 1411.5726) by pycocoevalcap. Captions that were tokenized once are remembered.

    Args:
        tokenizer: `"ptb"`, Stanford's by Java, which published figures use; `"plain"`, in Python, which shifts scores
            by about a point of 100; the best there is when `None`.

    Raises:
        ImportError: pycocoevalcap is missing.
        ValueError: there is no such tokenizer, or no Java for `"ptb"`.
    """

    def __init__(self, tokenizer: str | None = None) -> None:
        try:
            import pycocoevalcap
        except ImportError as error:
            raise ImportError("CIDEr needs pycocoevalcap: pip install modeling-aim[eval]") from error
        jars = Path(pycocoevalcap.__path__[0], "tokenizer").glob("stanford-corenlp-*.jar")
        self.java, self.jar = shutil.which("java"), next(jars, None)
        ready = self.java is not None and self.jar is not None
        if tokenizer is not None and tokenizer not in TOKENIZERS:
            raise ValueError(f"tokenizer={tokenizer!r} is unknown; choose one of {TOKENIZERS}.")
        if tokenizer == "ptb" and not ready:
            raise ValueError("tokenizer='ptb' needs Java on the PATH. Install it, or choose 'plain'.")
        self.tokenizer = tokenizer or ("ptb" if ready else "plain")
        self._known: dict[str, str] = {}

    def scores(self, captions: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
        """CIDEr of each caption; that of all is their mean. Literature shows it times 100.

        Words weigh by how rare they are among the references of all images given, so a few images tell little, and a
        single one nothing: it scores 0.

        Args:
            captions: one an image.
            references: some an image.
        """
        from pycocoevalcap.cider.cider import Cider

        if not captions:
            return []
        self._tokenize([*captions, *(caption for some in references for caption in some)])
        wanted = {number: [self._known[caption] for caption in some] for number, some in enumerate(references)}
        candidates = {number: [self._known[caption]] for number, caption in enumerate(captions)}
        return [float(score) for score in Cider().compute_score(wanted, candidates)[1]]

    def note(self) -> str:
        """Which tokenizer it is."""
        if self.tokenizer == "ptb":
            return "CIDEr with Stanford's PTB tokenizer (Java), as published figures have it."
        return "CIDEr with a tokenizer in Python instead of Java's: it may be off by 0.01 from published figures."

    def _tokenize(self, captions: Sequence[str]) -> None:
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._known]
        lines = [" ".join(caption.split()) for caption in new]
        split = self._by_java(lines) if self.tokenizer == "ptb" and new else [plain_tokens(line) for line in lines]
        self._known.update(zip(new, split, strict=True))

    def _by_java(self, lines: Sequence[str]) -> list[str]:
        """As pycocoevalcap's own tokenizer, which writes into its installed package."""
        from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

        assert self.java is not None
        command = [self.java, "-cp", str(self.jar), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines"]
        ended = subprocess.run(
            [*command, "-lowerCase", "-encoding", "UTF-8"],
            input="".join(f"{line}\n" for line in lines).encode(),
            capture_output=True,
            timeout=JAVA_SECONDS,
        )
        split = ended.stdout.decode().split("\n")[: len(lines)]
        if ended.returncode or len(split) < len(lines):
            raise ValueError(
                f"Java's PTB tokenizer gave {len(split)} of {len(lines)} lines (exit code {ended.returncode}): "
                f"{ended.stderr.decode(errors='replace')[-300:]} Choose tokenizer=plain."
            )
        return [" ".join(word for word in line.split() if word not in PUNCTUATIONS) for line in split]


def plain_tokens(caption: str) -> str:
    """Words of a caption, nearly as the Penn Treebank has them: "don't" is do and n't; no punctuation."""
    text = caption.lower().replace("’", "'")
    text = re.sub(r"\bcannot\b", "can not", re.sub(r"(\w)(n't|'(?:s|m|d|ll|re|ve))(?!\w)", r"\1 \2", text))
    text = text.replace("(", " -lrb- ").replace(")", " -rrb- ")  # in lower case these are kept, there too
    parts = (r"-[lr]rb-", r"n't", r"'(?:s|m|d|ll|re|ve)(?!\w)", r"(?:\w\.){2,}", r"\w+(?:[-.,'/&]\w+)*", r"[$%&#@]")
    return " ".join(re.findall("|".join(parts), text))


# --- over numbers of demonstrations


def vl_icl_summary(by_shots: Mapping[int, float]) -> dict[str, float]:
    """VL-ICL's three figures of one curve: accuracy without demonstrations, the best one, and ICL efficiency.

    ICL efficiency is the area between the curve and the line of its zero-shot accuracy, below which it is negative, as
    a share of the whole area: the range of demonstrations times the range of accuracy, 0 to 1.

    Args:
        by_shots: accuracy in 0..1 by number of demonstrations, as the task counts them; 0 among them.

    Raises:
        ValueError: there is none for 0 demonstrations, or no other.
    """
    if 0 not in by_shots or len(by_shots) < 2:
        raise ValueError(f"VL-ICL's summary needs accuracies for 0 and more demonstrations; got {sorted(by_shots)}.")
    shots = sorted(by_shots)
    gains = [by_shots[count] - by_shots[0] for count in shots]
    steps = zip(shots, shots[1:], gains, gains[1:], strict=False)
    area = sum((after - before) * (low + high) / 2 for before, after, low, high in steps)
    return {
        "zero_shot": by_shots[0],
        "peak": max(by_shots.values()),
        "icl_efficiency": area / shots[-1],
    }
