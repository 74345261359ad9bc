"""ir: a retrieval test collection of your own, or of BEIR or TREC: rerank what a first stage retrieved.

data.manual_dir holds (trec.py says what a line is)

    corpus.jsonl, queries.jsonl
    qrels/train.tsv, qrels/dev.tsv (or validation), qrels/test.tsv      any of them; also .trec, .txt, .qrels
    run.trec                                                            with data.ir.first_stage="run"

A query of a split is one that its qrels judge. Its pool is the data.pool_size best documents of the first stage:
BM25 over the whole corpus, made here, or those of a TREC run, which must have every judged query. Gains are those of
the qrels, 0 for what they do not judge. Relevant documents outside of the pool are missed (data.pool="open") or take
the places of the last others ("closed"), with the score that BM25 gives them or, after a run, one below all others:
then the *reversed* order of the first stage finds them (goalrank.py). Documents without title and text are in no pool.

How many pools hold nothing relevant and how many relevant documents were missed is noted. Documents are whole here;
`prompt.text_tokens` is how much of them a language model is shown.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from fgrpo_jax.config import DataConfig, IrConfig
from fgrpo_jax.data import trec
from fgrpo_jax.data.batches import generator
from fgrpo_jax.data.bm25 import Bm25
from fgrpo_jax.data.builder import RankingBuilder
from fgrpo_jax.data.datasets import DataError, Item, Note
from fgrpo_jax.data.raw_files import find_one, folder_of, manual_folder
from fgrpo_jax.types import Missed, RankingExample

_QRELS = {"train": ("train",), "validation": ("dev", "validation", "val", "valid"), "test": ("test",)}
_ENDINGS = (".tsv", ".trec", ".txt", ".qrels")


class Ir(RankingBuilder, skip_registration=True):
    MANUAL_DOWNLOAD_INSTRUCTIONS = "corpus.jsonl, queries.jsonl and qrels/ (see fgrpo_jax/data/ir.py)"
    kind = "qa"
    instruction = "Choose and rank the passages that answer the query."
    optional = ("retrieval", "missed")

    @classmethod
    def files_of(cls, config: DataConfig) -> dict[str, Path]:
        folder, found = manual_folder(folder_of(config), cls.MANUAL_DOWNLOAD_INSTRUCTIONS), {}
        named = {"corpus": "corpus.jsonl", "queries": "queries.jsonl"}
        if config.ir.first_stage == "run":
            named["run"] = config.ir.run_file
        for role, name in named.items():
            found[role] = find_one(folder, name.removesuffix(".gz").__eq__, deep=False)
            if found[role] is None:
                raise DataError(f"{folder} holds no {name}: {cls.MANUAL_DOWNLOAD_INSTRUCTIONS} are needed")
        qrels = folder / "qrels"
        for split, stems in _QRELS.items():
            names = {stem + ending for stem in stems for ending in _ENDINGS}
            if path := find_one(qrels, names.__contains__, deep=False):
                found[split] = path
        if not set(found) & set(_QRELS):
            raise DataError(f"{qrels} holds none of train.tsv, dev.tsv and test.tsv: put the judgements there")
        return found

    @classmethod
    def options_of(cls, config: DataConfig) -> dict[str, Any]:
        found = {name: value for name, value in vars(config.ir).items() if name != "run_file"}
        return {**found, "pool_size": config.pool_size, "pool": config.pool}

    def __init__(self, files: dict[str, Path], given: tuple[Item, ...] | None, options: dict[str, Any], **kwargs: Any):
        super().__init__(files, given, options=options, **kwargs)
        names = {field.name for field in dataclasses.fields(IrConfig)}
        self._c = IrConfig(**{name: value for name, value in options.items() if name in names})
        self._check()

    def _check(self) -> None:
        known = {query for rows in self._qrels.values() for query in rows}
        if others := len(self._queries) - len(known):
            text = f"{others:,} of {len(self._queries):,} queries are left out: no qrels judge them"
            self.notes.append(Note("data", text))
        if empty := sum(not text for text in self._corpus.values()):
            if empty == len(self._corpus):
                raise DataError(f"{self.files['corpus']}: no document has a title or a text")
            text = f"{empty:,} of {len(self._corpus):,} documents have no text, and are in no pool"
            self.notes.append(Note("data", text))

    @cached_property
    def _corpus(self) -> dict[str, str]:
        return trec.read_corpus(self.files["corpus"])

    @cached_property
    def _queries(self) -> dict[str, str]:
        return trec.read_queries(self.files["queries"])

    @cached_property
    def _qrels(self) -> dict[str, dict[str, dict[str, float]]]:
        splits = [split for split in _QRELS if split in self.files]
        return {split: trec.read_qrels(self.files[split], self._queries, self._corpus) for split in splits}

    @cached_property
    def _run(self) -> dict[str, dict[str, float]]:
        return trec.read_run(self.files["run"], self._queries, self._corpus)

    @cached_property
    def _bm25(self) -> tuple[list[str], Bm25]:
        texts = {document: text for document, text in self._corpus.items() if text}
        return list(texts), Bm25(list(texts.values()))

    def split_names(self) -> tuple[str, ...]:
        return tuple(self._qrels)

    def examples(self, split: str) -> Iterator[RankingExample]:
        without, missed, relevant, short = 0, 0, 0, 0
        for query, judged in self._qrels[split].items():
            example = self._example(query, judged)
            found = sum(gain > 0 for gain in example.relevance)
            without, missed, relevant = without + (not found), missed + len(example.missed), relevant + found
            short += len(example.candidates) < self.options["pool_size"]
            yield example
        total = len(self._qrels[split])
        text = f"{split}: {without:,} of {total:,} pools hold nothing relevant; of {relevant + missed:,} relevant "
        self.notes.append(Note("data", f"{text}documents {missed:,} are missed"))
        if short:
            text = f"{split}: {short:,} of {total:,} pools are smaller than data.pool_size={self.options['pool_size']}"
            self.notes.append(Note("data", text))

    def _example(self, query: str, judged: dict[str, float]) -> RankingExample:
        gains = {document: gain for document, gain in judged.items() if gain > 0}
        pool = self._retrieved(query, gains)
        lost = [document for document in gains if document not in pool]
        shuffled = generator("ir", query).permutation(len(pool)).tolist()
        documents = [list(pool)[i] for i in shuffled]
        return RankingExample(
            query_id=query,
            query=self._queries[query],
            candidates=tuple((document, self._corpus[document]) for document in documents),
            relevance=tuple(gains.get(document, 0.0) for document in documents),
            retrieval=tuple(pool[document] for document in documents),
            missed=tuple(Missed(document, gains[document]) for document in lost),
        )

    def _retrieved(self, query: str, gains: dict[str, float]) -> dict[str, float]:
        """The pool: documents and their scores, best first."""
        size, closed = self.options["pool_size"], self.options["pool"] == "closed"
        wanted = [document for document in gains if self._corpus[document]]
        if self._c.first_stage == "bm25":
            names, index = self._bm25
            best, score = index.search(self._queries[query], size)
            pool = {names[i]: float(score[i]) for i in best}
            known = {names[i]: float(score[i]) for i in np.flatnonzero(np.isin(names, wanted))} if closed else {}
        else:
            if query not in self._run:
                raise DataError(
                    f"{self.files['run']}: no line for query {query!r}, which the qrels judge: its pool would be "
                    "empty; add its documents, or remove it from the qrels"
                )
            ranked = {document: score for document, score in self._run[query].items() if self._corpus[document]}
            if not ranked:
                raise DataError(f"{self.files['run']}: no document of query {query!r} has a text: its pool is empty")
            pool = dict(list(ranked.items())[:size])
            least = min(ranked.values()) - 1.0
            known = {document: ranked.get(document, least) for document in wanted}
        if not closed:
            return pool
        others = [document for document in pool if document not in gains]
        kept = {document: pool[document] for document in others[: max(0, size - len(wanted))]}
        return dict(sorted((kept | known).items(), key=lambda pair: -pair[1])[:size])

    def frozen(self, split: str) -> dict[str, Any]:
        return {"seed": "the query's id", "negatives": f"retrieved, {self.options}; pool shuffled"}
