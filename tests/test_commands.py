"""The package's commands, ``python -m relubook COMMAND``."""

import json

import pytest

from relubook.__main__ import COMMANDS, main


def test_commands_hand_on_what_follows(capsys):
    assert main(["claims", "--json"]) == 0
    assert {"id", "verdict"} <= set(json.loads(capsys.readouterr().out)[0])


@pytest.mark.parametrize("arguments", [[], ["claim"]])
def test_other_words_are_refused_with_what_there_is(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    message = capsys.readouterr().err
    assert all(name in message for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_says_what_it_takes(command, capsys):
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    assert f"python -m relubook {command}" in capsys.readouterr().out
