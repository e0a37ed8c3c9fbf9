"""Find the files of a split: a file, a folder as people have them, a URL, or a hub data set."""

from __future__ import annotations

import dataclasses
import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

import datasets
import numpy as np

from phi3_jax.data.cards import Card, local_card
from phi3_jax.data.files import FORMATS, DataFile, check_format, format_of
from phi3_jax.data.remote import Remote, is_url
from phi3_jax.errors import UserError

# The files with rows in a folder, by its path relative to the data set's.
Listing = Callable[[PurePosixPath], list[PurePath]]
HERE = PurePosixPath()
HELD_OUT_SPLITS = ("test", "validation", "valid", "val", "dev", "eval")
# The words by which `datasets` finds a split in a file's name, set off by these characters.
_WORD = r"(?:^|[-._ 0-9])(?:{})(?:[-._ 0-9]|$)"
_TRAIN = re.compile(_WORD.format("train|training"), re.IGNORECASE)
_HELD_OUT = re.compile(
    _WORD.format("test|testing|validation|valid|val|dev|eval|evaluation|held[-_ ]?out|holdout"),
    re.IGNORECASE,
)
# What `datasets` and the hub put beside the data.
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")


@dataclasses.dataclass(frozen=True)
class Found:
    """The files of a split.

    Attributes:
        path: what was asked for, for errors.
        files: the files, in order.
        split: the split, expressed as `train`, with the slice that was asked for.
    """

    path: str
    files: list[DataFile]
    split: str

    def numbers(self, rows: int) -> np.ndarray:
        """int64, the numbers of the rows that the slice takes of `rows` rows.

        Raises:
            UserError: it is not a slice of the split `train`, in `datasets` notation.
        """
        try:
            parts = datasets.ReadInstruction.from_spec(self.split).to_absolute({"train": rows})
        except (ValueError, AssertionError) as error:
            raise UserError(
                f"{self.path}: split {self.split!r}: a file has the split train ({error})"
            ) from None
        return np.concatenate([np.arange(rows)[part.from_ or 0 : part.to] for part in parts])


def find_files(
    path: str,
    name: str | None,
    split: str,
    revision: str | None = None,
    scratch: Path | None = None,
) -> Found:
    """The files of one split of a file, folder, URL or hub dataset.

    Args:
        path: what the config says.
        name: the configuration (subset).
        split: the split, maybe with a slice.
        revision: branch, tag or commit of a hub data set.
        scratch: where files behind URLs are downloaded to.

    Raises:
        UserError: not found, or no such split.
    """
    if is_url(path):
        return _from_url(path, name, split, scratch or Path(tempfile.mkdtemp()))
    local = Path(path).expanduser()
    if local.is_dir():
        if (local / "dataset_dict.json").is_file() or (local / "state.json").is_file():
            return _from_disk(local, split)
        card = local_card(path, local)
        files, split = _files_of_split(path, _listing(local), card, name, split)
        local_files = [local / file for file in files]
        return Found(path, [DataFile(file, str(file)) for file in local_files], split)
    if local.is_file():
        check_format(local)
        return Found(path, [DataFile(local, str(local))], split)
    if not is_hub_id(path):
        raise UserError(f"{path}: no such file or folder")
    return _from_hub(path, name, split, revision)


def is_hub_id(path: str) -> bool:
    """Whether a path is neither a URL nor a file or folder, and looks like a data set's id."""
    local = Path(path).expanduser()
    if is_url(path) or local.exists():
        return False
    return path.count("/") <= 1 and not path.startswith((".", "~")) and not format_of(local)


def held_out_split(path: str) -> str:
    """The split of `data.test_path`: `test`, `validation` or the like if it has one, else `train`.

    A folder that has neither, nor a file of `train`, is held out as a whole.
    """
    folder = Path(path).expanduser()
    if is_url(path):
        remote = Remote.open(path)
        if remote.is_file():
            return "train"
        listing, card = _remote_listing(remote), _remote_card(remote)
        saved_splits = remote.saved_splits()
    elif folder.is_dir():
        listing, card = _listing(folder), local_card(path, folder)
        saved_splits = [
            name for name in HELD_OUT_SPLITS if (folder / name / "state.json").is_file()
        ]
    else:
        return "train"
    if card is not None:
        return next(filter(card.splits(None).__contains__, HELD_OUT_SPLITS), "train")
    named = [*listing(HERE), *listing(HERE / "data")]
    for split in HELD_OUT_SPLITS:
        inside = listing(HERE / split) or listing(HERE / "data" / split)
        if split in saved_splits or inside or any(_is_named(file, split) for file in named):
            return split
    return "train"


