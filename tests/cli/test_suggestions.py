"""A misspelt option of the command line is answered with the one that was probably meant."""

import pytest

from tractkit.cli.commands import parser


@pytest.mark.parametrize(("words", "meant"), [
    (["demo", "--epohcs", "3"], "--epochs"),
    (["hdf5", "create", "study", "out.hdf5", "config.json", "--overwite"], "--overwrite"),
    (["--verison"], "--version"),
    (["train", "--lerning-rate", "3", "--data", "x.hdf5"], "--learning-rate"),
])
def test_an_option_that_is_not_known_has_a_suggestion(words, meant, capsys):
    with pytest.raises(SystemExit) as e:
        parser(words[0]).parse_args(words)
    assert e.value.code == 2 and capsys.readouterr().err.rstrip().endswith(f"; did you mean {meant}?")
