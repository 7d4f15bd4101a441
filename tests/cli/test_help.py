"""The command line explains itself: help of every command, groups, settings, and what to type next."""

import json
import re
from collections.abc import Iterator

import pytest
from commands import ROOT, Run
from cyclopts import App

from pipeline.cli.app import GROUPS, make_app
from pipeline.config import reference


def commands(app: App, *before: str) -> Iterator[tuple[str, ...]]:
    """The words of every command below an app."""
    for name in app:
        if name.startswith("-"):
            continue
        if len(below := list(commands(app[name], *before, name))):
            yield from below
        else:
            yield (*before, name)


COMMANDS = sorted(commands(make_app()))


def test_the_bare_command_shows_the_groups_and_ends_well(run: Run) -> None:
    code, out, err = run()
    assert (code, err) == (0, "")
    groups = ["Train", "Data", "Models", "Cluster", "Measure"]
    assert re.findall(r"^╭─ (\w+) ─", out, re.MULTILINE) == [*groups, "Other"]
    assert [group.name for group in GROUPS] == groups
    assert run("--help") == (code, out, err)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_says_what_each_command_and_option_is(words: tuple[str, ...], run: Run) -> None:
    code, out, err = run(*words, "--help")
    assert (code, err) == (0, "")
    usage, summary = [line for line in out.splitlines() if line.strip()][:2]
    assert usage.startswith(f"Usage: pipeline {' '.join(words)} ")
    assert summary.strip()
    (command, *_) = make_app().parse_commands(list(words))[1][-1:] or [None]
    assert command is not None
    for argument in command.assemble_argument_collection(parse_docstring=True):
        assert argument.parameter.help, f"{' '.join(words)}: {argument.name} has no help"
        assert argument.names[0] in out


def test_the_page_of_settings_is_that_of_the_schema() -> None:
    now = "python -m pipeline.config.reference > docs/settings.md"
    assert (ROOT / "docs/settings.md").read_text() == reference.page(), f"write it anew: {now}"


def test_every_setting_has_a_meaning() -> None:
    for setting in reference.settings().values():
        assert setting.meaning, setting.key
        assert "|" not in setting.meaning, "it would end a cell of docs/settings.md"


def test_explain_says_what_settings_mean(run: Run) -> None:
    code, out, _ = run("config", "--explain", "data.image_size")
    meaning = "    height and width of what the model trains on"
    assert (code, out.splitlines()) == (
        0,
        ["data.image_size=224", meaning, "    a whole number, at least 8 and at most 4096 (pixels)"],
    )
    of_section = run("config", "checkpoint", "--explain")[1]
    assert re.findall(r"^(\S+)=", of_section, re.MULTILINE) == ["checkpoint.every", "checkpoint.keep"]
    assert run("config", "--explain")[1].count("=") >= len(reference.settings())
    code, _, err = run("config", "--explain", "train.epoch")
    assert (code, err) == (2, "pipeline: --explain train.epoch: no such key; did you mean train.epochs?\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], 'Unknown command "trian". Did you mean "train"?'),
        (["train", "a.yaml", "--resum", "x"], "Unknown option: --resum. Did you mean --resume?; see pipeline train"),
        (["index", "photos"], "pipeline: --out is missing; see pipeline index --help"),
        (["index", "photos", "--out"], "pipeline: --out: give a value; see pipeline index --help"),
        (["stop", "pets", "dogs"], "pipeline: dogs: one word too many; see pipeline stop --help"),
        (
            ["submit", "c.yaml", "--secrets=KEY=hush"],
            "Unknown option: --secrets. Did you mean --secret?; see pipeline submit --help",
        ),
        (["predict", "pets", "--top", "2.5", "a.jpg"], "--top: 2.5: must be a whole number"),
        (["index", "photos", "--out", "x", "--workers", "2.5"], "--workers: 2.5: must be a whole number, at least 1"),
        (["evaluate", "pets", "--tta", "six"], 'Choose from: "one", "flip", "ten"'),
        (["predict", "pets", "a.jpg", "--tpo", "3"], "--tpo: no such option; a file of this name is ./--tpo"),
        (["bench", "scale", "c.yaml", "--workers", "1,x"], "--workers: x: must be a whole number, at least 1"),
    ],
)
def test_a_misspelt_request_is_one_line_that_says_what_to_type(words: list[str], line: str, run: Run) -> None:
    code, out, err = run(*words)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert line in err


def test_settings_go_anywhere_among_the_options(run: Run) -> None:
    words = ["config", "train.epochs=7", ROOT / "configs/digits.yaml"]
    assert run(*words)[0] == 2  # the file comes first
    words = ["config", ROOT / "configs/digits.yaml", "train.epochs=7", "--json", "model.depth=18"]
    code, out, _ = run(*words)
    assert code == 0
    assert '"epochs": 7' in out
    assert '"depth": 18' in out


@pytest.mark.parametrize("flag", ["--json", "--json=true"])
def test_a_wrong_request_is_json_where_json_was_asked_for(flag: str, run: Run) -> None:
    code, out, err = run("config", ROOT / "configs/digits.yaml", "train.epoch=3", flag)
    assert (code, json.loads(out)["status"]) == (2, "wrong")
    assert json.loads(out)["error"] in err
    assert json.loads(run("config", "--jsn", "--json")[1])["status"] == "wrong"
