"""`cpt law` on tables, and what it says of tables that it cannot read."""

import csv
import json

import pytest

from cpt_jax.cli import main
from cpt_jax.core.errors import UserError
from cpt_jax.laws.points import read_points

SHARES = (0, 0.01, 0.03, 0.05, 0.1, 0.2, 0.35, 0.5)
# The old domain is 1% worse than the base with 12% of replay.
NEEDED = 0.12


def rows() -> list[dict]:
    """The base and a run a share, by a known law."""

    def old(share: float) -> float:
        return 0.9 + 0.2 * (share + 0.01) ** -0.3

    def new(share: float) -> float:
        return 0.5 + 0.5 * (1.01 - share) ** -0.5

    runs = [
        {"name": f"replay-{share}", "tokens": 1e9, "share": share, "seed": 0, "en": old(share), "zh": new(share)}
        for share in SHARES
    ]
    return [{"name": "base", "tokens": 0, "share": "", "seed": "", "en": old(NEEDED) / 1.01, "zh": ""}, *runs]


@pytest.fixture(params=["csv", "jsonl"])
def table(request, tmp_path):
    path = tmp_path / f"runs.{request.param}"
    if request.param == "csv":
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows()[0]))
            writer.writeheader()
            writer.writerows(rows())
    else:
        filled = [{name: value for name, value in row.items() if value != ""} for row in rows()]
        path.write_text("".join(json.dumps(row) + "\n" for row in filled))
    return path


def test_the_answer_is_said_and_written(table, tmp_path, capsys):
    main(["law", str(table), "--old", "en", "--new", "zh", "--json", str(tmp_path / "law.json")])
    said = capsys.readouterr().out
    figures = json.loads((tmp_path / "law.json").read_text())
    assert said.startswith("With at most 1% more loss on en, replay about 12%, which costs zh +3.3%")
    assert figures["answer"] in said
    asked, *others = figures["budgets"]
    assert asked["budget"] == {"amount": 0.01, "relative": True}
    assert asked["replay"]["best"] == pytest.approx(NEEDED, rel=1e-2)
    assert asked["replay"]["low"] <= asked["replay"]["best"] <= asked["replay"]["high"]
    # The less is allowed, the more replay.
    shares = [each["replay"]["best"] for each in others]
    assert shares == sorted(shares, reverse=True)
    old, new = figures["laws"]
    assert (old["domain"], new["domain"]) == ("en", "zh")
    assert old["r_squared"] > 0.9999
    assert old["parameters"]["gamma"] == pytest.approx(0.3, rel=0.02)
    assert [each["share"] for each in old["held_out"]] == list(SHARES)
    assert figures["critical_ratio"] is None


@pytest.mark.parametrize(
    "old",
    [
        # More replay makes it worse, which no law of replay says.
        (3.0, 3.01, 3.02, 3.04, 3.1, 3.2),
        # Chance. Without its first share, the law rises without end there.
        (3.0022, 3.007, 2.9892, 3.0008, 3.0022, 2.9995),
    ],
)
def test_a_law_that_tells_nothing_of_the_runs_says_so(old, tmp_path, capsys):
    path = tmp_path / "runs.csv"
    lines = [
        f"61440,{share},{loss},{3 + share}" for share, loss in zip((0, 0.02, 0.05, 0.1, 0.25, 0.5), old, strict=True)
    ]
    path.write_text("\n".join(["tokens,share,en,zh", "0,0,3,5", *lines]) + "\n")
    main(["law", str(path), "--old", "en", "--new", "zh", "--json", str(tmp_path / "law.json")])
    said = capsys.readouterr().out
    assert "But the law tells little of what en differs in" in said
    assert "But the law tells little of what zh differs in" not in said
    # The error of a share that is left out is no figure where the law has no bound there.
    assert "000" not in said.partition("held out: en")[2].partition("held out: zh")[0]


