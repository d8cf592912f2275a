"""Hooks of the docs site (mkdocs.yml): pages that live outside docs/, and the list of error messages.

The README, CONTRIBUTING.md and CHANGELOG.md are pages of the site too, and links among all pages work on GitHub and
on the site. A link to a file that is no page, such as a script, becomes its path in code style.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md", "CHANGELOG.md": "CHANGELOG.md"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")
ERRORS_PAGE = """# Error messages

Every message that the package raises, as it stands in the code (values in braces), by file. Each says what was given,
what was expected and what to do. [Troubleshooting](TROUBLESHOOTING.md) starts from what you see.
"""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/ and the generated one."""
    for source, target in ROOT_PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    files.append(File.generated(config, "errors.md", content=errors_page()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links at the pages of the site."""
    in_root = page.file.src_uri in ROOT_PAGES.values()
    return LINK.sub(lambda link: relinked(link, in_root, files), markdown)


def relinked(link: re.Match[str], in_root: bool, files: Files) -> str:
    """One link as the site has it.

    Args:
        link: a match of `LINK`.
        in_root: whether the page stands in the root of the repository.
        files: all pages and pictures of the site.
    """
    mark, text, target, anchor = link.groups()
    if "://" in target:
        return link[0]
    path = PurePosixPath("" if in_root else "docs", target)
    place = Path(ROOT, path).resolve().relative_to(ROOT).as_posix()
    uri = ROOT_PAGES.get(place, place.removeprefix("docs/"))
    if files.get_file_from_path(uri) is not None and (place in ROOT_PAGES or place.startswith("docs/")):
        return f"{mark}[{text}]({uri}{anchor or ''})"
    return f"{text} (`{place}`)" if text.strip("`") != place else f"`{place}`"


def errors_page() -> str:
    """Markdown: the messages of all `raise` statements of the package."""
    parts = [ERRORS_PAGE]
    for path in sorted((ROOT / "modeling_aim").rglob("*.py")):
        messages = dict.fromkeys(raised(ast.parse(path.read_text(encoding="utf-8"))))
        if messages:
            parts.append(f"\n## {path.relative_to(ROOT).as_posix()}\n")
            parts += [f"- `{kind}`: {message}" for kind, message in messages]
    return "\n".join(parts)


def raised(tree: ast.AST) -> list[tuple[str, str]]:
    """Kind and message of each error that a file raises with a message of its own."""
    calls = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)]
    pairs = [(call.func.id, template(call.args[0])) for call in calls if isinstance(call.func, ast.Name) and call.args]
    return [(kind, message) for kind, message in pairs if message.strip()]


def template(node: ast.expr) -> str:
    """The text of a (formatted) string, with the expressions in it in braces and code style."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return escaped(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            escaped(str(part.value)) if isinstance(part, ast.Constant) else f"`{{{ast.unparse(part.value)}}}`"  # type: ignore[attr-defined]
            for part in node.values
        )
    return ""


def escaped(text: str) -> str:
    """Text whose marks Markdown would take as its own."""
    return re.sub(r"([\\`*_<>\[\]|#])", r"\\\1", text.replace("\n", " "))
