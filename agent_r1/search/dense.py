"""Search by embeddings of a sentence-transformers model: exact inner products, by FAISS. The
embeddings are on disk, memory-mapped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agent_r1.config.section import NamedSection
from agent_r1.errors import ConfigError
from agent_r1.search import Passage
from agent_r1.search.batching import BatchedSearcher, Query
from agent_r1.search.corpus import read_corpus
from agent_r1.search.store import PassageStore, store
from agent_r1.utils.cache_folder import cache_folder, make_folder

FORMAT = 1
AT_ONCE = 16
"""Queries per call of FAISS: from 20 on FAISS multiplies matrices, and the last bits of an inner
product would then depend on the other queries.
"""

CHUNK = 1024
"""Number of passages embedded between two writes."""


class Dense(BatchedSearcher):
    """Finds passages whose embedding is nearest to the query's, by cosine."""

    class Settings(NamedSection):
        """The embedding model.

        Attributes:
            model: A folder, or a name on the Hugging Face hub.
            query_prefix, passage_prefix: Put before each text, as the model was trained ("query: "
                and "passage: " for E5); by default the model's own prompts.
            device: Where the model runs.
        """

        name: str = "dense"
        model: str
        query_prefix: str | None = None
        passage_prefix: str | None = None
        device: str = "cpu"

    def __init__(self, settings: Any, corpus: Sequence[Path]) -> None:
        super().__init__()
        self._faiss, self._model = _load(settings.model, settings.device)
        self._settings = settings
        if not corpus:
            raise ConfigError("search 'dense' needs a corpus")
        key = (f"dense {FORMAT}", _identity(self._model), repr(settings.passage_prefix))
        folder = cache_folder("index", corpus, *key)
        if not folder.exists():
            make_folder(folder, lambda folder: self._build(corpus, folder))
        self.passages = PassageStore(folder)
        self._vectors = np.load(folder / "vectors.npy", mmap_mode="r")

    def look_up(self, queries: Sequence[Query]) -> list[list[Passage]]:
        # One at a time: padding to the longest of a batch changes the last bits of the others.
        vectors = self._model.encode_query(
            [text for text, _ in queries],
            prompt=self._settings.query_prefix,
            batch_size=1,
            normalize_embeddings=True,
            show_progress_bar=False,
        )
        found: list[list[Passage]] = [[] for _ in queries]
        for k in {k for _, k in queries}:
            asked = [number for number, (_, own) in enumerate(queries) if own == k]
            for first in range(0, len(asked), AT_ONCE):
                chunk = asked[first : first + AT_ONCE]
                for number, positions in zip(chunk, self._nearest(vectors[chunk], k), strict=True):
                    found[number] = [self.passages[position] for position in positions]
        return found

    def _nearest(self, vectors: np.ndarray[Any, Any], k: int) -> list[list[int]]:
        products, positions = self._faiss.knn(
            np.ascontiguousarray(vectors, np.float32),
            self._vectors,
            min(k, len(self.passages)),
            metric=self._faiss.METRIC_INNER_PRODUCT,
        )
        order = np.lexsort((positions, -products))  # of equal ones the first come first
        nearest: list[list[int]] = np.take_along_axis(positions, order, axis=1).tolist()
        return nearest

    def _build(self, corpus: Sequence[Path], folder: Path) -> None:
        number = sum(1 for _ in store(read_corpus(corpus), folder))
        passages = PassageStore(folder)
        vectors: Any = None
        for first in range(0, number, CHUNK):
            chunk = [passages[position] for position in range(first, min(first + CHUNK, number))]
            embedded = self._model.encode_document(
                [f"{passage.title}\n{passage.text}".strip() for passage in chunk],
                prompt=self._settings.passage_prefix,
                batch_size=64,
                normalize_embeddings=True,
                show_progress_bar=False,
            )
            if vectors is None:
                shape = (number, embedded.shape[1])
                vectors = np.lib.format.open_memmap(folder / "vectors.npy", "w+", np.float32, shape)
            vectors[first : first + len(chunk)] = embedded
        vectors.flush()


def _load(name: str, device: str) -> tuple[Any, Any]:
    try:
        import faiss
        import sentence_transformers
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"search 'dense' needs {error.name!r}: pip install 'agent-r1[dense]'"
        ) from error
    folder = Path(name).expanduser()
    path = str(folder) if folder.is_dir() else name
    try:
        return faiss, sentence_transformers.SentenceTransformer(path, device=device)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"env.search.model = {name!r}: no model of sentence-transformers there: {error}"
        ) from error


def _identity(model: Any) -> str:
    """What decides a text's embedding: the modules and their settings, prompts, all weights."""
    digest = hashlib.blake2b(f"{model!r} {model.prompts}".encode())
    for name, weights in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weights.detach().cpu().reshape(-1).float().numpy().tobytes())
    return digest.hexdigest()
