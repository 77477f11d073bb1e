"""Data sets by name, TFDS's and those of `datasets`, from local files; wrong names in one line."""

import json
import shutil

import pytest

from cpt_jax.core.errors import UserError
from cpt_jax.data import catalogues
from cpt_jax.data.sources import Corpus, SkipCounts, corpus_state, read
from cpt_jax.data.splits import read_split, splits_of

TEXTS = [f"document {index}" for index in range(11)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory of files, one that save_to_disk wrote, one of several splits, and a TFDS data set."""
    import datasets

    root = tmp_path_factory.mktemp("named")
    (root / "files").mkdir()
    for name, texts in (("train-0", TEXTS[:4]), ("train-1", TEXTS[4:]), ("test", ["measured"])):
        lines = [json.dumps({"text": text, "n": 1}) + "\n" for text in texts]
        (root / "files" / f"{name}.jsonl").write_text("".join(lines))
    datasets.disable_progress_bars()
    one, other = datasets.Dataset.from_dict({"text": TEXTS}), datasets.Dataset.from_dict({"text": ["measured"]})
    one.to_parquet(str(root / "parquet" / "train.parquet"))
    one.save_to_disk(str(root / "saved"), num_shards=2)
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(str(root / "saved_splits"))
    write_tfds(root / "tfds")
    return root


def write_tfds(root) -> None:
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder):
        """Eleven documents."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples(TEXTS), "test": self._generate_examples(["measured"])}

        def _generate_examples(self, texts):
            yield from ((index, {"text": text}) for index, text in enumerate(texts))

    tfds.display_progress_bar(False)
    builder = Small(data_dir=str(root), file_format="array_record")
    builder.download_and_prepare()


def texts(spec: str) -> list[str]:
    return [document.text for document in read(Corpus(name="c", spec=spec), SkipCounts())]


@pytest.mark.parametrize(
    ("spec", "splits"),
    [
        ("hf:{}/files", 2),
        ("hf:{}/files:train", 2),
        ("hf:{}/parquet", 1),
        ("hf:{}/saved", 4),
        ("hf:{}/saved_splits:train", 4),
        ("hf:{}/saved_splits:train[:11]", 4),
        ("hf:{}/files:train[:11]", 1),
        ("tfds:{}/tfds/small/1.0.0", 4),
        ("tfds:{}/tfds/small/1.0.0:train", 4),
    ],
)
def test_a_named_data_set_is_read_whole_or_in_splits(place, monkeypatch, spec, splits):
    monkeypatch.setattr(catalogues, "RECORDS_A_SPLIT", 3)
    found = texts(spec.format(place))
    # TFDS shuffles when it writes.
    assert (sorted(found) if spec.startswith("tfds") else found) == sorted(
        TEXTS, key=TEXTS.index if not spec.startswith("tfds") else None
    )
    corpus = Corpus(name="c", spec=spec.format(place))
    cut = splits_of(corpus)
    assert len(cut) == splits
    assert [document.text for split in cut for document in read_split(corpus, split, SkipCounts())] == found
    assert len(corpus_state(corpus)) > (1 if spec.startswith("hf") else 0)


@pytest.mark.parametrize("spec", ["hf:{}/files:test", "hf:{}/saved_splits:test", "tfds:{}/tfds/small/1.0.0:test"])
def test_another_split(place, spec):
    assert texts(spec.format(place)) == ["measured"]


@pytest.mark.parametrize("place_of", ["hf:{}/files", "hf:{}/saved_splits"])
def test_a_part_of_a_split_of_hf(place, place_of):
    assert texts(f"{place_of.format(place)}:train[3:6]") == TEXTS[3:6]
    with pytest.raises(UserError, match="holds no"):
        texts(f"{place_of.format(place)}:train[6:3]")


def test_bytes_beside_the_text_of_tfds_are_left(monkeypatch):
    records = [{"text": "good", "image": b"\x89PNG\xff"}, {"text": b"\xff", "image": b""}, {"text": "国".encode()}]
    monkeypatch.setattr(catalogues, "_tfds_source", lambda spec: records)
    skipped = SkipCounts()
    found = [document.text for document in read(Corpus(name="c", spec="tfds:pictures"), skipped)]
    assert found == ["good", "国"]
    assert skipped == {"not UTF-8": 1}


def test_a_tfds_data_set_that_was_prepared_anew_is_another(place, tmp_path):
    shutil.copytree(place / "tfds", tmp_path / "tfds")
    corpus = Corpus(name="c", spec=f"tfds:{tmp_path}/tfds/small/1.0.0:test")
    before = corpus_state(corpus)
    assert corpus_state(corpus) == before
    (shard,) = (tmp_path / "tfds/small/1.0.0").glob("*test.array_record*")
    shard.write_bytes(shard.read_bytes() + b"more")
    assert corpus_state(corpus) != before


def test_a_part_of_a_tfds_split(place):
    assert len(texts(f"tfds:{place}/tfds/small/1.0.0:train[:4]+test")) == 5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:{}/files:tests", r"no split 'tests' \(did you mean 'test'\?\): it has (train, test|test, train)"),
        ("hf:{}/saved_splits:dev", r"no split 'dev'.*: it has train, test"),
        ("hf:{}/saved:train", "was saved without splits: leave out ':train'"),
        ("hf:{}/nowhere", "cannot be opened .*: check the name"),
        ("tfds:{}/tfds/small/2.0.0", "there is no directory .*small/2.0.0: give one that TFDS has prepared"),
        ("tfds:{}/tfds/small/1.0.0:validation", "no split 'validation'.*: it has train, test"),
        ("tfds:ag_news_subste", r"TFDS has no data set 'ag_news_subste' \(did you mean 'ag_news_subset'\?\)"),
        ("tfds:ag_news_subset", "is not prepared in .*: prepare it with TFDS"),
    ],
)
def test_a_wrong_name_is_told_in_one_line(place, spec, message):
    with pytest.raises(UserError, match=f"corpus c: {spec.partition('{')[0]}.*{message}") as raised:
        texts(spec.format(place))
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=f"^corpus c: {spec.partition('{')[0]}"):
        splits_of(Corpus(name="c", spec=spec.format(place)))


def test_a_hub_that_cannot_be_reached_is_told_in_one_line(monkeypatch):
    import datasets

    def fails(*_, **__):
        raise ConnectionError("Couldn't reach 'no/such' on the Hub (LocalEntryNotFoundError)\nand more")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=r"corpus c: hf:no/such cannot be opened \(Couldn't reach.*logged in") as raised:
        texts("hf:no/such")
    assert "\n" not in str(raised.value)
