"""The package's command, ``python -m relubook claims``."""

import json
import subprocess
import sys

import pytest

from relubook.__main__ import main


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
    with pytest.raises(SystemExit):
        main(arguments)
    assert "claims" in capsys.readouterr().err


def test_the_command_says_what_it_takes(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    shown = capsys.readouterr().out
    assert "python -m relubook" in shown
    assert "--json" in shown


@pytest.mark.slow
def test_module_runs():
    command = [sys.executable, "-m", "relubook", "claims", "--json"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert len(json.loads(output)) >= 87
