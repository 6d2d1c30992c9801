"""Verification: which draft tokens the causal model accepts.  (speculative sampling, Leviathan et al. 2023, Chen et al.
2023; over a draft tree, SpecInfer, Miao et al. 2023)

The model's own choice at each node is fixed before drafts are compared with it: the argmax, or the token that the row's
random number for that place selects from the sampling distribution. A draft token is accepted where it equals that
choice. So the text is the text that AR writes with the same random numbers, token by token, which is stronger than the
equal distributions of rejection sampling. The price is fewer accepted drafts where the distribution is flat.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..engine.strategy import RejectedDraft
from .draft_tree import DraftTree


def verify_path(tree: DraftTree, predictions: Sequence[int]) -> list[int]:
    """The accepted path: nodes from the root down whose tokens the causal model chooses itself.

    predictions: of each node, the causal model's choice of the token behind it. At the path's last node that choice is
    the bonus token: it is committed too, whether drafts were accepted or not.

    Predictions (sat, at "cat") accept node 2 of the tree in `draft_tree`:

        the ──▶ "cat"    node 1 matches
        cat ──▶ "sat"    node 2 matches
        sat ──▶ "on"     no child: "on" is the bonus token
    """
    path = [0]
    for node, (token, parent) in enumerate(zip(tree.tokens[1:], tree.parents[1:], strict=True), 1):
        # In preorder the children of the path's last node follow it, so one pass finds the whole path.
        if parent == path[-1] and token == predictions[parent]:
            path.append(node)
    return path


def rejected_draft(tree: DraftTree, greedy: Sequence[int], path: Sequence[int]) -> RejectedDraft | None:
    """The part of the greedy path that was not accepted, as a trace reports it; None if all of it was.

    greedy, path: nodes of the tree's greedy path and the accepted ones, which may have left it for a sibling candidate.
    """
    agreed = 0
    for node, accepted in zip(greedy, path, strict=False):
        if node != accepted:
            break
        agreed += 1
    rejected = [tree.tokens[node] for node in greedy[agreed:]]
    return RejectedDraft(agreed - 1, rejected) if rejected else None
