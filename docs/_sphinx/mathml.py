"""Renders formulas as MathML, which browsers show without scripts, fonts or network; docutils converts it from TeX."""

from typing import Any

from docutils import nodes
from docutils.utils.math import latex2mathml


def visit_inline(self: Any, node: nodes.math) -> None:
    self.body.append(latex2mathml.tex2mathml(node.astext()))
    raise nodes.SkipNode


def visit_block(self: Any, node: nodes.math_block) -> None:
    self.body.append('<div class="math">' + latex2mathml.tex2mathml(node.astext(), as_block=True) + "</div>")
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, Any]:
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
