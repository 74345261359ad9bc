"""What the builders share: preparing once, freezing evaluation pools, reading back.

A prepared folder holds TFDS array_record files, and beside them

    meta.json        kind, catalogue, and per split: rows' query ids, which are trainable, hash
    candidates.json  per evaluation split: hash, seed, how the negatives were made, the pools

It is written into a temporary folder that is renamed when complete, so a killed
preparation leaves nothing that looks prepared, and two processes may prepare at once.
At an address (gs://…) a folder is there once meta.json is, which is written last; array_record
reads no address, so every process reads its own copy of it, which is gone when it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from fgrpo_jax.config import DataConfig
from fgrpo_jax.config_files import fingerprint
from fgrpo_jax.data import records
from fgrpo_jax.data.datasets import DataError, Dataset, Item, Note, Split, is_trainable
from fgrpo_jax.data.raw_files import folder_of, sha256
from fgrpo_jax.files import check_reachable, fetch, is_address, is_whole, path_of, reason, scratch, send
from fgrpo_jax.types import RankingExample

_LAST = "meta.json"


class RankingBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Base of the builders: raw files in, RankingExamples in array_record out.

    A subclass sets the class fields and defines `find`, `examples`, and `frozen`.
    """

    VERSION = tfds.core.Version("1.0.1")  # raise it when the same raw files are to be read anew
    MANUAL_DOWNLOAD_INSTRUCTIONS = None  # set where raw files are needed: which, and from where
    kind = "recommendation"
    instruction = ""
    takes_catalogue = False  # raw files may name items of a catalogue that is not among them
    sampled_negatives = False  # training rows hold relevant items only; the rest of the pool is drawn
    optional: tuple[str, ...] = ()  # which of records.OPTIONAL its rows have

    def __init__(
        self,
        files: dict[str, Path],
        given: tuple[Item, ...] | None,
        options: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        """files: as `find` returned them. given: a run's catalogue, or None. options: as `options_of` returned them."""
        super().__init__(file_format="array_record", **kwargs)
        self.files, self.given, self.options = files, given, options or {}
        self.records: dict[str, dict[str, Any]] = {}
        self.pools: dict[str, dict[str, Any]] = {}
        self.notes: list[Note] = []

    @classmethod
    def find(cls, folder: Path | None) -> dict[str, Path]:
        """The raw files by role. Raises DataError when none is there."""
        return {}

    @classmethod
    def files_of(cls, config: DataConfig) -> dict[str, Path]:
        """The raw files of a configuration, by role; as `find` where their names are not configured."""
        return cls.find(folder_of(config))

    @classmethod
    def options_of(cls, config: DataConfig) -> dict[str, Any]:
        """What of the configuration the prepared data depend on."""
        return {}

    def split_names(self) -> tuple[str, ...]:
        """By default the roles of its files."""
        return tuple(self.files)

    def catalogue(self) -> tuple[Item, ...]:
        return ()

    def weights(self) -> tuple[float, ...]:
        """Of the catalogue's items, where negatives are drawn and not uniformly."""
        return ()

    def examples(self, split: str) -> Iterator[RankingExample]:
        """The rows of a split, in their order. Raises DataError naming file and row."""
        raise NotImplementedError

    def frozen(self, split: str) -> dict[str, Any]:
        """Record of an evaluation split's pools: {"seed": …, "negatives": how they were made}."""
        raise NotImplementedError

    # ------------------------------------------------------------------ the TFDS interface

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="Queries with candidate pools and graded relevance.",
            features=tfds.features.FeaturesDict({"row": tfds.features.Text()}),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in self.split_names()}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        digest, ids, trainable, pools = hashlib.sha256(), [], [], {}
        optional = self.optional  # which may have to look at all rows
        if split == "train" and self.sampled_negatives:
            digest.update(_canonical(self.catalogue()))
            if weights := self.weights():
                digest.update(_canonical(weights))
        for row, example in enumerate(self.examples(split)):
            digest.update(_canonical(records.content(example)))
            ids.append(example.query_id)
            trainable.append(is_trainable(example))
            if split != "train":
                pools[example.query_id] = [i for i, _ in example.candidates]
            yield row, {"row": records.encode(example, optional)}
        if not ids:
            raise DataError(f"{self.files.get(split, split)}: there are no queries in it")
        if len(set(ids)) != len(ids):
            raise DataError(f"{self.name}: the query ids of split {split!r} are not unique")
        self.records[split] = {
            "fingerprint": digest.hexdigest()[:16],
            "query_ids": ids,
            "trainable": trainable,
        }
        if split != "train":
            hash_ = hashlib.sha256(_canonical(pools)).hexdigest()
            self.pools[split] = {"hash": hash_, **self.frozen(split), "pools": pools}


