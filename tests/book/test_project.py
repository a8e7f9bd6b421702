"""The project's own files keep step with each other."""

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import address
import install
import lock
import matplotlib as mpl
import notebooks
import pytest
import torch
import yaml
from torch import nn

import relubook

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins(text):
    lines = (line.split(" ;")[0].strip(" -") for line in text.splitlines())
    return {line for line in lines if re.fullmatch(r"[\w.-]+==[\w.+!-]+", line)}


def requirement_names(lines):
    return {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in lines}


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
    wanted = [line for extra in ("core", *lock.EXTRAS) for line in lock.extras()[extra]]
    assert requirement_names(wanted) <= requirement_names(pins(lock.LOCK.read_text()))


def test_site_lock_is_the_part_of_the_lock_that_the_site_needs():
    site = pins(lock.SITE_LOCK.read_text())
    assert site <= pins(lock.LOCK.read_text())
    names = requirement_names(site)
    assert requirement_names(lock.extras()["site"]) <= names
    assert not names & {"torch", "scipy", "transformers", "playwright"}


def test_what_the_site_reads_needs_no_torch():
    code = (
        "import sys\n"
        "for name in ('torch', 'numpy', 'pandas', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "from relubook.evidence.claims import ledger\n"
        "assert ledger()\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_uv_gets_the_sources_of_pip():
    listed = (
        ":env:.cert='/certificates.pem'\n"
        ":env:.find-links='/wheels file:///more wheels'\n"
        "global.find-links='/forgotten'\n"
        "global.index-url='https://first.example/simple'\n"
        "global.trusted-host='first.example'\n"
        "install.index-url='https://second.example/simple'\n"
        "wheel.index-url='https://third.example/simple'\n"
        "global.extra-index-url='\\nhttps://a.example/simple\\nhttps://b.example/simple'\n"
        "global.disable-pip-version-check='1'\n"
    )
    assert install.uv_variables(install.pip_settings(listed)) == {
        "SSL_CERT_FILE": "/certificates.pem",
        "UV_DEFAULT_INDEX": "https://second.example/simple",
        "UV_FIND_LINKS": "/wheels,file:///more,wheels",
        "UV_INDEX": "https://a.example/simple https://b.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_INSECURE_HOST": "first.example",
    }


@pytest.mark.parametrize(("uv", "pip", "status"), [(0, 1, 0), (1, 0, 0), (1, 1, 1)])
def test_pip_installs_what_uv_does_not(monkeypatch, capsys, uv, pip, status):
    commands = []

    def run(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, uv if "uv" in command else pip, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    assert install.install(["--requirement=some.lock"]) == status
    installers = [c[:4] for c in commands if "--requirement=some.lock" in c]
    expected = [[*install.UV, "install"][:4], [*install.PIP, "install"]]
    assert installers == expected[: 1 + (uv != 0)]
    assert ("pip does" in capsys.readouterr().out) == (uv != 0)


def test_core_asks_for_torch_alone_with_a_loose_bound():
    assert PROJECT["dependencies"] == ["torch>=2.6"]


@pytest.mark.slow
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


def test_type_checkers_see_the_public_names():
    stub = (Path(relubook.__file__).parent / "__init__.pyi").read_text(encoding="utf-8")
    listed = re.findall(r"^from relubook\.(\S+) import (\w+) as \2$", stub, re.M)
    for home, name in listed:
        assert relubook._HOME[name] in (home, f"{home}.{name}")
    assert sorted(name for _, name in listed) == relubook.__all__


def test_public_names_are_there_and_documented():
    assert relubook.__all__ == sorted(relubook._HOME)
    for name in relubook.__all__:
        assert name in dir(relubook)
        value = getattr(relubook, name)
        assert value.__doc__, name
        module = importlib.import_module(f"relubook.{relubook._HOME[name]}")
        if value is not module:
            assert name in module.__all__
            assert callable(value)
    with pytest.raises(AttributeError, match="no attribute 'diagnoze'"):
        _ = relubook.diagnoze


def examples():
    """Return the code that starts the package's page, and its table's example by name."""
    text = (ROOT / "book" / "api.md").read_text(encoding="utf-8")
    start = re.search(r"```python\n(.*?)```", text, re.S)[1]
    rows = re.findall(r"^\| (?:\{py:\w+\})?`(\w+)[^|]*\|[^|]+\| `([^|]+)` \|$", text, re.M)
    return start, dict(rows)


def test_every_public_name_has_an_example_that_runs(monkeypatch):
    start, rows = examples()
    assert set(rows) == set(relubook.__all__)
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: shown.append(data))
    scope = {}
    with mpl.rc_context(), torch.random.fork_rng():
        torch.manual_seed(0)
        exec(start, scope)
        for name, example in rows.items():
            assert f"rb.{name}" in example
            exec(example, scope)
    assert scope["report"].inputs == 200
    assert len(shown) == 1


def readme_example():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"## The package in three lines\n\n```python\n(.*?)```", text, re.S)[1]


