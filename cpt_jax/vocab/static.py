"""Static vectors of tokens: from co-occurrence in a corpus, and from word vectors in a file."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from cpt_jax.core.errors import UserError
from cpt_jax.vocab.tokenizer import Tokenizer


def static_vectors(
    tokenizer: Tokenizer, texts: Iterable[str], width: int, window: int, min_count: int
) -> dict[int, np.ndarray]:
    """Unit vectors of the tokens that occur `min_count` times: truncated singular vectors of their positive pointwise
    mutual information within `window` tokens (Levy & Goldberg 2014), singular values under a square root."""
    import scipy.sparse
    import scipy.sparse.linalg

    iterator, documents = iter(texts), [np.zeros(0, np.int32)]
    # Arrays hold a token in 4 bytes, lists of Python's numbers in 36.
    while batch := list(itertools.islice(iterator, 1024)):
        documents += [np.asarray(ids, np.int32) for ids in tokenizer.encode_documents(batch)]
    flat = np.concatenate(documents)
    if not len(flat):
        return {}
    document = np.repeat(np.arange(len(documents)), list(map(len, documents)))
    counts = np.bincount(flat, minlength=tokenizer.size)
    kept = np.flatnonzero(counts >= min_count)
    if len(kept) <= 2:
        return {}
    place = np.full(tokenizer.size, -1)
    place[kept] = np.arange(len(kept))
    local = place[flat]
    matrix = scipy.sparse.csr_matrix((len(kept), len(kept)))
    for distance in range(1, window + 1):
        left, right = local[:-distance], local[distance:]
        together = (document[:-distance] == document[distance:]) & (left >= 0) & (right >= 0)
        pairs = scipy.sparse.coo_matrix(
            (np.full(together.sum(), 1 / distance), (left[together], right[together])), shape=matrix.shape
        )
        matrix = matrix + pairs.tocsr() + pairs.T.tocsr()
    matrix = matrix.tocoo()
    sums = np.asarray(matrix.sum(1)).ravel()
    # Contexts smoothed by 0.75, as word2vec's negative samples are.
    smooth = sums**0.75
    information = np.log(matrix.data * smooth.sum() / (sums[matrix.row] * smooth[matrix.col]))
    positive = information > 0
    matrix = scipy.sparse.csr_matrix(
        (information[positive], (matrix.row[positive], matrix.col[positive])), shape=matrix.shape
    )
    rank = min(width, len(kept) - 1)
    left, values, _ = scipy.sparse.linalg.svds(matrix, k=rank, v0=np.ones(len(kept)))
    vectors = left * np.sqrt(values)
    norms = np.linalg.norm(vectors, axis=1)
    return {int(kept[i]): vectors[i] / norms[i] for i in range(len(kept)) if norms[i] > 0}


def word_vectors(path: Path, tokenizer: Tokenizer) -> dict[int, np.ndarray]:
    """Unit vectors of the tokens of the words in a .vec file: the mean of the vectors of the words a token occurs in,
    with a space before them and without.

    Raises:
      UserError: there is no such file, or a line is not "word number number ...".
    """
    if not path.exists():
        raise UserError(f"word vectors {path} do not exist")
    words, vectors = [], []
    # fastText's own files hold words that are no UTF-8, and carriage returns within words.
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            word, *numbers = line.rstrip("\n").split(" ")
            if number == 1 and len(numbers) == 1:
                continue
            try:
                vectors.append(np.array([float(value) for value in numbers if value], np.float32))
            except ValueError as error:
                raise UserError(f"{path}, line {number}: not 'word number number ...'") from error
            words.append(word)
    if not words or len({len(vector) for vector in vectors}) != 1:
        raise UserError(f"{path} holds no word vectors of one width")
    sums: dict[int, np.ndarray] = {}
    forms = zip(
        words,
        tokenizer.encode_documents(words),
        tokenizer.encode_documents([" " + word for word in words]),
        strict=True,
    )
    for vector, (_, plain, spaced) in zip(vectors, forms, strict=True):
        for index in {*plain, *spaced}:
            sums[index] = sums.get(index, 0) + vector
    return {index: vector / norm for index, vector in sums.items() if (norm := np.linalg.norm(vector)) > 0}