def _canonical(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).encode() + b"\n"


# ---------------------------------------------------------------------- prepare and open


def load(builder: type[RankingBuilder], config: DataConfig, given: tuple[Item, ...] | None) -> Dataset:
    """See `datasets.load`."""
    folder, files = folder_of(config), builder.files_of(config)
    used = given if builder.takes_catalogue and "catalogue" not in files else None
    depends = {
        "rows": records.FORMAT,
        "version": str(builder.VERSION),
        "files": {role: sha256(path) for role, path in files.items()},
        "catalogue": None if used is None else fingerprint(used),
    }
    if options := builder.options_of(config):
        depends["options"] = options
    name = config.name
    kept = home = path_of(config.prepared_dir) / name / fingerprint(depends)
    if is_address(kept):
        home = scratch() / kept.name
    check_reachable(kept)
    if not is_whole(kept, _LAST):
        _prepare(builder, files, used, options, folder, home)
        if is_address(kept):
            send(home, kept, _LAST)
    elif is_address(kept):
        with _reading(kept):
            fetch(kept, home)
    with _reading(home):
        dataset = _open(name, builder, home)
    if given is not None and builder.takes_catalogue and dataset.catalogue != given:
        raise DataError(
            f"{files['catalogue']} is not the catalogue this run was trained with ({len(dataset.catalogue)} "
            f"items, {len(given)} then): use the run's own file, or remove this one"
        )
    return dataset


def _prepare(builder, files, given, options, folder: Path | None, home: Path) -> None:
    temporary = home.parent / f".{home.name}-{uuid.uuid4().hex}"
    try:
        temporary.mkdir(parents=True)
        made = builder(files, given, options=options, data_dir=str(temporary))
        manual = str(folder) if folder and builder.MANUAL_DOWNLOAD_INSTRUCTIONS else None
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download that is none
            made.download_and_prepare(download_config=tfds.download.DownloadConfig(manual_dir=manual))
        shutil.rmtree(temporary / "downloads", ignore_errors=True)
        meta = {"kind": made.kind, "catalogue": made.catalogue(), "splits": made.records}
        meta |= {"sampled": made.sampled_negatives, "weights": made.weights(), "notes": made.notes}
        meta["optional"] = made.optional
        (temporary / _LAST).write_text(json.dumps(meta))
        (temporary / "candidates.json").write_text(json.dumps(made.pools))
        try:
            temporary.rename(home)
        except OSError:
            if not home.is_dir():  # otherwise another process was first, with the same result
                raise
    except (OSError, RuntimeError) as error:  # the second is what array_record raises
        raise DataError(f"cannot write to {home.parent} ({reason(error)}): set data.prepared_dir") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _open(name: str, builder: type[RankingBuilder], home: Path) -> Dataset:
    meta = json.loads((home / _LAST).read_text())
    (data_path,) = {path.parent for path in home.glob("*/*/dataset_info.json")}
    reader = tfds.builder_from_directory(str(data_path))
    keep = sampled = meta["sampled"]  # rows of recommendation sets are small
    splits, has_lists = {}, "logged" in meta["optional"]
    for split, record in meta["splits"].items():
        source = reader.as_data_source(split=split)
        splits[split] = Split(_reader(source, home), record["query_ids"], record["trainable"], keep, has_lists)
    return Dataset(
        name=name,
        kind=meta["kind"],
        instruction=builder.instruction,
        catalogue=tuple((i, t) for i, t in meta["catalogue"]),
        splits=splits,
        sampled_negatives=sampled,
        fingerprints={split: record["fingerprint"] for split, record in meta["splits"].items()},
        weights=tuple(meta["weights"]),
        notes=tuple(Note(*note) for note in meta["notes"]),
    )


def _reader(source: Any, home: Path) -> Callable[[list[int]], list[RankingExample]]:
    def read(indices: list[int]) -> list[RankingExample]:
        with _reading(home):
            return [records.decode(row["row"]) for row in source.__getitems__(indices)]

    return read


@contextlib.contextmanager
def _reading(home: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the readers of array_record raise several kinds
        raise DataError(
            f"the prepared data in {home} are damaged or gone ({reason(error)}): remove what is left of "
            "that folder, and give the same command again"
        ) from error
