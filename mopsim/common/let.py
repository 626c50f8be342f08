"""Names that expressions of data files write for a longer one."""

import ast
from collections.abc import Mapping


class Let(ast.NodeTransformer):
    """Names of `let` become what they stand for, which may have such names too."""

    def __init__(self, let: Mapping[str, str]) -> None:
        self.let = let

    def visit_Name(self, node: ast.Name) -> ast.expr:
        if node.id not in self.let:
            return node
        found = self.visit(ast.parse(self.let[node.id], mode="eval").body)
        assert isinstance(found, ast.expr)
        return found
