"""What `pip install relubook` brings: a small wheel, typed, that torch alone makes run.

An environment is fresh: it holds links to a distribution and to what that requires, as installed
here, and nothing else. No index is asked, and pip refuses the wheel if it wants more.
"""

import json
import os
import re
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import relubook
from relubook.evidence.claims import ledger

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {path.stem for path in (ROOT / "book" / "results").glob("*.json")} - {"replications"}
README = re.search(
    r"## The package in three lines\n\n```python\n(.*?)```",
    (ROOT / "README.md").read_text(encoding="utf-8"),
    re.S,
)[1]

pytestmark = pytest.mark.slow


def run(python, *arguments, where):
    """Run a fresh environment's Python in a folder, warnings being errors; return its output."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RELUBOOK", "PYTHON"))}
    torchs_own = "ignore:Failed to initialize NumPy:UserWarning"
    command = [python, "-W", "error", "-W", torchs_own, *arguments]
    done = subprocess.run(command, cwd=where, env=clean, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def required(*names):
    """Return the installed distributions that some need, themselves among them."""
    waiting, found = list(names), {}
    while waiting:
        name = waiting.pop().lower()
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # what only another platform needs
        for line in found[name].requires or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return list(found.values())


def environment(folder, wheel, *names):
    """Make a fresh environment with some distributions, install the wheel, return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", ask, where=folder).strip())
    for each in required(*names):
        for top in {file.parts[0] for file in each.files or [] if file.parts[0] != ".."}:
            source = Path(each.locate_file(top))
            if source.exists() and top != "__pycache__" and not (site / top).exists():
                (site / top).symlink_to(source, target_is_directory=source.is_dir())
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-index", wheel]
    subprocess.run(pip, check=True)
    return python


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, ROOT]
    subprocess.run(build, check=True)
    (path,) = folder.glob(f"relubook-{relubook.__version__}-py3-*.whl")
    return path


@pytest.fixture(scope="module")
def torch_alone(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp("alone") / "env", wheel, "torch")


def test_the_wheel_is_small_and_holds_what_it_should(wheel):
    """Its weight is mostly the stored results, which the chapters draw in Colab."""
    assert wheel.stat().st_size < 1_000_000
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(metadata).decode())
    package = {path for path in (ROOT / "src").rglob("*.*") if path.suffix in (".py", ".pyi")}
    assert {path.relative_to(ROOT / "src").as_posix() for path in package} <= names
    assert {
        "relubook/py.typed",
        "relubook/evidence/claims.toml",
        "relubook/units/_page.html",
    } <= names
    assert {name.split("/")[0] for name in names} == {"relubook", metadata.split("/")[0]}
    assert {f"relubook/_results/{name}.json" for name in RESULTS} <= names
    assert [line for line in about.get_all("Requires-Dist") if "extra" not in line] == [
        "torch>=2.6"
    ]
    assert about["License-Expression"] == "MIT"
    assert "Typing :: Typed" in about.get_all("Classifier")
    assert any("CHANGELOG.md" in url for url in about.get_all("Project-URL"))
    assert README in about.get_payload()


def test_it_runs_with_torch_alone(torch_alone, tmp_path):
    code = (
        "import importlib.util, sys\n"
        "for name in ('numpy', 'pandas', 'matplotlib', 'scipy', 'sklearn', 'tqdm', 'IPython'):\n"
        "    assert importlib.util.find_spec(name) is None, name\n"
        "import torch\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1))\n"
        "optimizer = torch.optim.Adam(model.parameters())\n"
        "loader = [torch.randn(40, 3) for _ in range(3)]\n"
        "batch = loader[0]\n"
        "with torch.no_grad():\n"
        "    model[0].bias[:2] = -99\n"
        f"{README}\n"
        "assert report['1'].dead.tolist() == [True] * 2 + [False] * 6, report\n"
        "assert not rb.diagnose(model, loader)['1'].dead.any()\n"
        "assert 'ADVICE' in repr(report)\n"
        "with rb.Watch(model, window=1) as watch:\n"
        "    model(batch).sum().backward()\n"
        "assert watch.compute()['1'].units == 8\n"
        "assert 0 <= rb.off_center(loader) < 0.2\n"
        "assert rb.certify_dead(model, -1.0, 1.0).sites\n"
        "y = torch.zeros(40, 1)\n"
        "assert rb.train(rb.Recipe(3, 4, 1).stack(2), batch, y, steps=2, lr=0.1).dead.ndim == 3\n"
        "assert rb.Maxout(3, 2, pieces=2)(batch).shape == (40, 2)\n"
        "for call in (report.to_frame, report.plot, rb.setup):\n"
        "    try:\n"
        "        call()\n"
        "    except ImportError as error:\n"
        "        assert 'relubook[figures]' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(call)\n"
    )
    run(torch_alone, "-c", code, where=tmp_path)


