"""What `make docs` does beside MkDocs: files that lie elsewhere become pages, and formulas drawings.

Nothing on the site is loaded from elsewhere, and no formula needs a script or a font of the reader's.
"""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

import ziamath
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PAGES = {"CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md", "SECURITY.md": "security.md"}
KEPT = ("benchmarks/results/*.json", "benchmarks/results/*.png", "notebooks/*.ipynb", "CITATION.cff", "LICENSE")
FORMULA = re.compile(r"^( *)```math\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
# Of GitHub: `](../x)` from docs/, `](docs/x)` from the root.
LINK = re.compile(r"\]\(([^)#:\s]+)(#[^)\s]*)?\)")
# A line that is a link to a section of a file of the root, and nothing else: the site has the section in its place.
SECTION = re.compile(r"^\[[^]]+\]\(\.\./(\w+\.md)#([\w-]+)\)$", re.MULTILINE)


def on_files(files, config):
    """Adds the pages of the root, and the data that pages link to."""
    for name, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / name)))
    for pattern in KEPT:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links as they are on GitHub become those of the site, formulas drawings."""
    if page.file.src_uri == "commands.md":
        return commands()
    folder = Path(page.file.src_uri).parent
    from_root = page.file.src_uri in PAGES.values()
    markdown = SECTION.sub(lambda match: section(match[1], match[2]), markdown)

    def link(match):
        target, anchor = match[1], match[2] or ""
        target = target.removeprefix("docs/") if from_root else target.removeprefix("../")
        target = PAGES.get(target, target)
        known = files.get_file_from_path((folder / target).as_posix())
        return f"]({target}{anchor})" if known else match[0]

    return FORMULA.sub(formula, LINK.sub(link, markdown))


def section(name, anchor):
    """What stands under a heading of the second level, without it."""
    parts = re.split(r"^## (.+)\n", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    for heading, text in zip(parts[1::2], parts[2::2], strict=True):
        if heading.lower().replace(" ", "-").replace(",", "") == anchor:
            return text.strip()
    raise ValueError(f"{name}: got no section {anchor}")


def formula(match):
    """A block of LaTeX as SVG, in the colour of the text around it, indented as it was."""
    latex = match[2].strip()
    svg = ziamath.Latex(latex, size=18, color="currentColor").svg()
    label = escape(" ".join(latex.split()), quote=True)
    return f'{match[1]}<div class="formula" role="math" aria-label="{label}">{svg}</div>'


def commands():
    """A page of what each command's --help says."""
    import typer

    from aqlm_c.cli.commands import app

    group = typer.main.get_command(app)
    text = ["# Commands\n", "What `aqlm-c COMMAND --help` says.\n"]
    panels: dict[str, list[str]] = {}
    for name, command in group.commands.items():
        context = command.make_context(f"aqlm-c {name}", [], resilient_parsing=True, terminal_width=88)
        said = command.get_help(context)
        panels.setdefault(command.rich_help_panel or "Commands", []).append(f"### {name}\n\n```text\n{said}\n```\n")
    for panel, pages in panels.items():
        text += [f"## {panel}\n", *pages]
    return "\n".join(text)
