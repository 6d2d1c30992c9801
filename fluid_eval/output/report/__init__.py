"""HTML page, Markdown appendix and LaTeX table from run folders alone: no torch, no lm-eval, no network.

Generated text is treated as hostile. Jinja escapes it in the page, the samples' JSON block holds no character with a
meaning in HTML, and the page's script only sets text.
"""

from .write import default_page, write_report

__all__ = ["default_page", "write_report"]
