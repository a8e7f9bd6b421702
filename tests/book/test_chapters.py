"""The stored chapters: every output belongs to the text beside it, and nothing in them is noise."""

import copy
import json
import re
from pathlib import Path

import address
import nbformat
import notebooks
import pytest
import style

from relubook.evidence.claims import ledger

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = {path.stem: path for path in notebooks.chapters()}

pytestmark = pytest.mark.notebooks
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS.values(), ids=CHAPTERS)

SETUP = """\
# @title Setup: installs the book's package only where it is missing
import importlib.util

if importlib.util.find_spec("relubook") is None:
{notice}    %pip install --quiet "relubook[figures] @ git+{address}"
    importlib.invalidate_caches()
"""
UNSET_NOTICE = """\
    # While the book has no public address, this line fails:
    # clone the project, run `pip install -e ".[figures]"` in it, and start again.
"""


def setup_code():
    url = address.current()
    notice = UNSET_NOTICE if url == address.UNSET else ""
    return SETUP.format(address=url, notice=notice)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def stream(name, text):
    return nbformat.v4.new_output("stream", name=name, text=text)


def outputs(notebook):
    return [(cell, output) for cell in code_cells(notebook) for output in cell.outputs]


def test_there_are_chapters():
    assert "properties" in CHAPTERS


def test_every_notebook_has_its_text():
    assert {p.stem for p in (ROOT / "book").glob("*.ipynb")} == set(CHAPTERS)


@each_chapter
def test_pair_agrees(chapter):
    stored = notebooks.read_notebook(chapter)
    assert notebooks.cell_facts(stored) == notebooks.cell_facts(notebooks.read_source(chapter))


@each_chapter
def test_stamp_is_fresh(chapter):
    assert notebooks.is_fresh(chapter), (
        f"{chapter.stem}: code, package or library versions changed since its outputs were "
        "computed; run make notebooks"
    )


@each_chapter
def test_every_cell_was_run_in_order(chapter):
    counts = [cell.execution_count for cell in code_cells(notebooks.read_notebook(chapter))]
    assert counts == list(range(1, len(counts) + 1))


@each_chapter
def test_outputs_hold_no_error_warning_path_or_time(chapter):
    stored = notebooks.read_notebook(chapter)
    assert not [o for _, o in outputs(stored) if o.output_type == "error"]
    assert not [o for _, o in outputs(stored) if o.get("name") == "stderr"]
    noise = re.compile(
        r"Warning|Traceback|/(?:home|root|tmp|usr|work|Users)/|\b[A-Z]:\\+\w|site-packages"
        r"|object at 0x[0-9a-f]+|\b20\d\d-\d\d-\d\d|\b\d\d:\d\d:\d\d\b|\d+it/s"
    )
    for cell, output in outputs(stored):
        text = json.dumps({k: v for k, v in output.get("data", {}).items() if "image" not in k})
        text += output.get("text", "")
        assert not noise.search(text), f"{noise.search(text)[0]!r} in the output of\n{cell.source}"


@each_chapter
def test_stored_notebook_holds_only_what_repeats(chapter):
    stored = notebooks.read_notebook(chapter)
    assert notebooks.normalize(copy.deepcopy(stored), stored.metadata["relubook"]) == stored
    assert stored.metadata.kernelspec == notebooks.KERNELSPEC


@each_chapter
def test_cells_that_print_times_are_not_compared(chapter):
    for cell in code_cells(notebooks.read_notebook(chapter)):
        if "timing" in tags(cell):
            assert "nbval-ignore-output" in tags(cell), cell.source


@each_chapter
def test_setup_cell_makes_the_package_importable(chapter):
    first = code_cells(notebooks.read_source(chapter))[0]
    assert {"setup", "nbval-ignore-output"} <= tags(first)
    assert first.source.startswith(setup_code())
    assert first.source.rstrip().endswith("relubook.setup()")


@each_chapter
def test_markdown_works_in_colab(chapter):
    """Colab and GitHub know neither directives nor roles, and open a chapter without its folder."""
    for cell in notebooks.read_source(chapter).cells:
        if cell.cell_type != "markdown":
            continue
        assert not re.search(r"^\s*(`{3,}|:{3,}|~{3,})\{", cell.source, re.M), cell.source
        assert not re.search(r"\{[a-z:-]+\}`", cell.source), cell.source
        assert not re.search(r"^\([\w-]+\)=", cell.source, re.M), cell.source
        assert not re.search(r"!\[[^\]]*\]\((?!https://)", cell.source), cell.source