@pytest.mark.parametrize("table", ["csv"], indirect=True)
def test_a_budget_may_be_loss(table, tmp_path, capsys):
    base = rows()[0]["en"]
    main(
        [
            "law",
            str(table),
            "--old",
            "en",
            "--new",
            "zh",
            "--budget",
            str(0.01 * base),
            "--json",
            str(tmp_path / "law.json"),
        ]
    )
    asked = json.loads((tmp_path / "law.json").read_text())["budgets"][0]
    assert asked["replay"]["best"] == pytest.approx(NEEDED, rel=1e-2)
    # Nobody is to take it for per cent.
    assert f"more loss (1.0% of the base's {base:.4g}) on en" in capsys.readouterr().out


def test_figures_of_runs_that_are_all_alike_are_json(tmp_path):
    """Their R² is no number, which JSON does not know."""
    (tmp_path / "runs.csv").write_text(
        "tokens,share,en,zh\n0,0,2,3\n" + "".join(f"1e9,{share},2,3\n" for share in SHARES)
    )
    command = ["law", str(tmp_path / "runs.csv"), "--old", "en", "--new", "zh", "--json", str(tmp_path / "law.json")]
    main(command)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    figures = json.loads((tmp_path / "law.json").read_text(), parse_constant=refuse)
    assert [law["r_squared"] for law in figures["laws"]] == [None, None]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--old", "eng", "--new", "zh"], "no run has the domain 'eng' (did you mean 'en'?); there are: en, zh"),
        (["--old", "en", "--new", "en"], "old and new are both 'en'"),
        (["--old", "en", "--new", "zh", "--budget", "a bit"], "the budget is 'a bit': give 1%"),
    ],
)
def test_what_cannot_be_answered_is_told(table, arguments, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["law", str(table), *arguments])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("runs.csv", "share,en\n0.1,1.2\n", "row 1 has no tokens"),
        ("runs.csv", "tokens,en\n1e9,1.2\n", "row 1 has no share of replay"),
        ("runs.csv", "tokens,share,en\n1e9,ten,1.2\n", "row 1: 'share' is 'ten', which is no number"),
        ("runs.csv", "tokens,share,en\n1e9,25,1.2\n", "the share of replay is 25: give 0 to 1"),
        ("runs.csv", "tokens,share,en\ninf,0.1,1.2\n", "tokens is inf: give 0 (the base) or more"),
        ("runs.csv", "tokens,share,en\n1e9,0.1,-1\n", "the loss on 'en' is -1.0"),
        ("runs.csv", "tokens,share,en\n1e9,0.1,inf\n", "the loss on 'en' is inf"),
        ("runs.csv", "tokens,share,size,en\n1e9,0.1,0,1.2\n", "size is 0: give the number of parameters"),
        ("runs.csv", "tokens,share,seed,en\n1e9,0.1,nan,1.2\n", "row 1: seed is nan: give a whole number"),
        ("runs.jsonl", '{"tokens": 1e9, "share": 0.1\n', "line 1 is no JSON"),
        ("runs.jsonl", "\n[1, 2]\n", "line 2 is no object"),
        ("runs.txt", "", "give a .csv or .jsonl table"),
        ("runs.csv", "tokens,share,en\n1e9,0.1,1.2,9\n", "a row with more cells than its first line has names"),
        ("runs.csv", "tokens,share,é\n1e9,0.1,1.2\n", "runs.csv is not UTF-8"),
        ("runs.jsonl", '{"tokens": 1e9, "share": 0.1, "é": 1}\n', "runs.jsonl is not UTF-8"),
    ],
)
def test_tables_that_cannot_be_read(tmp_path, name, text, told):
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(UserError) as error:
        read_points(tmp_path / name)
    assert told in str(error.value)
    assert "\n" not in str(error.value)


def test_a_table_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="is not there: give"):
        read_points(tmp_path / "runs.csv")


def test_empty_cells_are_domains_that_were_not_measured(tmp_path):
    # A space behind a comma is nothing either, nor is the mark that some editors put in front.
    (tmp_path / "runs.csv").write_text("\ufefftokens, share, en, zh, seed\n0,,1.2,\n1e9, 0.1, , 1.5, 3\n")
    base, run = read_points(tmp_path / "runs.csv")
    assert (base.seed, run.seed) == (0, 3)
    assert (base.losses, base.tokens, base.share) == ({"en": 1.2}, 0, 0)
    assert (run.losses, run.tokens, run.share, run.size) == ({"zh": 1.5}, 1e9, 0.1, None)
