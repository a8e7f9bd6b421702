"""The stored notebooks: each output belongs to the text beside it, and nothing in them is noise."""

import copy
import json
import os
import re
from pathlib import Path

import address
import nbformat
import notebooks
import pytest
import style

ROOT = Path(__file__).resolve().parents[2]
TEXTS = notebooks.texts()

pytestmark = pytest.mark.notebooks
each = pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)

SETUP = """\
# @title Setup: on Colab, installs the book's package first
import importlib.util

if importlib.util.find_spec("relubook") is None:
    %pip install --quiet "relubook[figures] @ git+{address}"
import relubook as rb

SEED = rb.setup()"""


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell):
    return set(cell.metadata.get("tags", []))


def stream(name, text):
    return nbformat.v4.new_output("stream", name=name, text=text)


def outputs(notebook):
    return [(cell, output) for cell in code_cells(notebook) for output in cell.outputs]


def test_every_pair_is_known_by_its_path():
    """A chapter and its evidence share the last part of their name."""
    assert "properties" in TEXTS
    stored = [*(ROOT / "book").rglob("*.ipynb")]
    assert {notebooks.notebook_of(text) for text in TEXTS.values()} == set(stored)
    for name, text in TEXTS.items():
        assert text == ROOT / "book" / f"{name}.md"


@each
def test_pair_agrees(text):
    stored = notebooks.read_notebook(text)
    assert notebooks.cell_facts(stored) == notebooks.cell_facts(notebooks.read_source(text))


@each
def test_stamp_is_fresh(text):
    assert notebooks.is_fresh(text), (
        f"{text.stem}: code, package or library versions changed since its outputs were "
        "computed; run make notebooks"
    )


@each
def test_every_cell_was_run_in_order(text):
    counts = [cell.execution_count for cell in code_cells(notebooks.read_notebook(text))]
    assert counts == list(range(1, len(counts) + 1))


@each
def test_outputs_hold_no_error_warning_path_or_time(text):
    stored = notebooks.read_notebook(text)
    assert not [o for _, o in outputs(stored) if o.output_type == "error"]
    assert not [o for _, o in outputs(stored) if o.get("name") == "stderr"]
    noise = re.compile(
        r"Warning|Traceback|/(?:home|root|tmp|usr|work|Users)/|\b[A-Z]:\\+\w|site-packages"
        r"|object at 0x[0-9a-f]+|\b20\d\d-\d\d-\d\d|\b\d\d:\d\d:\d\d\b|\d+it/s"
    )
    for cell, output in outputs(stored):
        data = {k: v for k, v in output.get("data", {}).items() if "image" not in k}
        found = noise.search(json.dumps(data) + output.get("text", ""))
        assert not found, f"{found[0]!r} in the output of\n{cell.source}"


@each
def test_stored_notebook_holds_only_what_repeats(text):
    stored = notebooks.read_notebook(text)
    assert notebooks.normalize(copy.deepcopy(stored), stored.metadata["relubook"]) == stored
    assert stored.metadata.kernelspec == notebooks.KERNELSPEC


@each
def test_cells_that_print_times_are_not_compared(text):
    for cell in code_cells(notebooks.read_notebook(text)):
        if "timing" in tags(cell):
            assert "nbval-ignore-output" in tags(cell), cell.source


@each
def test_setup_cell_makes_the_package_importable(text):
    first = code_cells(notebooks.read_source(text))[0]
    assert {"setup", "hide-cell", "nbval-ignore-output"} <= tags(first)
    assert first.source == SETUP.format(address=address.current())
    assert len(first.source.splitlines()) == 8


@each
def test_markdown_works_in_colab(text):
    """Colab and GitHub know neither directives nor roles, and open a chapter without its folder."""
    for cell in notebooks.read_source(text).cells:
        if cell.cell_type != "markdown":
            continue
        assert not re.search(r"^\s*(`{3,}|:{3,}|~{3,})\{", cell.source, re.M), cell.source
        assert not re.search(r"\{[a-z:-]+\}`", cell.source), cell.source
        assert not re.search(r"^\([\w-]+\)=", cell.source, re.M), cell.source
        assert not re.search(r"!\[[^\]]*\]\((?!https://)", cell.source), cell.source