def _files_of_split(
    path: str, listing: Listing, card: Card | None, name: str | None, split: str
) -> tuple[list[PurePath], str]:
    """Files named after the split (`test_sft.jsonl`, `train-00000-of-00002.parquet`).

    If the card names configurations, it says which files. Otherwise they are in the folder, or in
    the places that data sets on the hub have for them: `data/`, a folder named after the split, or
    one named after the subset. If no file is named after a split, those not named as held out
    (`test.jsonl`, `my_eval.csv`) are `train`. The returned split is expressed as `train`, with the
    slice kept.
    """
    wanted, bracket, part = split.partition("[")
    rest = "train" + bracket + part
    if card is not None:
        return _files_in_card(path, card.splits(name), wanted), rest
    places = [HERE / name, HERE / name / "data"] if name else []
    places += [HERE, HERE / "data"]
    files = next(filter(None, map(listing, places)), [])
    chosen = [file for file in files if _is_named(file, wanted)]
    if not chosen:
        chosen = [file for place in places for file in listing(place / wanted)]
    if chosen:
        return chosen, rest
    if not files:
        raise UserError(f"{path}: no {', '.join(FORMATS)} files in it{_in_folders(Path(path))}")
    if wanted != "train":
        raise UserError(f"{path}: no file of split {wanted!r}; found {[f.name for f in files]}")
    chosen = [file for file in files if not is_held_out(file)]
    if not chosen:
        names = ", ".join(file.name for file in files)
        raise UserError(
            f"{path}: no file to train on; by their names these are held out: {names} (to train "
            f"on them, name a file in data.path or a split: data.split: {_stem(files[0])})"
        )
    return chosen, rest


def _files_in_card(
    path: str, splits: Mapping[str, Sequence[PurePath]], wanted: str
) -> list[PurePath]:
    if wanted not in splits:
        raise UserError(f"{path}: no split {wanted!r}; its README.md has {', '.join(splits)}")
    files = [file for file in splits[wanted] if _is_data(file)]
    if not files:
        found = [str(file) for file in splits[wanted]] or "none"
        raise UserError(
            f"{path}: README.md: split {wanted!r}: no {', '.join(FORMATS)} files; found {found}"
        )
    return files


def _in_folders(path: Path) -> str:
    """For the error of a folder without files: which of its folders has some."""
    root = path.expanduser()
    if not root.is_dir():  # a URL
        return ""
    listing = _listing(root)
    folders = sorted(folder.name for folder in root.iterdir() if folder.is_dir())
    filled = [name for name in folders if listing(HERE / name) or listing(HERE / name / "data")]
    return f"; data.name chooses one of its folders: {', '.join(filled)}" if filled else ""


def is_held_out(file: PurePath) -> bool:
    """Whether a file's name says that it is for testing: `test.jsonl`, `my_eval-0001.csv`."""
    stem = _stem(file)
    return bool(_HELD_OUT.search(stem)) and not _TRAIN.search(stem)


def _listing(root: Path) -> Listing:
    """The files with rows in a local folder itself, sorted; none if there is no such folder."""

    def files(folder: PurePosixPath) -> list[PurePath]:
        if not (root / folder).is_dir():
            return []
        inside = sorted((root / folder).iterdir())
        return [folder / file.name for file in inside if file.is_file() and _is_data(file)]

    return files


def _remote_listing(remote: Remote) -> Listing:
    return lambda folder: [file for file in remote.list(folder) if _is_data(file)]


def _remote_card(remote: Remote) -> Card | None:
    url = remote.url.partition("?")[0].rstrip("/")
    return Card.read(remote.url, url, remote.root.rstrip("/"), remote.read_text)


def _is_data(file: PurePath) -> bool:
    hidden = file.name.startswith(".")
    return bool(format_of(file)) and file.name not in METADATA and not hidden


def _is_named(file: PurePath, split: str) -> bool:
    """Whether a file is named after a split: `train.jsonl.gz`, `train-00000-of-00002.parquet`."""
    stem = _stem(file)
    return stem == split or stem.startswith(f"{split}-")


