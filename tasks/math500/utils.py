"""lm-eval's own Minerva code under the names the task file uses."""

from lm_eval.tasks.minerva_math.utils import (
    doc_to_text,
    get_unnormalized_answer,
    list_fewshot_samples,
    normalize_final_answer,
    process_docs,
    process_results,
)

__all__ = ["doc_to_text", "extract_answer", "list_fewshot_samples", "process_docs", "process_results"]


def extract_answer(output: str) -> str:
    """The answer that exact_match compares."""
    return normalize_final_answer(get_unnormalized_answer(output))