def test_the_readme_s_example_runs():
    """Three lines, on a model with a dead unit: it is found and revived."""
    code = readme_example()
    assert len([line for line in code.splitlines() if line]) == 3
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([9.0, 9.0, -99.0, 9.0, 9.0, 9.0, 9.0, 9.0]))
    loader = [torch.randn(16, 3) for _ in range(4)]
    scope = {"model": model, "loader": loader, "batch": loader[0]}
    scope["optimizer"] = torch.optim.Adam(model.parameters())
    before = model(loader[0])
    exec(code, scope)
    assert scope["report"]["1"].dead.tolist() == [unit == 2 for unit in range(8)]
    torch.testing.assert_close(model(loader[0]), before)
    assert not relubook.diagnose(model, loader)["1"].dead.any()


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
    texts = [path.with_suffix(".md") for path in (clone / "book").rglob("*.ipynb")]
    original = {path: path.read_text(encoding="utf-8") for path in texts}
    stored = {path: notebooks.read_notebook(path) for path in texts}
    subprocess.run([sys.executable, tool, new], check=True, capture_output=True)
    for path, text in original.items():
        wanted = address.UNSET_NOTICE.sub("", text).replace(old, "somebody/another-name")
        assert len(wanted) > 0.98 * len(text)
        assert path.read_text(encoding="utf-8") == wanted
        before, after = stored[path], notebooks.read_notebook(path)
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


def test_table_of_contents_names_every_page_and_notebook():
    listed = re.findall(r"(?:root|file): (\S+)", (ROOT / "_toc.yml").read_text())
    pages = [*(ROOT / "book").glob("*.md"), *(ROOT / "book" / "evidence").glob("*.md")]
    paths = (path.relative_to(ROOT).with_suffix("").as_posix() for path in pages)
    assert sorted(listed) == sorted(paths)


def test_evidence_stands_under_its_chapter():
    parts = yaml.safe_load((ROOT / "_toc.yml").read_text())["parts"]
    entries = {entry["file"]: entry for part in parts for entry in part["chapters"]}
    for name in filter(notebooks.is_evidence, notebooks.texts()):
        *_, nested = entries[f"book/{name.removeprefix('evidence/')}"]["sections"]
        assert nested == {"file": f"book/{name}", "title": "Evidence"}


def test_every_room_has_a_page():
    rooms = {path.parent.name for path in (ROOT / "src" / "relubook").glob("*/__init__.py")}
    pages = (ROOT / "book").glob("api-*.md")
    assert rooms == {re.search(r"```\{room\} (\w+)", page.read_text())[1] for page in pages}


def test_questions_of_existing_chapters_are_answered():
    text = (ROOT / "book" / "questions.md").read_text(encoding="utf-8")
    for section in text.split("\n## ")[1:]:
        linked = re.findall(r"\((?:\./)?([\w-]+)\.ipynb\)", section)
        if any((ROOT / "book" / f"{name}.ipynb").exists() for name in linked):
            assert "In preparation" not in section, section.splitlines()[0]
        else:
            title = section.splitlines()[0].strip().lower().replace(" ", "-")
            assert not (ROOT / "book" / f"{title}.ipynb").exists(), title


def test_the_readme_lists_commands_that_there_are():
    targets = re.findall(r"^([a-z]+):.*?##", (ROOT / "Makefile").read_text(), re.M)
    for page in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert set(re.findall(r"\bmake ([a-z]+)\b[^\n]*[`|]", text)) <= set(targets), page


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
def test_makefile_lists_its_targets():
    text = (ROOT / "Makefile").read_text()
    listed = set(re.findall(r"^([a-z]+):.*?##", text, re.M))
    wanted = {"book", "test", "check", "notebooks", "record", "elsewhere", "verdicts", "full"}
    wanted |= {"serve", "bench", "lock", "clean"}
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
