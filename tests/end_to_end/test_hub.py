"""A run whose base and corpora are on the Hugging Face Hub, and what is said when they are not there."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from commands import environment
from hub_server import hub_server
from inputs import chinese, english, write_jsonl

from cpt_jax.data.prepare import read_manifest

pytestmark = pytest.mark.slow
CONFIGS = """---
configs:
- config_name: en
  data_files: en/*.jsonl
- config_name: zh
  data_files: zh/*.jsonl
---
"""
RUN = "adapt --new zh=hf:team/texts/zh --replay en=hf:team/texts/en:train[5:155] --new-tokens 0 --tokens 1024"


@pytest.fixture(scope="module")
def root(tiny_model, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    shutil.copytree(tiny_model, root / "models/team/tiny")
    texts = root / "datasets/team/texts"
    for language, written in (("zh", chinese), ("en", english)):
        (texts / language).mkdir(parents=True)
        for part in range(2):
            write_jsonl(texts / language / f"{part}.jsonl", written(100, seed=part))
    (texts / "README.md").write_text(CONFIGS)
    return root


# The texts of corpora, or what is wrong with them: the hub's address is read when its libraries are imported.
READ = """
import sys
from cpt_jax.core.errors import UserError
from cpt_jax.data.sources import Corpus, SkipCounts, corpus_state
from cpt_jax.data.splits import read_split, splits_of
for spec in sys.argv[1:]:
    corpus = Corpus(name="c", spec=spec)
    try:
        print([document.text for split in splits_of(corpus) for document in read_split(corpus, split, SkipCounts())])
        if "://" in spec:
            print("mark", corpus_state(corpus)[0][2])
    except UserError as error:
        print(error)
"""


def python(root: Path, hub: dict[str, str], *arguments: str) -> tuple[int, str]:
    """A process's exit status, and what it printed."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=root,
        env=environment(root) | hub,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    return done.returncode, done.stdout


def test_a_run_of_what_is_on_the_hub_goes_on_elsewhere_and_without_it(root):
    arguments = [*RUN.split(), "--base", "team/tiny", "--workdir", "run"]
    with hub_server(root) as hub:
        status, out = python(root, hub, "-m", "cpt_jax", *arguments)
        stage = (root / "run/stages/1-lora/metrics.jsonl").stat().st_mtime_ns
        # Another machine has to fetch the model, of which the card was changed meanwhile.
        shutil.rmtree(hub["HF_HOME"])
        (root / "models/team/tiny/README.md").write_text("# A card")
        again = python(root, hub, "-m", "cpt_jax", *arguments)
        assert again[0] == 0, again[1][-4000:]
    assert status == 0, out[-4000:]
    for name, documents in (("zh", 200), ("en", 150)):
        manifest = read_manifest(root / "run/data" / name)
        assert manifest.records + sum(manifest.skipped.values()) == documents
    assert 'base_model: "team/tiny"' in (root / "run/export/README.md").read_text()
    status, out = python(root, hub, "-m", "cpt_jax", *arguments)
    assert status == 0, out[-4000:]
    assert (root / "run/stages/1-lora/metrics.jsonl").stat().st_mtime_ns == stage


def test_configs_parts_and_files_of_a_data_set(root):
    english_texts = [text for part in range(2) for text in english(100, seed=part)]
    specs = {
        "hf:team/texts/en": english_texts,
        "hf:team/texts/en:train[:130]": english_texts[:130],
        "hf:team/texts/en:train[95:105]": english_texts[95:105],
        "hf:team/texts/en:train[190:999]": english_texts[190:],
        "hf://datasets/team/texts/en/1.json*": english_texts[100:],
    }
    wrong = {
        "hf:team/texts": "corpus c: hf:team/texts needs a config, as in hf:team/texts/en: it has en, zh",
        "hf:team/texts/eng": "hf:team/texts/eng has no config 'eng' (did you mean 'en'?), as in hf:team/texts/en: it has en, zh",
        "hf:team/texts/en:trian[:5]": "has no split 'trian' (did you mean 'train'?): it has train",
        "hf:team/texts/en:train[:1%]": "'train[:1%]' is not a split, nor a part of one by records, as in train[:100000]",
        "hf:team/text": "cannot be opened (Dataset 'team/text' doesn't exist on the Hub or cannot be accessed)",
        "hf://datasets/team/text/*.jsonl": "hf://datasets/team/text/*.jsonl cannot be reached",
    }
    with hub_server(root) as hub:
        status, out = python(root, hub, "-W", "ignore", "-c", READ, *specs, *wrong)
    assert status == 0, out
    lines = [line for line in out.splitlines() if line.startswith(("[", "corpus c: hf:", "hf:"))]
    # The hub's mark of a file's content, by which a corpus is known.
    assert re.search("^mark [0-9a-f]{40}$", out, flags=re.MULTILINE)
    assert lines[: len(specs)] == [str(texts) for texts in specs.values()]
    for line, expected in zip(lines[len(specs) :], wrong.values(), strict=True):
        assert expected in line
