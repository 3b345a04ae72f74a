"""What the site adds to the pages: README as its first, the files of the repository that pages link to, and formulas.

A page links to `../configs/byte_gpt.yaml` as it would on a forge; on the site that file lies beside the pages. Formulas
become MathML, which browsers draw by themselves, without a script from elsewhere.
"""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\(?P<open>[(\[])(?P<formula>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)
SHOWN = (
    "benchmarks/results/*.json",
    "benchmarks/results/*.png",
    "configs/*.yaml",
    "examples/*.py",
    "examples/extensions/*.py",
    "kfac_dist/reference.py",
    "kfac_dist/reporting/grafana.json",
    "kfac_dist/tasks/*.py",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
)


def on_files(files: Files, config: Any) -> Files:
    """Add what pages link to outside of docs/."""
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=readme))
    for pattern in SHOWN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File(str(path.relative_to(ROOT)), str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Take one `../` from links that lead out of docs/, and `docs/` from those of pages that lie beside it."""
    if page.file.src_uri in SHOWN:
        markdown = markdown.replace("](docs/", "](")
    depth = page.file.src_uri.count("/")
    return re.sub(rf"\]\((?:\.\./){{{depth + 1}}}(?=\w)", "](" + "../" * depth, markdown)


def on_page_content(content: str, page: Any, config: Any, files: Files) -> str:
    """Turn formulas, which the Markdown extension leaves as LaTeX, into MathML."""
    return _FORMULA.sub(_mathml, content)


def _mathml(found: re.Match[str]) -> str:
    display = "block" if found["open"] == "[" else "inline"
    return convert(html.unescape(found["formula"]), display=display)
