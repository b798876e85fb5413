"""Documents lead somewhere: links, anchors, pictures, and the commands of their code blocks."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import train
from dataset.prepare.__main__ import parse_args as prepare_flags
from report.compare import parse_args as compare_flags
from report.paper import parse_args as paper_flags
from report.reproduce import parse_args as reproduce_flags

REPO = Path(__file__).resolve().parents[1]
README, DOCS = REPO / "README.md", REPO / "docs"
PAGES = [README, REPO / "CONTRIBUTING.md", REPO / "CHANGELOG.md", REPO / "data" / "README.md",
         *sorted(DOCS.glob("*.md")), *sorted((REPO / "examples").glob("*.md"))]  # fmt: skip
PICTURES = {".png", ".svg", ".jpg"}
TRAINERS = {"train.py", "run_train.sh", "run_baseline.sh", "run_official.sh", "slurm.sbatch"}
COMPARISONS = {"run_compare.sh": compare_flags, "paper.sh": paper_flags, "reproduce.sh": reproduce_flags}
FENCE = re.compile(r"^```.*?^```", re.S | re.M)


def links(text: str) -> list[str]:
    """Targets of Markdown links and of HTML pictures outside code, without those on the web."""
    text = re.sub(r"`[^`\n]*`", "", FENCE.sub("", text))
    found = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset|href)="([^"]+)"', text)
    return [target for target in found if not re.match(r"https?:|mailto:", target)]


def anchors(text: str) -> set[str]:
    """Ids that GitHub gives the headings: lower case, words joined by hyphens, other signs dropped."""
    headings = re.findall(r"^#+ (.+?)\s*$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken(page: Path, text: str) -> list[str]:
    """Links of `page` that lead nowhere. `../../actions/` is an address of GitHub's, relative to the page there."""
    wrong = []
    for target in links(text):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if name.startswith("../../actions/workflows/"):
            path, anchor = REPO / ".github" / "workflows" / name.split("/")[4], ""
        read = path.is_file() and path.suffix == ".md"
        content = text if path == page else path.read_text(encoding="utf-8") if read else ""
        if not path.exists() or (anchor and anchor not in anchors(content)):
            wrong.append(target)
    return wrong


def block_commands(text: str) -> list[list[str]]:
    """Words of every `python ...`, `bash ...` and `sbatch ...` command in code blocks, also behind `do` in a loop.

    A variable has the value that its block gives it: `name="..."`, or the first word of `for name in ...`.
    """
    found = []
    for block in FENCE.findall(text):
        block = block.replace("\\\n", " ")
        values = dict(re.findall(r'^(\w+)="([^"]*)"', block, re.M) + re.findall(r"\bfor (\w+) in (\S+)", block))
        for line in re.findall(r"^\s*(?:for .*; do )?((?:python|bash|sbatch) .*?)(?:; done)?$", block, re.M):
            for name, value in values.items():
                line = re.sub(rf"\${name}\b", lambda _, value=value: value, line)
            found.append(shlex.split(line, comments=True))
    return found


def commands(text: str) -> list[list[str]]:
    """Words of the commands in code blocks, and of those between backticks."""
    spans = re.findall(r"`((?:python|bash) [^`\n]+)`", FENCE.sub("", text))
    return block_commands(text) + [shlex.split(span, comments=True) for span in spans]


def check_module(name: str, words: list[str]) -> None:
    """Raise if `python -m name` has no file or its `parse_args` refuses the words."""
    if name in ("venv", "pytest"):
        return
    path = REPO / name.replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), name
    module = importlib.import_module(name if path.with_suffix(".py").is_file() else f"{name}.__main__")
    getattr(module, "parse_args", list)(words)