def test_it_has_what_it_reads(torch_alone, tmp_path):
    """The ledger and the stored results work outside of the repository."""
    assert (
        json.loads(run(torch_alone, "-m", "relubook", "claims", "--json", where=tmp_path))
        == ledger()
    )
    code = (
        "import sys\n"
        "from relubook.evidence.results import load\n"
        "for name in sys.argv[1:]:\n"
        "    assert load(name).cells, name\n"
    )
    assert RESULTS
    run(torch_alone, "-c", code, *sorted(RESULTS), where=tmp_path)


def test_the_readme_s_three_lines_work_on_a_model_of_transformers(wheel, tmp_path):
    """OPT, whose feed-forward layers are ReLUs, on batches such as its tokenizer makes."""
    python = environment(tmp_path / "env", wheel, "torch", "transformers")
    code = (
        "import importlib.util\n"
        "assert importlib.util.find_spec('pandas') is None\n"
        "import torch, transformers\n"
        "torch.manual_seed(0)\n"
        "config = transformers.OPTConfig(vocab_size=60, hidden_size=16, word_embed_proj_dim=16,\n"
        "    ffn_dim=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32)\n"
        "model = transformers.OPTForCausalLM(config).eval()\n"
        "optimizer = torch.optim.AdamW(model.parameters())\n"
        "for layer in model.model.decoder.layers:\n"
        "    layer.fc1.bias.data[:3] = -99\n"
        "ids = torch.randint(3, 60, (24, 9))\n"
        "ones = torch.ones(9, dtype=torch.long)\n"
        "items = [{'input_ids': i, 'attention_mask': ones, 'labels': i} for i in ids]\n"
        "loader = torch.utils.data.DataLoader(items, batch_size=8)\n"
        "batch = next(iter(loader))\n"
        "before = model(**batch).logits\n"
        f"{README}\n"
        "dead = [int(site.dead.sum()) for site in report]\n"
        "assert len(dead) == 2 and min(dead) >= 3 and report.inputs == 24, report\n"
        "assert torch.equal(model(**batch).logits, before)\n"
        "left = [int(site.dead.sum()) for site in rb.diagnose(model, loader)]\n"
        "assert left == [0, 0], left\n"
    )
    run(python, "-c", code, where=tmp_path)


USES = """import torch
import relubook as rb
from relubook.units.report import SiteReport
from relubook.units.watch import Event

model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU())
report = rb.diagnose(model, [torch.randn(4, 3)], family="all")
site: SiteReport = report["1"]
dead: torch.Tensor = site.dead & site.at_risk
with rb.Watch(model, window=2) as watch:
    model(torch.randn(4, 3))
events: list[Event] = watch.history
revived: int = rb.revive_(model, report).total
ratio: float = rb.off_center(torch.ones(2, 2))
"""
MISUSES = {
    'rb.diagnose(model, [], family="some")': "arg-type",
    "rb.diagnoze(model, [])": "attr-defined",
    "report.sites[0].ded": "attr-defined",
    "rb.Watch(model, window=0.5)": "arg-type",
    "word: str = rb.off_center([])": "assignment",
}


def test_a_user_s_file_is_checked_against_it(torch_alone, tmp_path):
    (tmp_path / "user.py").write_text(USES + "\n".join(MISUSES) + "\n", encoding="utf-8")
    options = ["--python-executable", torch_alone, "--strict", "--no-incremental", "user.py"]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")},
    )
    first = len(USES.splitlines()) + 1
    found = re.findall(r"^user.py:(\d+): error: .*\[([\w-]+)\]$", done.stdout, re.M)
    assert found == [(str(first + k), code) for k, code in enumerate(MISUSES.values())], done.stdout
