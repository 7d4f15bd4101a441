"""Every text of three words and more in the package, but for docstrings: what a user can meet.

`python tests/support/messages.py > tests/messages.txt` writes the list anew.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "pipeline"


def collect() -> Iterator[str]:
    """`file: text`, in the order of the sources; a name of what is filled in stands in braces."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        skipped = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                skipped.add(id(node.body[0].value))  # type: ignore[attr-defined]
            if isinstance(node, ast.JoinedStr):
                skipped |= {id(part) for part in node.values}
        for node in ast.walk(tree):
            text = _text(node)
            if (
                id(node) not in skipped
                and " " in text.strip()
                and len(re.findall(r"[A-Za-z]{2,}", re.sub(r"\{.*?\}", "x", text))) >= 3
            ):
                yield f"{path.relative_to(PACKAGE)}: {' '.join(text.split())}"


def _text(node: ast.AST) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(p.value) if isinstance(p, ast.Constant) else _filled_in(p) for p in node.values)
    return ""


def _filled_in(part: ast.AST) -> str:
    """A name for what is filled in: the outermost one of its expression."""
    names = [
        n.id if isinstance(n, ast.Name) else n.attr for n in ast.walk(part) if isinstance(n, ast.Name | ast.Attribute)
    ]
    return f"{{{names[0] if names else '...'}}}"


if __name__ == "__main__":
    print("\n".join(collect()))
