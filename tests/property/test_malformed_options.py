"""Options of the command line that no command takes: one line that names the option and the value, code 2."""

import sys

import pytest

from mopsim.cli import main

JOB = {"--model": "tiny", "--hardware": "cpu-2core", "--seq-len": "64", "--global-batch": "2"}
ENDLESS = "9" * 5000
OPTIONS = [
    ("simulate", "--nodes", "0"), ("simulate", "--nodes", ENDLESS), ("simulate", "--nodes", "nan"),
    ("simulate", "--global-batch", ENDLESS), ("simulate", "--global-batch", str(2**62)),
    ("simulate", "--seq-len", ENDLESS), ("simulate", "--seq-len", "1e400"), ("simulate", "--seed", "-1"),
    ("simulate", "--precision", "fp16"), ("simulate", "--routing", f"zipf:{ENDLESS}"),
    ("simulate", "--routing", "a\nb"), ("simulate", "--stack", "\x1b[31m"), ("simulate", "--model", ENDLESS),
    ("simulate", "--document-tokens", "65"), ("simulate", "--document-tokens", f"485/{ENDLESS}"),
    ("search", "--document-tokens", "485/1/2"), ("search", "--document-tokens", "nan"),
    ("simulate", "--hardware", "\u202eb200"), ("search", "--top", "0"), ("search", "--budget", "-1"),
    ("search", "--learning-rate", "nan"), ("search", "--learning-rate", "1e400"), ("search", "--family", ","),
]  # fmt: skip


@pytest.mark.parametrize(("command", "option", "value"), OPTIONS)
def test_an_option_is_refused_in_one_line(
    command: str, option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    strategy = {"--strategy": "fsdp2"} if command == "simulate" else {}
    given = JOB | strategy | {option: value}
    monkeypatch.setattr(sys, "argv", ["mopsim", command, *(word for one in given.items() for word in one)])
    with pytest.raises(SystemExit) as end:
        main()
    err = capsys.readouterr().err
    assert end.value.code == 2, err[:300]
    line = err.removesuffix("\n")
    assert line.isprintable()
    assert len(line) < 4200
    name = option.removeprefix("--")
    assert name in line or name.replace("-", "_") in line, line[:300]
    assert value[:3] in line or repr(value)[1:4] in line or value in ("1e400", ","), line[:300]
