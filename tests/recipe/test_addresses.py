"""Commands take addresses where they take directories and files: they read what they need of a store, write only what they
are asked for, and say the address."""

import json

import numpy as np
import pytest
from gguf_files import SIZES, write_model
from inputs import chinese, write_jsonl
from many_runs import write_run
from safetensors.numpy import save_file
from transformers import LlamaConfig

from cpt_jax.cli import main
from cpt_jax.core.stores import Store
from cpt_jax.report.many import find_runs
from cpt_jax.sweep.directory import SweepDirectory


@pytest.fixture
def sweep(tmp_path):
    """The address of a sweep in a store, beside the same on a disk."""
    store = Store("memory://bucket/sweep")
    for share in (0.0, 0.05, 0.1, 0.25, 0.5):
        run = tmp_path / "sweep" / "runs" / f"share-{share}"
        write_run(run, share)
        (run / "base").mkdir()
        save_file({"weight": np.zeros((7, 3), np.float32)}, run / "base" / "model.safetensors")
        checkpoint = run / "stages" / "1-lora" / "checkpoints" / "40"
        checkpoint.mkdir(parents=True)
        (checkpoint / "large").write_text("not needed")
    store.upload(tmp_path / "sweep", (path for path in (tmp_path / "sweep").rglob("*") if path.is_file()))
    yield store.address
    store.remove("")


def content(store: Store) -> dict[str, bytes | None]:
    return {name: store.read(name) for name in store.names()}


def test_runs_in_a_store_are_those_on_a_disk(sweep, tmp_path, monkeypatch):
    read: list[str] = []
    copy = Store.copy
    monkeypatch.setattr(Store, "copy", lambda self, to, names: copy(self, to, [read.append(n) or n for n in names]))
    before = content(Store(sweep))
    found, _ = find_runs([sweep])
    expected, _ = find_runs([tmp_path / "sweep"])
    assert [vars(run) | {"path": ""} for run in found] == [vars(run) | {"path": ""} for run in expected]
    assert found[0].parameters == 21
    assert {name.rpartition("/")[2] for name in read} == {"config.json", "eval.json", "metrics.jsonl"}
    assert content(Store(sweep)) == before


def test_the_page_over_a_sweep_goes_into_its_store(sweep, tmp_path, capsys):
    before = content(Store(sweep))
    main(["report", sweep])
    assert capsys.readouterr().out.splitlines() == [f"{sweep}/report.html"]
    after = content(Store(sweep))
    assert all(run.encode() in (after["report.html"] or b"") for run in ("share-0.0", "share-0.05", "share-0.5"))
    assert {name for name in after if name not in before} > {"report.html", "plots/law-en.png"}
    assert {name: after[name] for name in before} == before


def test_a_sweep_writes_its_page_beside_its_runs(sweep, tmp_path):
    store, names = Store(sweep), [path.name for path in (tmp_path / "sweep" / "runs").iterdir()]
    records = [{"name": name, "status": "done"} for name in names]
    store.write("sweep.json", json.dumps({"experiment": "made:up", "runs": records}).encode())
    assert SweepDirectory(sweep, "made:up", dict.fromkeys(names), claim=False).report() == f"{sweep}/report.html"
    assert store.read("report.html")


def test_a_law_of_runs_and_of_tables_in_a_store(sweep, tmp_path, capsys):
    domains = ["--old", "en", "--new", "zh"]
    main(["law", str(tmp_path / "sweep"), *domains])
    expected = capsys.readouterr().out
    main(["law", sweep, *domains, "--json", "memory://bucket/figures/law.json", "--html", "memory://bucket/law.html"])
    assert capsys.readouterr().out == f"{expected}memory://bucket/law.html\n"
    store = Store("memory://bucket")
    assert json.loads(store.read("figures/law.json") or b"")["answer"] in expected
    assert {"law.html", "plots/law-en.png"} <= set(store.names())
    store.write("no.csv", b"share\n0.5\n")
    with pytest.raises(SystemExit):
        main(["law", "memory://bucket/no.csv", *domains])
    assert "error: memory://bucket/no.csv, row 1 has no tokens" in capsys.readouterr().err


def test_tokenizers_models_and_text_in_a_store(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    store = Store("memory://other")
    tokenizer = [path for path in tiny_model.iterdir() if path.name.startswith("tokenizer")]
    store.upload(tiny_model, tokenizer, "base/tokenizer")
    store.upload(tiny_model, (path for path in tiny_model.iterdir() if path.is_file()), "model")
    write_jsonl(tmp_path / "zh.jsonl", chinese(200))
    store.upload(tmp_path, [tmp_path / "zh.jsonl"])
    text = ["--corpus", f"{store.address}/zh.jsonl"]
    grown = f"{store.address}/grown/tokenizer"
    main(
        [
            "tokenizer",
            "extend",
            "--base",
            f"{store.address}/base/tokenizer",
            *text,
            "--new-tokens",
            "25",
            "--out",
            grown,
        ]
    )
    # Both are called tokenizer.
    both = ["--base", f"{store.address}/base/tokenizer", "--tokenizer", grown]
    main(["tokenizer", "report", *both, *text, "--json", f"{store.address}/t.json"])
    assert json.loads(store.read("t.json") or b"")["new_pieces"] == 25
    out = f"{store.address}/larger"
    main(["model", "extend", "--model", f"{store.address}/model", "--tokenizer", grown, "--out", out])
    store.write("prompts.txt", b"the city\n")
    capsys.readouterr()
    main(["generate", "--model", out, "--prompts", f"{store.address}/prompts.txt", "--new-tokens", "2"])
    assert capsys.readouterr().out.startswith("the city")
    main(["data", "prepare", "--tokenizer", grown, "--input", f"zh={text[1]}", "--out", f"{store.address}/data"])
    main(["data", "stats", f"{store.address}/data/zh", "--json", f"{store.address}/s.json"])
    assert json.loads(store.read("s.json") or b"")["corpora"][0]["documents"] > 0
    with pytest.raises(SystemExit):
        main(["model", "extend", "--model", f"{store.address}/model", "--tokenizer", grown, "--out", out])
    assert f"error: {out} exists: give another --out" in capsys.readouterr().err


def test_a_gguf_file_in_a_store(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "made", LlamaConfig(**SIZES))
    store = Store("memory://ggufs")
    store.upload(tmp_path / "made", [tmp_path / "made" / "model.gguf"])
    main(["model", "import-gguf", "--gguf", f"{store.address}/model.gguf", "--out", f"{store.address}/model"])
    for model in ("model", "model.gguf"):
        capsys.readouterr()
        main(["model", "inspect", "--model", f"{store.address}/{model}"])
        assert "embed/base" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctor", "memory://nowhere/run"], "memory://nowhere/run is no run's directory"),
        (["report", "memory://nowhere/run"], "memory://nowhere/run is no run's directory"),
        (["law", "memory://nowhere/run", "--old", "en", "--new", "zh"], "memory://nowhere/run is no run's directory"),
        (["export", "--run", "memory://nowhere/run", "--out", "x"], "memory://nowhere/run is no run's directory"),
        (["run", "memory://nowhere/config.json"], "memory://nowhere/config.json does not exist"),
        (["tokenizer", "extend", "--ban", "s3://bucket/ban.txt"], "argument --ban: s3://bucket/ban.txt is in a store"),
    ],
)
def test_what_is_not_there_is_told_by_its_address(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
