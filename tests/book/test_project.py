"""The project's own files keep step with each other."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import address
import lock
import notebooks
import pytest
import yaml

import relubook

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(text):
    lines = (line.split(" ;")[0].strip(" -") for line in text.splitlines())
    return {line for line in lines if re.fullmatch(r"[\w.-]+==[\w.+!-]+", line)}


def test_environment_has_the_versions_of_the_lock():
    locked = pins(lock.LOCK.read_text())
    environment = pins(lock.ENVIRONMENT.read_text())
    assert environment
    assert environment <= locked
    assert {name for name in lock.direct_requirements()} == {p.split("==")[0] for p in environment}
    content = yaml.safe_load(lock.ENVIRONMENT.read_text())
    assert "python=3.11" in content["dependencies"]


def test_lock_holds_what_anybody_can_install():
    text = lock.LOCK.read_text()
    assert "torch==2.13.0\n" in text
    assert "+cpu" not in text
    assert not re.search(r"^(nvidia|cuda|triton)", text, re.M)
    assert not re.search(r"://|file:|index-url|find-links", text)
    for marker in ("sys_platform == 'darwin'", "sys_platform != 'win32'", "python_full_version"):
        assert marker in text, "the lock must serve every platform and Python 3.11 to 3.13"


def test_lock_covers_every_requirement():
    names = {pin.split("==")[0].lower() for pin in pins(lock.LOCK.read_text())}
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *(r for e in lock.EXTRAS for r in extras[e])]
    assert {re.split(r"[<>=!~\[; ]", r)[0].lower() for r in wanted} <= names


def test_core_asks_for_torch_alone_with_a_loose_bound():
    assert PROJECT["dependencies"] == ["torch>=2.2"]


def test_core_imports_without_the_extras():
    """Neither figures nor tables are imported before somebody asks for one."""
    code = (
        "import sys\n"
        "for name in ('matplotlib', 'seaborn', 'pandas', 'scipy', 'statsmodels', 'sklearn',"
        " 'tqdm', 'IPython'):\n"
        "    sys.modules[name] = None\n"
        "import relubook\n"
        "for name in relubook.__all__:\n"
        "    getattr(relubook, name)\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_missing_extra_names_how_to_install_it(monkeypatch):
    from relubook._optional import require

    monkeypatch.setitem(sys.modules, "seaborn", None)
    with pytest.raises(ImportError, match=r'pip install "relubook\[figures\]"'):
        require("seaborn", "figures")


def test_public_names_are_there_and_documented():
    assert relubook.__all__ == sorted(relubook._HOME)
    for name in relubook.__all__:
        value = getattr(relubook, name)
        assert value.__doc__, name
        module = importlib.import_module(f"relubook.{relubook._HOME[name]}")
        assert name in module.__all__
        assert name in dir(relubook)
    with pytest.raises(AttributeError, match="no attribute 'diagnoze'"):
        _ = relubook.diagnoze


def test_version_is_semantic_and_in_the_changelog():
    assert re.fullmatch(r"\d+\.\d+\.\d+", relubook.__version__)
    assert f"## {relubook.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == relubook.__version__


def test_one_address():
    name = address.current().removeprefix("https://github.com/")
    assert "--" in name or re.fullmatch(r"[\w-]+/[\w.-]+", name)
    stragglers = {
        path.relative_to(ROOT).as_posix(): found
        for path in address.files()
        if (found := set(address.mentions(path)) - {name, "somebody/relubook"})
    }
    assert not stragglers
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["repository"]["branch"] == "main"


@pytest.mark.slow
def test_address_changes_everywhere(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    tool = clone / "book" / "_tools" / "address.py"
    new = "https://github.com/somebody/another-name"
    old = address.current().removeprefix("https://github.com/")
    chapters = [path.with_suffix(".md") for path in (clone / "book").glob("*.ipynb")]
    original = {path: path.read_text(encoding="utf-8") for path in chapters}
    stored = {path: notebooks.read_notebook(path) for path in chapters}
    subprocess.run([sys.executable, tool, new], check=True, capture_output=True)
    for chapter, text in original.items():
        wanted = address.UNSET_NOTICE.sub("", text).replace(old, "somebody/another-name")
        assert len(wanted) > 0.98 * len(text)
        assert chapter.read_text(encoding="utf-8") == wanted
        before, after = stored[chapter], notebooks.read_notebook(chapter)
        assert [c.get("outputs") for c in before.cells] == [c.get("outputs") for c in after.cells]
        assert before.metadata == after.metadata
    changed = [
        p for p in clone.rglob("*") if p.suffix in (".md", ".ipynb", ".yml", ".toml", ".cff")
    ]
    assert len(changed) > 10
    for path in changed:
        text = path.read_text(encoding="utf-8")
        assert old not in text, path
        assert "no public address" not in text, path
    assert yaml.safe_load((clone / "_config.yml").read_text())["repository"]["url"] == new
    refused = subprocess.run([sys.executable, tool, "nonsense"], capture_output=True, check=False)
    assert refused.returncode == 1


def test_table_of_contents_names_every_page_and_chapter():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = {toc["root"]} | {c["file"] for part in toc["parts"] for c in part["chapters"]}
    assert listed == {f"book/{path.stem}" for path in (ROOT / "book").glob("*.md")}


def test_landing_page_links_every_chapter():
    text = (ROOT / "book" / "intro.md").read_text(encoding="utf-8")
    for chapter in notebooks.chapters():
        assert f"{chapter.stem}.ipynb" in text or f"<{chapter.stem}>" in text, chapter


def test_questions_of_existing_chapters_are_answered():
    text = (ROOT / "book" / "questions.md").read_text(encoding="utf-8")
    for section in text.split("\n## ")[1:]:
        linked = re.findall(r"\((?:\./)?([\w-]+)\.ipynb\)", section)
        if any((ROOT / "book" / f"{name}.ipynb").exists() for name in linked):
            assert "In preparation" not in section, section.splitlines()[0]
        else:
            title = section.splitlines()[0].strip().lower().replace(" ", "-")
            assert not (ROOT / "book" / f"{title}.ipynb").exists(), title


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_makefile_lists_its_targets():
    text = (ROOT / "Makefile").read_text()
    listed = set(re.findall(r"^([a-z]+):.*?##", text, re.M))
    wanted = {"book", "test", "check", "notebooks", "serve", "bench", "lock", "clean"}
    assert wanted <= listed
    assert subprocess.run(
        ["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.count("make ") >= len(wanted)


def test_old_python_gets_one_clear_sentence():
    text = (ROOT / "Makefile").read_text()
    check = re.search(r"-c '(import sys; v = .*?)'$", text, re.M)[1].replace("$$", "$")
    code = check.replace("sys.version_info", "(3, 9, 1)")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("This book needs Python 3.11 or newer")
    assert len(result.stderr.strip().splitlines()) == 1
