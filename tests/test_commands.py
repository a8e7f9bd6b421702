"""The package's commands, ``python -m relubook claims`` and ``python -m relubook diagnose``."""

import json
import subprocess
import sys

import pytest
import torch

from relubook.__main__ import main
from relubook.units.report import Report


def test_the_ledger_is_printed_for_readers_and_for_programs(capsys):
    assert main(["claims"]) == 0
    table = capsys.readouterr().out
    assert "one-sided" in table
    assert "claims have a verdict" in table
    assert main(["claims", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"id", "statement", "chapter", "verdict", "parts"} <= set(rows[0])


@pytest.mark.parametrize("arguments", [[], ["claim"]])
def test_other_words_are_refused_with_what_there_is(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    shown = capsys.readouterr().err
    assert "claims" in shown
    assert "diagnose" in shown


@pytest.mark.parametrize(
    ("command", "option"),
    [([], "diagnose"), (["claims"], "--json"), (["diagnose"], "--max-dead")],
)
def test_the_command_says_what_it_takes(command, option, capsys):
    with pytest.raises(SystemExit) as left:
        main([*command, "--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m relubook" in shown
    assert option in shown


MODULE = """
import sys
import torch
from torch import nn
import relubook as rb

def half_dead():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU())
    nn.init.constant_(model[0].bias, 100)
    nn.init.constant_(model[0].bias[:2], -100)
    return model, torch.randn(20, 3)

def reported():
    return rb.diagnose(*half_dead(), forward=lambda model, batch: model(batch))

def nonfinite():
    model, x = half_dead()
    nn.init.constant_(model[0].bias, torch.nan)
    return model, x

def alone():
    return half_dead()[0]

def no_rectifier():
    return nn.Linear(3, 3), torch.randn(2, 3)

def breaks():
    raise AssertionError("the function's own")

def leaves():
    sys.exit(0)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "checked.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    yield
    sys.modules.pop("checked", None)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["checked:half_dead"], 1),
        (["checked:half_dead", "--max-dead", "0.49"], 1),
        (["checked:half_dead", "--max-dead", "0.5"], 0),
        (["checked:reported", "--max-dead", "0.5"], 0),
        (["checked:nonfinite", "--max-dead", "1"], 1),
    ],
)
def test_the_exit_code_says_whether_a_model_is_alive(module, arguments, code, capsys):
    assert main(["diagnose", *arguments]) == code
    shown, faults = capsys.readouterr()
    assert "median rate" in shown
    assert bool(faults) == bool(code)
    assert "Traceback" not in faults


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["checked:absent"], "absent"),
        (["not_there:build"], "not_there"),
        (["checked"], "module"),
        (["checked:alone"], "checked:alone returns neither (model, data) nor a Report"),
        (["checked:no_rectifier"], "the model called no rectifier"),
        (["checked:breaks"], "the function's own"),
        (["checked:leaves"], "SystemExit"),
        (["checked:half_dead", "--max-dead", "40"], "from 0 to 1, not 40"),
        (["checked:half_dead", "--max-dead", "nan"], "from 0 to 1, not nan"),
        (["checked:half_dead", "--html", "absent/page.html"], "absent"),
        (["checked:half_dead", "--save", "absent/report"], "absent"),
    ],
)
def test_wrong_use_is_told_from_a_dead_model(module, arguments, message, capsys, tmp_path):
    before = sorted(path.name for path in tmp_path.iterdir() if path.suffix)
    assert main(["diagnose", *arguments]) == 2
    shown, faults = capsys.readouterr()
    assert message in faults
    assert shown == ""
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == before


def test_the_report_is_written_also_if_units_are_dead(module, tmp_path):
    (tmp_path / "page.html").write_text("old")
    options = ["--html", "page.html", "--save", "kept.report"]
    assert main(["diagnose", "checked:half_dead", *options]) == 1
    assert "<h1>Dead units: checked:half_dead</h1>" in (tmp_path / "page.html").read_text("utf-8")
    assert torch.equal(Report.load("kept.report")[0].dead, torch.tensor([1, 1, 0, 0]).bool())


@pytest.mark.slow
def test_module_runs(module):
    command = [sys.executable, "-m", "relubook"]
    output = subprocess.run([*command, "claims", "--json"], capture_output=True, check=True).stdout
    assert len(json.loads(output)) >= 87
    for most, code in (("0.1", 1), ("0.5", 0)):
        check = [*command, "diagnose", "checked:half_dead", "--max-dead", most]
        done = subprocess.run(check, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert "2 dead units (50.0%)" in done.stdout
