"""Drafts as a tree: what may come next, each place with its rivals.

Nodes stand in preorder, the likelier child first, so that all that hangs on a node follows it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

Draft = tuple[int, float]
"""A token, and how sure it is, given those before it."""


@dataclass(frozen=True)
class Tree:
    """Texts that begin with one token that is certain, the root.

    tokens: of each node.  parents: their nodes, -1 of the root's.  reached: how likely each node's text comes true.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Tree:
        """One text, all of it certain."""
        return cls(list(tokens), list(range(-1, len(tokens) - 1)), [1.0] * len(tokens))

    @property
    def depths(self) -> list[int]:
        """How far behind the root each node stands."""
        found: list[int] = []
        for parent in self.parents:
            found.append(found[parent] + 1 if found else 0)
        return found

    @property
    def ends(self) -> list[int]:
        """For each node the first one behind it that does not hang on it."""
        found = list(range(1, len(self.tokens) + 1))
        for node in range(len(found) - 1, 0, -1):
            found[self.parents[node]] = max(found[self.parents[node]], found[node])
        return found

    @property
    def last(self) -> list[float]:
        """For each node how likely it is the last that comes true."""
        found = list(self.reached)
        for node, parent in enumerate(self.parents[1:], 1):
            found[parent] -= self.reached[node]
        return found

    @property
    def likeliest(self) -> list[int]:
        """The path from the root down that takes the likelier child each time: the first nodes."""
        chain = (node for node, parent in enumerate(self.parents) if parent != node - 1)
        return list(range(next(chain, len(self.parents))))

    def walk(self, said: Sequence[int]) -> list[int]:
        """The nodes that come true, from the root down.  said: for each node the token that follows it."""
        path = [0]
        for node, (token, parent) in enumerate(zip(self.tokens[1:], self.parents[1:], strict=True), 1):
            if parent == path[-1] and token == said[parent]:
                path.append(node)
        return path


def grow(root: int, drafts: Sequence[Sequence[Draft]], least: float, most: int) -> Tree:
    """The likeliest texts after a root: all nodes likelier than `least`, `most` at most.

    drafts: for each place after the root what may stand there, the surest first, whatever stands before it.
    """
    open_, found = [(-1.0, 0, -1, root)], list[tuple[float, int, int]]()  # reached, parent, token
    while open_ and len(found) < most:
        reached, depth, parent, token = heappop(open_)
        found.append((-reached, parent, token))
        for draft, sure in drafts[depth] if depth < len(drafts) else ():
            if -reached * sure < least:
                break
            heappush(open_, (reached * sure, depth + 1, len(found) - 1, draft))
    return _in_preorder(found)


def _in_preorder(found: list[tuple[float, int, int]]) -> Tree:
    """found: reached, parent and token of nodes, parents before their children, the likelier child first."""
    children: list[list[int]] = [[] for _ in found]
    for node, (_, parent, _) in enumerate(found[1:], 1):
        children[parent].append(node)
    order, stack = list[int](), [0]
    while stack:
        order.append(stack.pop())
        stack += reversed(children[order[-1]])
    place = {node: at for at, node in enumerate(order)} | {-1: -1}
    reached, parents, tokens = zip(*(found[node] for node in order), strict=True)
    return Tree(list(tokens), [place[parent] for parent in parents], list(reached))
