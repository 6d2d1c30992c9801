"""Drafts as a tree: what may come next, each place with its rivals.

Nodes stand in preorder, the likelier child first, so that all that hangs on a node follows it at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

Draft = tuple[int, float]
"""A token, and how sure it is, given those before it."""


@dataclass(frozen=True)
class Tree:
    """Texts that begin with one token that is certain, the root.

    tokens: of each node.  parents: their nodes, -1 of the root's.  reached: how likely each node's text comes true.
    depths: how far behind the root each stands.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    reached: list[float] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)

    @classmethod
    def chain(cls, tokens: Sequence[int]) -> Tree:
        """One text, all of it certain."""
        count = len(tokens)
        return cls(list(tokens), list(range(-1, count - 1)), [1.0] * count, list(range(count)))

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
    """The likeliest texts after a root: all nodes as likely as `least`, `most` at most.

    drafts: for each place after the root what may stand there, the surest first, whatever stands before it.
    """
    tree, open_ = Tree(), [(root, -1, 1.0, 0)]
    while open_:
        token, parent, likely, depth = open_.pop()
        node = len(tree.tokens)
        tree.tokens.append(token)
        tree.parents.append(parent)
        tree.reached.append(likely)
        tree.depths.append(depth)
        children = []
        for draft, sure in drafts[depth] if depth < len(drafts) else ():
            if likely * sure < least:
                break
            children.append((draft, node, likely * sure, depth + 1))
        open_ += reversed(children)
    return tree if len(tree.tokens) <= most else _cut(tree, most)


def _cut(tree: Tree, most: int) -> Tree:
    """The likeliest nodes of a tree, in its order. None is likelier than its parent, which stands before it."""
    kept = sorted(sorted(range(len(tree.tokens)), key=lambda node: -tree.reached[node])[:most])
    place = {node: at for at, node in enumerate(kept)} | {-1: -1}
    return Tree(
        [tree.tokens[node] for node in kept],
        [place[tree.parents[node]] for node in kept],
        [tree.reached[node] for node in kept],
        [tree.depths[node] for node in kept],
    )
