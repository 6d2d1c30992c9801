"""Draft trees: candidate continuations that one forward verifies, and the mask blocks that draft the next ones.

The tree is SpecInfer's token tree (Miao et al. 2023), verified by tree attention. Its shape follows the probabilities
of the draft tokens, as in EAGLE-2's dynamic draft trees (Li et al. 2024). As in Medusa (Cai et al. 2024), candidates do
not depend on one another: slot j of a mask block proposes the candidates of depth j, which all nodes above share. Mask
blocks are FLUID's (arXiv 2605.27387; its code calls them fans).

The bonus token "the", candidates cat .6, dog .3 at depth 1 and sat .5, ran .3 at depth 2, nodes of probability .1 at
least and six nodes at most; two mask blocks, of two slots and of one:

    node  token        depth  parent  path probability  subtree end    mask block
    0     the            0      -          1.0               6
    1     ├─ cat        1      0           .6               4
    2     │  ├─ sat      2      1           .3               3         ├ [mask] [mask]
    3     │  └─ ran      2      1           .18              4
    4     └─ dog         1      0           .3               6         ├ [mask]
    5        └─ sat      2      4           .15              6

Nodes stand in preorder, the likelier child first, so that a subtree is a range of nodes. A forward feeds the nodes,
then the mask blocks in the order of their anchors, then padding up to the widest row:

    slot       0    1    2    3    4    5    6     7     8     9
    token     the  cat  sat  ran  dog  sat  [m]   [m]   [m]   [pad]
    enter     0.0  1.0  2.0  3.0  4.0  5.0  2.1   2.2   4.1   never     as node.step
    exit      6.0  4.0  3.0  4.0  6.0  6.0  3.0   3.0   5.0   never
    offset     0    1    2    2    1    2    3     4     2     0        position id, from the bonus token on

A slot attends to another where it enters inside the other's [enter, exit), see `attention_masks`: slot 7 to the, cat,
sat, slot 6 and itself. If "the cat sat" is accepted, node 2 predicts the next bonus token, and slots 6 and 7 hold the
candidates of depths 1 and 2 behind it.

Legend: S slots of the widest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..forward.attention_masks import MAX_STEPS, NEVER

Candidate = tuple[int, float]
"""A token and its probability at its place, given that the path up to there is accepted."""


@dataclass(frozen=True)
class DraftTree:
    """Nodes in preorder. The root is the bonus token, which is committed already.

    tokens: of each node.  parents: index of each node's parent, -1 of the root.
    path_probabilities: of each node, that the whole path from the root to it is accepted.
    depths: places behind the root.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    path_probabilities: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> DraftTree:
        """A single path whose tokens are certain."""
        count = len(tokens)
        return cls(list(tokens), list(range(-1, count - 1)), [1.0] * count, list(range(count)))

    def add(self, token: int, parent: int, path_probability: float, depth: int) -> int:
        """Append a node, the next in preorder. Returns its index."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.path_probabilities.append(path_probability)
        self.depths.append(depth)
        return len(self.tokens) - 1

    @property
    def subtree_ends(self) -> list[int]:
        """Of each node the first node behind its subtree."""
        ends = list(range(1, len(self.tokens) + 1))
        for node in range(len(ends) - 1, 0, -1):  # children before their parents
            parent = self.parents[node]
            if ends[node] > ends[parent]:
                ends[parent] = ends[node]
        return ends

    @property
    def stop_probabilities(self) -> list[float]:
        """Of each node, that the accepted path ends there: its path probability less those of its children."""
        stops = list(self.path_probabilities)
        for node, parent in enumerate(self.parents[1:], 1):
            stops[parent] -= self.path_probabilities[node]
        return stops

    @property
    def greedy_path(self) -> list[int]:
        """The likeliest child at every node, from the root down: in preorder the first nodes, up to the first leaf."""
        for node, parent in enumerate(self.parents):
            if parent != node - 1:
                return list(range(node))
        return list(range(len(self.parents)))


def grow(root: int, candidates: Sequence[Sequence[Candidate]], min_probability: float, max_nodes: int) -> DraftTree:
    """The tree of all paths that are accepted with `min_probability` at least; the likeliest `max_nodes` of its nodes.

    candidates: for each depth from 1 on, the likeliest first.
    """
    tree = DraftTree()
    stack: list[tuple[int, int, float, int]] = [(root, -1, 1.0, 0)]  # token, parent, path probability, depth
    while stack:
        token, parent, path_probability, depth = stack.pop()
        node = tree.add(token, parent, path_probability, depth)
        if depth == len(candidates):
            continue
        children = []
        for candidate, probability in candidates[depth]:
            reached = path_probability * probability
            if reached < min_probability:
                break  # so are all candidates that follow
            children.append((candidate, node, reached, depth + 1))
        stack += reversed(children)  # the likeliest child is popped first
    return tree if len(tree.tokens) <= max_nodes else _prune(tree, max_nodes)


def _prune(tree: DraftTree, max_nodes: int) -> DraftTree:
    """The likeliest nodes, in preorder. No node is likelier than its parent, so what is left is a tree."""
    by_probability = sorted(range(len(tree.tokens)), key=lambda node: -tree.path_probabilities[node])
    pruned = DraftTree()
    new_index = {-1: -1}
    for node in sorted(by_probability[:max_nodes]):
        parent = new_index[tree.parents[node]]
        new_index[node] = pruned.add(tree.tokens[node], parent, tree.path_probabilities[node], tree.depths[node])
    return pruned


class SlotLayout(NamedTuple):
    """Slots of one row, padded to S: lists of length S each, see `attention_masks.AttentionIntervals`."""

    ids: list[int]
    enter: list[int]
    exit: list[int]
    offsets: list[int]


@dataclass
class Draft:
    """What a row feeds next: a draft tree, and `masks`, the size of the mask block anchored at each of its nodes.

    slots: fed in all.
    """

    tree: DraftTree
    masks: list[int]
    slots: int = field(init=False)

    def __post_init__(self) -> None:
        self.slots = len(self.masks) + sum(self.masks)

    def layout(self, mask_id: int, width: int) -> SlotLayout:
        """The slots in feeding order, padded to `width`; the module's docstring shows one."""
        tree = self.tree
        nodes, padding = len(tree.tokens), width - self.slots
        # 1) nodes, in preorder
        enter = list(range(0, nodes * MAX_STEPS, MAX_STEPS))
        exit_ = [end * MAX_STEPS for end in tree.subtree_ends]
        offsets = list(tree.depths)
        # 2) mask blocks: each a chain behind its anchor that no other slot attends to
        for node, masks in enumerate(self.masks):
            if masks:
                first, depth = node * MAX_STEPS + 1, tree.depths[node] + 1
                enter += range(first, first + masks)
                exit_ += [(node + 1) * MAX_STEPS] * masks
                offsets += range(depth, depth + masks)
        # 3) padding, which nothing attends to
        ids = tree.tokens + [mask_id] * (width - nodes)
        return SlotLayout(ids, enter + [0] * padding, exit_ + [NEVER] * padding, offsets + [0] * padding)