@each
def test_figures_have_alternative_text(text):
    for cell, output in outputs(notebooks.read_notebook(text)):
        if any(mime.startswith("image/") for mime in output.get("data", {})):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt.split()) >= 8, f"say what the figure shows:\n{cell.source}"


@each
def test_code_is_formatted(text):
    written = text.read_text(encoding="utf-8")
    assert style.format_notebook(written) == written, "run make format"


@each
def test_claims_are_shown(text):
    """A check shows its card only when it ends its cell."""
    for cell in code_cells(notebooks.read_notebook(text)):
        if re.search(r"\)\s*\.(check|cite)\(", cell.source):
            assert any("text/html" in output.get("data", {}) for output in cell.outputs)


def eval_of(code):
    """Return the long string of some code: the docstring of f, or what ``but=`` says."""
    scope = {"part": lambda *_, but, **__: scope.update(said=but), "x": 1}
    exec(code, scope)
    return scope["f"].__doc__ if "f" in scope else scope["said"]


def test_long_titles_are_broken_where_their_lines_end():
    code = (
        "headline(\n    figure,\n"
        '    "A lower rate does not raise the dead;\\nreviving them is as good as a new start",\n)'
    )
    wanted = (
        'headline(\n    figure,\n    "A lower rate does not raise the dead;\\n"\n'
        '    "reviving them is as good as a new start",\n)'
    )
    assert style.format_code(code) == wanted
    assert style.format_code(wanted) == wanted
    sentence = "word " * 20
    broken = style.format_code(f'says(\n    x,\n    f"{sentence}{{x}}",\n)')
    assert max(map(len, broken.splitlines())) <= style.WIDTH
    for long in (
        f'part(\n    "so",\n    x,\n    at_least=0.5,\n    but="{sentence}",\n)',
        f'def f():\n    """{sentence}{sentence.strip()}."""\n    return 1',
    ):
        broken = style.format_code(long)
        assert max(map(len, broken.splitlines())) <= style.WIDTH
        assert " ".join(eval_of(broken).split()) == " ".join(eval_of(long).split())
        assert style.format_code(broken) == broken


@each
def test_papers_are_in_the_references(text):
    bibliography = (ROOT / "book" / "references.bib").read_text(encoding="utf-8").lower()
    written = text.read_text(encoding="utf-8")
    cited = re.findall(r"https://(?:doi\.org|arxiv\.org/abs)/[^\s)\"]+", written)
    for link in cited:
        key = link.removeprefix("https://doi.org/").removeprefix("https://arxiv.org/abs/").lower()
        assert key in bibliography, f"{link} is missing from references.bib"


