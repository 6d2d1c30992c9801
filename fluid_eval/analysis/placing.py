"""Which documents of a task the answers of a log belong to, and what the task asks them with.

Harnesses number documents in their own order, and write prompts of their own. An answer is placed by its number if that
document's text stands in the answer's prompt, else by the one document whose text does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fluid_model.common.errors import ConfigError

from ..benchmarks import lm_eval_tasks
from ..common.spec import RunSpec
from .foreign_logs.logs import ForeignLog, ForeignSample

LEAST_LETTERS = 12
"""Letters of a field that tell one document from others."""


@dataclass(frozen=True)
class PlacedSample:
    """An answer with its document's number here. target: the task's own where its data are at hand."""

    doc_id: int
    prompt: str
    target: str | None
    sample: ForeignSample


class TaskDocuments:
    """The documents of a task with their prompts and targets, as this package asks them."""

    def __init__(self, task: Any, prompts: Mapping[int, str]) -> None:
        """task: lm-eval's.  prompts: by document."""
        self.documents = list(task.eval_docs)
        self.prompts = prompts
        self._task = task

    def target(self, doc_id: int) -> str:
        """The reference answer, as runs store it."""
        document = self.documents[doc_id]
        example = {"doc": document, "target": self._task.doc_to_target(document)}
        return lm_eval_tasks.target_of(self._task, example)

    def place(self, sample: ForeignSample) -> int:
        """The number of a sample's document. Raises ConfigError if none fits, or several do."""
        named = {str(document.get("task_id")): n for n, document in enumerate(self.documents)}
        if sample.prompt is None:
            if (number := named.get(str(sample.document))) is None:
                raise ConfigError(f"{sample.where}: {sample.document!r} is none of the task's {len(named)} problems")
            return number
        place = sample.document
        if isinstance(place, int) and 0 <= place < len(self.documents) and is_asked(self.documents[place], sample):
            return place
        fitting = [n for n, document in enumerate(self.documents) if is_asked(document, sample)]
        if len(fitting) != 1:
            problem = "several documents of this task stand" if fitting else "no document of this task stands"
            raise ConfigError(f"{sample.where}: {problem} in its prompt ({sample.prompt[:60]!r}...)")
        return fitting[0]


def is_asked(document: Mapping[str, Any], sample: ForeignSample) -> bool:
    """Whether a document's question stands in a sample's prompt."""
    return question_in(document, sample.prompt or "")


def question_in(document: Mapping[str, Any], prompt: str) -> bool:
    """Whether a prompt holds any text of a document of at least LEAST_LETTERS letters, whatever its white space.

    Fields that no prompt holds do not count.
    """
    texts = [value for name, value in document.items() if isinstance(value, str) and name not in _ANSWERS]
    long = [words for text in texts if len(words := " ".join(text.split())) >= LEAST_LETTERS]
    squeezed = " ".join(prompt.split())
    return any(text in squeezed for text in long)


_ANSWERS = ("answer", "completion", "solution", "canonical_solution", "test", "target", "subject", "task_id")
"""Fields of documents that no prompt holds."""


def place(log: ForeignLog, documents: TaskDocuments | None) -> list[PlacedSample]:
    """A log's answers by document. documents: None where the task's data are not at hand.

    Raises ConfigError for an answer without a document, and for a document with two.
    """
    placed: dict[int, PlacedSample] = {}
    for n, sample in enumerate(log.samples):
        if documents is None:
            doc_id = sample.document if isinstance(sample.document, int) else n
            one = PlacedSample(doc_id, sample.prompt or "", sample.target, sample)
        else:
            doc_id = documents.place(sample)
            prompt = documents.prompts[doc_id] if sample.prompt is None else sample.prompt
            one = PlacedSample(doc_id, prompt, documents.target(doc_id), sample)
        if before := placed.get(doc_id):
            raise ConfigError(f"{sample.where}: answers the same document as {before.sample.where}; keep one of them")
        placed[doc_id] = one
    return [placed[doc_id] for doc_id in sorted(placed)]


def documents_of(spec: RunSpec) -> tuple[lm_eval_tasks.Tasks, dict[str, TaskDocuments]]:
    """lm-eval's tasks of a spec, and their documents by leaf task. Raises ConfigError where data are missing."""
    tasks = lm_eval_tasks.load_tasks(spec)
    asked = lm_eval_tasks.requests(spec, tasks, None)
    prompts: dict[str, dict[int, str]] = {}
    for instance in asked:
        prompts.setdefault(instance.task_name, {}).setdefault(instance.doc_id, str(instance.args[0]))
    return tasks, {name: TaskDocuments(task, prompts.get(name, {})) for name, task in tasks["tasks"].items()}


def same_prompts(placed: Sequence[PlacedSample], documents: TaskDocuments) -> bool:
    """Whether all answers were asked with the prompts of this package."""
    return all(one.prompt == documents.prompts.get(one.doc_id) for one in placed)