@each_chapter
def test_figures_have_alternative_text(chapter):
    for cell, output in outputs(notebooks.read_notebook(chapter)):
        if any(mime.startswith("image/") for mime in output.get("data", {})):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt.split()) >= 8, f"say what the figure shows:\n{cell.source}"


@each_chapter
def test_code_is_formatted(chapter):
    text = chapter.read_text(encoding="utf-8")
    assert style.format_chapter(text) == text, "run make format"


@each_chapter
def test_anatomy(chapter):
    """Answer, aims, claims, time on top; summary, exercises with solutions, reading at the end."""
    source = notebooks.read_source(chapter)
    prose = "\n".join(cell.source for cell in source.cells if cell.cell_type == "markdown")
    opening = prose.split("\n## ")[0]
    assert opening.startswith("# ")
    for needed in ("You will see", "Claims tested here", "Running time"):
        assert needed in opening
    for needed in ("## Summary", "## Exercises", "## Further reading"):
        assert needed in prose
    solutions = [cell for cell in code_cells(source) if "solution" in tags(cell)]
    assert len(solutions) == len(re.findall(r"^\*\*\d+\.\*\*", prose, re.M)) >= 3
    for cell in solutions:
        assert "hide-cell" in tags(cell)
        assert cell.metadata.get("cellView") == "form"
        assert cell.source.startswith("# @title Solution")
    assert "running_time()" in code_cells(source)[-1].source


@each_chapter
def test_length(chapter):
    """A chapter is read in one sitting, and a cell at a glance; longer code is the package's."""
    source = notebooks.read_source(chapter)
    prose = "\n".join(cell.source for cell in source.cells if cell.cell_type == "markdown")
    no_words = r"\$[^$]*\$|`[^`]*`|\(https?://[^)]*\)"
    words = len(re.findall(r"[A-Za-z][A-Za-z'’]*", re.sub(no_words, " ", prose)))
    assert 1800 <= words <= 3500
    for cell in code_cells(source):
        if not tags(cell) & {"setup", "solution"} and "claim(" not in cell.source:
            assert len(cell.source.splitlines()) <= 22, cell.source


@each_chapter
def test_running_time(chapter):
    """Read off what the stored run printed, since processors differ."""
    last = code_cells(notebooks.read_notebook(chapter))[-1]
    (seconds,) = re.findall(r"(\d+) seconds", last.outputs[0].text)
    assert int(seconds) < 90


def test_each_settled_claim_is_checked_once_in_its_chapter():
    places: dict[str, list[str]] = {}
    for name, chapter in CHAPTERS.items():
        for cell in code_cells(notebooks.read_source(chapter)):
            for claim_id in re.findall(
                r"claim\(\s*\"([\w-]+)\"\s*\)\.(?:check|cite)\(", cell.source
            ):
                places.setdefault(claim_id, []).append(name)
    rows = {row["id"]: row for row in ledger()}
    assert places.keys() <= rows.keys()
    for claim_id, chapters in places.items():
        assert chapters == [rows[claim_id]["chapter"]], claim_id
        assert rows[claim_id]["verdict"] is not None, f"{claim_id}: run make record"
    assert {claim_id for claim_id, row in rows.items() if row["verdict"]} == set(places)


def test_every_claim_of_a_chapter_is_settled_there():
    for row in ledger():
        if row["chapter"] in CHAPTERS:
            assert row["verdict"] is not None, f"{row['id']} waits for its test"


@each_chapter
def test_claims_are_shown(chapter):
    """A check shows its card only when it ends its cell."""
    for cell in code_cells(notebooks.read_notebook(chapter)):
        if re.search(r"\)\.(check|cite)\(", cell.source):
            assert any("text/html" in output.get("data", {}) for output in cell.outputs)


@each_chapter
def test_papers_are_in_the_references(chapter):
    bibliography = (ROOT / "book" / "references.bib").read_text(encoding="utf-8").lower()
    text = chapter.read_text(encoding="utf-8")
    cited = re.findall(r"https://(?:doi\.org|arxiv\.org/abs)/[^\s)\"]+", text)
    for link in cited:
        key = link.removeprefix("https://doi.org/").removeprefix("https://arxiv.org/abs/").lower()
        assert key in bibliography, f"{link} is missing from references.bib"