class TestPipeline:
    """The guards above, seen to fail."""

    def edit(self, pair, old, new):
        text = pair.read_text(encoding="utf-8")
        assert old in text
        pair.write_text(text.replace(old, new, 1), encoding="utf-8")

    def test_edited_code_is_stale(self, pair):
        assert notebooks.is_fresh(pair)
        self.edit(pair, "[1e3, 1e6]", "[1e3, 1e7]")
        assert not notebooks.is_fresh(pair)
        with pytest.raises(AssertionError, match="changed since"):
            test_stamp_is_fresh(pair)

    def test_edited_prose_keeps_the_stamp_and_breaks_the_pair(self, pair):
        self.edit(pair, "It is *silent*", "Then it is *silent*")
        assert notebooks.is_fresh(pair)
        with pytest.raises(AssertionError):
            test_pair_agrees(pair)
        assert notebooks.refresh(pair) == "prose synced"
        test_pair_agrees(pair)
        assert notebooks.refresh(pair) == "unchanged"

    def test_changed_package_is_stale(self, pair, monkeypatch):
        monkeypatch.setattr(notebooks, "code_digest", lambda *code: "another package")
        assert not notebooks.is_fresh(pair)

    def test_changed_library_is_stale(self, pair, monkeypatch):
        monkeypatch.setattr(notebooks, "library_versions", lambda: {"torch": "99"})
        assert not notebooks.is_fresh(pair)

    def test_moved_project_keeps_its_stamps(self, pair):
        self.edit(pair, address.current(), "https://github.com/somebody/relubook")
        assert notebooks.is_fresh(pair)

    @pytest.mark.parametrize(
        ("old", "new"),
        [("# @title Setup", "# Setup"), ("import relubook as rb", "import relubook as rb, torch")],
    )
    def test_another_setup_cell_is_noticed(self, pair, old, new):
        self.edit(pair, old, new)
        with pytest.raises(AssertionError):
            test_setup_cell_makes_the_package_importable(pair)

    def test_raw_directive_is_noticed(self, pair):
        self.edit(pair, "## Tomorrow", "```{note}\nHello\n```\n\n## Tomorrow")
        with pytest.raises(AssertionError):
            test_markdown_works_in_colab(pair)

    def test_missing_alternative_text_is_noticed(self, pair):
        path = notebooks.notebook_of(pair)
        stored = json.loads(path.read_text(encoding="utf-8"))
        for cell in stored["cells"]:
            cell["metadata"].pop("mystnb", None)
        path.write_text(json.dumps(stored), encoding="utf-8")
        with pytest.raises(AssertionError, match="say what the figure shows"):
            test_figures_have_alternative_text(pair)

    def spoil(self, pair, change):
        path = notebooks.notebook_of(pair)
        stored = notebooks.read_notebook(pair)
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
    def test_noise_in_outputs_is_noticed(self, pair, text):
        self.spoil(pair, lambda cell: cell.outputs.append(stream("stdout", text)))
        with pytest.raises(AssertionError, match="in the output of"):
            test_outputs_hold_no_error_warning_path_or_time(pair)

    def test_stored_error_and_stderr_are_noticed(self, pair):
        for output in (stream("stderr", "hm"), nbformat.v4.new_output("error", ename="E")):
            self.spoil(pair, lambda cell, output=output: cell.outputs.append(output))
            with pytest.raises(AssertionError):
                test_outputs_hold_no_error_warning_path_or_time(pair)

    def test_cell_that_was_never_run_is_noticed(self, pair):
        self.spoil(pair, lambda cell: cell.update(execution_count=None))
        with pytest.raises(AssertionError):
            test_every_cell_was_run_in_order(pair)

    @pytest.mark.slow
    def test_two_runs_give_the_same_outputs(self, pair):
        """Apart from cells tagged timing, nothing differs between two runs on one machine."""
        runs = [notebooks.merge(pair) for _ in range(2)]
        for notebook in runs:
            notebooks.execute(notebook, record=False)
        stored = [notebooks.normalize(notebook, {}) for notebook in runs]
        for first, second in zip(*(notebook.cells for notebook in stored), strict=True):
            if "timing" not in tags(first):
                assert first == second

    def test_failed_write_leaves_the_old_notebook(self, pair, monkeypatch):
        path = notebooks.notebook_of(pair)
        before = path.read_bytes()
        self.edit(pair, "It is *silent*", "Then it is *silent*")

        def full_disk(*_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", full_disk)
        with pytest.raises(OSError, match="No space left"):
            notebooks.refresh(pair)
        assert path.read_bytes() == before
        assert {p.name for p in pair.parent.glob("*.*")} == {pair.name, path.name}


def test_recorded_verdicts_of_two_notebooks_meet_in_the_ledger(tmp_path, monkeypatch, capsys):
    """Notebooks that run at a time write to files of their own; the ledger keeps its order."""
    book, ledger = tmp_path / "book", tmp_path / "verdicts.json"
    (book / "evidence").mkdir(parents=True)
    source = (ROOT / "tests" / "book" / "model" / "evidence" / "toy.md").read_text()
    for name, one in (("one", "one-sided"), ("two", "cheap")):
        text = source.replace('claim("one-sided")', f'claim("{one}")')
        if name == "two":
            text = text.replace('claim("wide-boundary")', 'claim("saturation")')
        (book / "evidence" / f"{name}.md").write_text(text, encoding="utf-8")
    ledger.write_text('{"cheap": {"verdict": "old"}, "definition": {"verdict": "kept"}}')
    monkeypatch.setattr(notebooks, "BOOK", book)
    monkeypatch.setattr(notebooks, "LEDGER", ledger)
    monkeypatch.setattr("sys.argv", ["notebooks.py", "--record", "--jobs", "2"])
    notebooks.main()
    found = {k: v["verdict"] for k, v in json.loads(ledger.read_text()).items()}
    order = ["one-sided", "wide-boundary", "definition", "saturation", "cheap"]
    assert found == dict.fromkeys(order, "cited") | {"definition": "kept"}
    assert sorted(found, key=order.index) == list(found)