def check_command(words: list[str]) -> None:
    """Raise if a script or module is missing or its parser refuses a flag. What flags need of the disk is not asked."""
    if words[0] == "sbatch":  # its own options come before the script
        words = words[words.index("scripts/slurm.sbatch") - 1 :]
    program, rest = words[1], [word for word in words[2:] if word != "--help"]
    if program == "-m":
        check_module(rest[0], rest[1:])
        return
    assert (REPO / program).is_file(), program
    name, parser = Path(program).name, train.make_parser()
    if name in TRAINERS:
        parser.parse_args(rest)
    elif name in COMPARISONS:
        parser.parse_args(COMPARISONS[name](rest)[1])
    elif name == "prepare.sh":
        prepare_flags(rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_every_link_leads_somewhere(page):
    assert broken(page, page.read_text(encoding="utf-8")) == []


def test_broken_links_are_found():
    text = "[a](nowhere.md) [b](LICENSE) [b](none.md#x) [c](docs/clusters.md#no-such)\n"
    text += "[d](#here) ![e](docs/x.png)\n# Here\n"
    assert broken(README, text) == ["nowhere.md", "none.md#x", "docs/clusters.md#no-such", "docs/x.png"]
    assert broken(README, '<img src="docs/none.svg"> [t](../../actions/workflows/no.yml/badge.svg)\n') == [
        "../../actions/workflows/no.yml/badge.svg",
        "docs/none.svg",
    ]


def bare_formulas(text: str) -> list[str]:
    """Formulas written as $...$ or $$...$$, outside code. GitHub's Markdown removes their backslashes before signs."""
    text = re.sub(r"\$`[^`\n]*`\$|`[^`\n]*`", "", FENCE.sub("", text))
    return re.findall(r"\$\$[^$]+\$\$|\$[^$\n]+\$", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_formulas_are_written_as_github_reads_them(page):
    r"""As $`...`$ or ```math. GitHub shows `\,` of $...$ as a comma (github/markup, issue 1746)."""
    assert bare_formulas(page.read_text(encoding="utf-8")) == []


def test_bare_formulas_are_found():
    text = "$`a\\,b`$ and `$x` $c\\,d$\n```math\n\\|e\\|\n```\n$$f\n+ g$$\n"
    assert bare_formulas(text) == ["$c\\,d$", "$$f\n+ g$$"]


def test_every_picture_of_docs_is_linked():
    linked = {(page.parent / target).resolve() for page in PAGES for target in links(page.read_text(encoding="utf-8"))}
    assert [p.name for p in sorted(DOCS.rglob("*")) if p.suffix in PICTURES and p not in linked] == []


def test_the_index_lists_every_page():
    listed = links((DOCS / "README.md").read_text(encoding="utf-8"))
    pages = {page.name for page in DOCS.glob("*.md")} - {"README.md", "paper.md"}
    assert pages <= set(listed)


def test_readme_has_900_words_at_most():
    assert len(README.read_text(encoding="utf-8").split()) <= 900


def check_commands(found: list[list[str]]) -> None:
    for words in found:
        try:
            check_command(words)
        except (Exception, SystemExit) as reason:
            pytest.fail(f"{shlex.join(words)}: {reason}")


@pytest.mark.parametrize("page", [README, DOCS / "getting-started.md"], ids=lambda page: page.name)
def test_commands_exist_and_their_flags_are_accepted(page):
    found = commands(page.read_text(encoding="utf-8"))
    assert len(found) >= 8
    check_commands(found)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent == DOCS], ids=lambda page: page.name)
def test_commands_of_code_blocks(page):
    """A page may list a program that the reader saves, such as make_mine.py of own-data.md: its text names the file."""
    text = page.read_text(encoding="utf-8")
    saved = set(re.findall(r"`(\w+\.py)`", FENCE.sub("", text))) - {path.name for path in REPO.glob("*.py")}
    check_commands([words for words in block_commands(text) if words[1] not in saved])


def test_variables_and_loops_are_read():
    text = '```\nflags="--seeds 0"\nbash a.sh $flags \\\n --x  # why\nfor m in u v; do python b.py --y $m; done\n```'
    assert block_commands(text) == [["bash", "a.sh", "--seeds", "0", "--x"], ["python", "b.py", "--y", "u"]]


WRONG = ["bash scripts/none.sh", "python train.py --trane", "bash scripts/run_train.sh --epochs x", "python -m nowhere",
         "python -m dataset.prepare --chek X", "python -m report --modl X", "bash scripts/run_compare.sh --sees 1",
         "bash scripts/reproduce.sh cremad RAW --estimat", "bash scripts/reproduce.sh crema RAW",
         "bash scripts/prepare.sh --tabel X", "sbatch --gpus=4 scripts/slurm.sbatch --nam X",
         "python -m benchmarks.epoch --setings all", "for m in a b; do python train.py --methd $m; done"]  # fmt: skip


@pytest.mark.parametrize("line", WRONG)
def test_wrong_commands_are_found(line):
    with pytest.raises((Exception, SystemExit)):
        check_command(commands(f"```\n{line}\n```")[0])