class TestPipeline:
    """The guards above, seen to fail."""

    @pytest.fixture
    def chapter(self, tmp_path):
        text = CHAPTERS["properties"]
        for path in (text, notebooks.notebook_of(text)):
            (tmp_path / path.name).write_bytes(path.read_bytes())
        return tmp_path / text.name

    def edit(self, chapter, old, new):
        text = chapter.read_text(encoding="utf-8")
        assert old in text
        chapter.write_text(text.replace(old, new, 1), encoding="utf-8")

    def test_edited_code_is_stale(self, chapter):
        assert notebooks.is_fresh(chapter)
        self.edit(chapter, "t = 0.1\n", "t = 0.2\n")
        assert not notebooks.is_fresh(chapter)
        with pytest.raises(AssertionError, match="changed since"):
            test_stamp_is_fresh(chapter)

    def test_edited_prose_keeps_the_stamp_and_breaks_the_pair(self, chapter):
        self.edit(chapter, "**The answer first.**", "**In short.**")
        assert notebooks.is_fresh(chapter)
        with pytest.raises(AssertionError):
            test_pair_agrees(chapter)
        assert notebooks.refresh(chapter) == "prose synced"
        test_pair_agrees(chapter)
        assert notebooks.refresh(chapter) == "unchanged"

    def test_changed_package_is_stale(self, chapter, monkeypatch):
        monkeypatch.setattr(notebooks, "code_digest", lambda *code, exclude: "another package")
        assert not notebooks.is_fresh(chapter)

    def test_changed_library_is_stale(self, chapter, monkeypatch):
        monkeypatch.setattr(notebooks, "library_versions", lambda: {"torch": "99"})
        assert not notebooks.is_fresh(chapter)

    def test_moved_project_keeps_its_stamps(self, chapter):
        self.edit(chapter, address.current(), "https://github.com/somebody/relubook")
        assert notebooks.is_fresh(chapter)

    def test_missing_setup_cell_is_noticed(self, chapter):
        self.edit(chapter, "# @title Setup", "# Setup")
        with pytest.raises(AssertionError):
            test_setup_cell_makes_the_package_importable(chapter)

    def test_raw_directive_is_noticed(self, chapter):
        self.edit(chapter, "## Summary", "```{note}\nHello\n```\n\n## Summary")
        with pytest.raises(AssertionError):
            test_markdown_works_in_colab(chapter)

    def test_missing_alternative_text_is_noticed(self, chapter):
        path = notebooks.notebook_of(chapter)
        stored = json.loads(path.read_text(encoding="utf-8"))
        for cell in stored["cells"]:
            cell["metadata"].pop("mystnb", None)
        path.write_text(json.dumps(stored), encoding="utf-8")
        with pytest.raises(AssertionError, match="say what the figure shows"):
            test_figures_have_alternative_text(chapter)

    def spoil(self, chapter, change):
        path = notebooks.notebook_of(chapter)
        stored = notebooks.read_notebook(chapter)
        change(next(c for c in stored.cells if c.cell_type == "code" and c.outputs))
        nbformat.write(stored, path)

    @pytest.mark.parametrize(
        "text",
        [
            "UserWarning: deprecated",
            "saved to /home/somebody/x.png",
            "C:\\Users\\somebody",
            "<object object at 0x7f00aa>",
            "2026-11-21",
            "at 12:30:59",
        ],
    )
    def test_noise_in_outputs_is_noticed(self, chapter, text):
        self.spoil(chapter, lambda cell: cell.outputs.append(stream("stdout", text)))
        with pytest.raises(AssertionError, match="in the output of"):
            test_outputs_hold_no_error_warning_path_or_time(chapter)

    def test_stored_error_and_stderr_are_noticed(self, chapter):
        for output in (stream("stderr", "hm"), nbformat.v4.new_output("error", ename="E")):
            self.spoil(chapter, lambda cell, output=output: cell.outputs.append(output))
            with pytest.raises(AssertionError):
                test_outputs_hold_no_error_warning_path_or_time(chapter)

    def test_cell_that_was_never_run_is_noticed(self, chapter):
        self.spoil(chapter, lambda cell: cell.update(execution_count=None))
        with pytest.raises(AssertionError):
            test_every_cell_was_run_in_order(chapter)

    @pytest.mark.slow
    def test_two_runs_give_the_same_outputs(self, chapter):
        """Apart from cells tagged timing, nothing differs between two runs on one machine."""
        runs = [notebooks.merge(chapter) for _ in range(2)]
        for notebook in runs:
            notebooks.execute(notebook, record=False)
        stored = [notebooks.normalize(notebook, {}) for notebook in runs]
        for first, second in zip(*(notebook.cells for notebook in stored), strict=True):
            if "timing" not in tags(first):
                assert first == second

    def test_failed_write_leaves_the_old_notebook(self, chapter, monkeypatch):
        path = notebooks.notebook_of(chapter)
        before = path.read_bytes()
        self.edit(chapter, "**The answer first.**", "**In short.**")

        def full_disk(self, *_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            notebooks.refresh(chapter)
        assert path.read_bytes() == before
        assert {p.name for p in chapter.parent.iterdir()} == {chapter.name, path.name}
