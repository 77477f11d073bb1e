"""A corpus in splits: stretches that are read apart and become a shard each. Which they are depends on the corpus alone,
not on who reads them."""

import dataclasses
from collections.abc import Iterator, Sequence

from cpt_jax.core.stores import Location
from cpt_jax.data.catalogues import is_catalogued, named_stretches
from cpt_jax.data.files import WHOLE, Stretch, stretches
from cpt_jax.data.sources import Corpus, Document, SkipCounts, document_of, files_of, stretch_of, told_of

# Text of a split. At 4 MB a second and core, a shard is some 8 seconds of work, which is what a kill can cost.
SPLIT_BYTES = 32 << 20
# The loader keeps every shard open.
MOST_SPLITS = 4096


@dataclasses.dataclass(frozen=True)
class Split:
    """The part of a corpus that becomes shard `index`: stretches of its files, or of its named data set."""

    index: int
    parts: tuple[tuple[Location, Stretch], ...]


def splits_of(corpus: Corpus, size: int = SPLIT_BYTES) -> list[Split]:
    """A corpus cut into splits of some `size` bytes of text; more where there would be too many. Large files are cut,
    small ones put together, in order.

    Raises:
      UserError: nothing is there, or it cannot be read.
    """
    if is_catalogued(corpus.spec):
        with told_of(corpus):
            return [Split(index, ((corpus.spec, each),)) for index, each in enumerate(named_stretches(corpus.spec))]
    files = files_of(corpus)
    with told_of(corpus):
        return _of_files(files, size)


def _of_files(files: Sequence[Location], size: int) -> list[Split]:
    # One look at the sizes, to keep their number within bounds.
    parts = [(file, *each) for file in files for each in stretches(file, size)]
    if (total := sum(weight for _, _, weight in parts)) > size * MOST_SPLITS:
        size = -(-total // MOST_SPLITS)
        parts = [(file, *each) for file in files for each in stretches(file, size)]
    splits, gathered, weighed = [], [], 0
    for file, stretch, weight in parts:
        if gathered and weighed + weight > size:
            splits.append(Split(len(splits), tuple(gathered)))
            gathered, weighed = [], 0
        gathered.append((file, stretch))
        weighed += weight
    splits.append(Split(len(splits), tuple(gathered or [(file, WHOLE) for file in files])))
    return splits


def read_split(corpus: Corpus, split: Split, skipped: SkipCounts) -> Iterator[Document]:
    """The documents of a split, in order; what is not usable is counted in `skipped` by reason. Split after split, they
    are what `sources.read` gives."""
    for source, stretch in split.parts:
        for record in stretch_of(corpus, source, stretch, skipped):
            if (document := document_of(corpus, record, skipped)) is not None:
                yield document