def _stem(file: PurePath) -> str:
    """A file's name without the format and the compression."""
    return file.name[: file.name.lower().rindex(str(format_of(file)))]


def _from_disk(folder: Path, split: str) -> Found:
    """A folder that `save_to_disk` wrote: a Dataset, which is the split train, or a DatasetDict."""

    def read(file: PurePosixPath) -> Any:
        try:
            return json.loads((folder / file).read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return None

    saved = saved_files(str(folder), read, split)
    if saved is None:
        raise UserError(f"{folder}: not a readable save_to_disk folder (state.json is damaged)")
    files, split = saved
    found = [DataFile(folder / file, str(folder / file)) for file in files]
    return Found(str(folder), found, split)


def saved_files(
    path: str, read: Callable[[PurePosixPath], Any], split: str
) -> tuple[list[PurePosixPath], str] | None:
    """The Arrow files of a split in a folder that `save_to_disk` wrote; None if it is not one.

    Args:
        path: the folder, for errors.
        read: a JSON file of the folder, None if there is none.
        split: the split, maybe with a slice.

    Returns:
        The files relative to the folder, and the split expressed as `train`.

    Raises:
        UserError: no such split, or the folder is incomplete.
    """
    wanted, bracket, part = split.partition("[")
    saved, splits = HERE, read(HERE / "dataset_dict.json")
    try:
        if splits is not None:
            if wanted not in splits["splits"]:
                raise UserError(f"{path}: no split {wanted!r}; it has {sorted(splits['splits'])}")
            saved, split = HERE / wanted, "train" + bracket + part
        state = read(saved / "state.json")
        if state is None and splits is None:
            return None
        names = [str(item["filename"]) for item in state["_data_files"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a readable save_to_disk folder ({error})") from None
    if foreign := [name for name in names if PurePath(name).name != name]:
        raise UserError(f"{path}: state.json: {foreign[0]!r} is not a file in this folder")
    return [saved / name for name in names], split


def _from_url(url: str, name: str | None, split: str, scratch: Path) -> Found:
    """A file or folder behind a URL, downloaded: only its contents show whether it changed."""
    remote = Remote.open(url)
    target = Path(tempfile.mkdtemp(dir=scratch))
    if remote.is_file():
        check_format(PurePosixPath(remote.name()))
        remote.fetch(None, target / remote.name())
        return Found(url, [DataFile(target / remote.name(), url)], split)
    files, split = remote_files(remote, name, split)
    for file in files:
        remote.fetch(file, target / file)
    labels = [f"{url.rstrip('/')}/{file}" for file in files]
    found = zip(files, labels, strict=True)
    return Found(url, [DataFile(target / file, label) for file, label in found], split)


def remote_files(remote: Remote, name: str | None, split: str) -> tuple[list[PurePosixPath], str]:
    """The files of a split in a folder behind a URL, and the split expressed as `train`.

    Raises:
        UserError: no such split, or a folder that cannot be read.
    """
    saved = saved_files(remote.url, remote.read_json, split)
    if saved is not None:
        return saved
    listing, card = _remote_listing(remote), _remote_card(remote)
    files, split = _files_of_split(remote.url, listing, card, name, split)
    return [PurePosixPath(file) for file in files], split


def hub_reason(error: Exception) -> str:
    """What `datasets` says of a data set it cannot load, in a line, with the configurations."""
    first, *more = (str(error).strip() or type(error).__name__).split("\n")
    names = [line for line in more if "available configs" in line]
    return " ".join([first, *names, *(["(data.name)"] if names else [])])


def _from_hub(path: str, name: str | None, split: str, revision: str | None) -> Found:
    """A data set on the hub, which `datasets` downloads and stores as Arrow files."""
    wanted, bracket, part = split.partition("[")
    try:
        table = datasets.load_dataset(path, name, split=wanted, revision=revision)
        files = [Path(item["filename"]) for item in table.cache_files]
    except (
        datasets.exceptions.DatasetNotFoundError,
        datasets.exceptions.DatasetGenerationError,
        ValueError,
        RuntimeError,
        OSError,
    ) as error:
        raise UserError(
            f"{path}: no such file or folder, and not available on the hub ({hub_reason(error)})"
        ) from None
    labels = [f"{path} {wanted}"] if len(files) == 1 else [f"{path} {f.name}" for f in files]
    found = [DataFile(file, label) for file, label in zip(files, labels, strict=True)]
    return Found(path, found, "train" + bracket + part)
