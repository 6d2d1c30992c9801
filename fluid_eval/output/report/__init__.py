"""One page, or a paper's appendix, from run folders. Reads the store alone: no torch, no lm-eval, no network.

What a model wrote is hostile until shown otherwise: in the page's text it is escaped by Jinja, in the samples' JSON
block no character is left that HTML could read, and the page's script only ever sets text.
"""

from .write import write_report

__all__ = ["write_report"]
