"""Files written whole, tensors read safely, and folders of results that know what made them.

    results = Results("features", settings, own=("*.pth",))
    if not results.has("cat.jpg.pth"):
        with results.writing("cat.jpg.pth") as path:
            torch.save(feats, path)

Nothing here needs torch at import.
"""

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import secrets
import textwrap
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

SETTINGS = "settings.json"  # in a folder of results: what made them


def first_line(error: BaseException | str) -> str:
    """The first line of an exception's text; over 150 characters it is cut between two words."""
    text = str(error).strip().split("\n")[0]
    if not text:
        return type(error).__name__
    if len(text) <= 150:
        return text
    return textwrap.shorten(text, 150, placeholder=" ...")


# ---- writing ------------------------------------------------------------------------------------


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Gives a temporary path in the same folder, which is made if need be. At the end that file is
    renamed to `path`; on failure it is removed. Links are followed. Something that is not a regular
    file (/dev/null, a pipe) cannot be replaced, and is written to directly.

    Raises:
        OSError: in one line that names the file, for whatever keeps it from being written.
    """
    target = Path(path).resolve()
    # a name of its own length: the file's own may already be as long as the system allows
    temporary = target.with_name(f".{secrets.token_hex(8)}{target.suffix}")
    try:
        if target.exists() and not target.is_file() and not target.is_dir():
            yield target
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        if error.errno is None:  # not the system's: Pillow's, for an encoder that is missing
            raise
        remedy = "free some space, shorten its name or choose another path"
        raise OSError(f"cannot write {path} ({first_line(error)}): {remedy}") from error
    finally:
        with suppress(OSError):  # the folder may be missing, or be a file
            temporary.unlink(missing_ok=True)  # still there only if something went wrong


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file in UTF-8, whole or not at all."""
    write_bytes(path, text.encode())


def inside(root: str | Path, name: str) -> Path:
    """ROOT/NAME for a name from somebody's list. Raises ValueError where it leaves the folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the name {name!r} leaves the folder {root}: correct the list it is in")
    return Path(root) / path


# ---- tensors ------------------------------------------------------------------------------------


def load_tensors(path: str | Path, if_missing: str, if_damaged: str) -> dict[str, Any]:
    """The dict of a .pth or .safetensors file, on the CPU; nothing in the file is executed.

    Args:
        if_missing, if_damaged: what to do, for the end of each message.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, unsafe or compressed, or does not hold a dict with text keys.
    """
    import torch
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"there are no weights at {path}: {if_missing}")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        known: list[Any] = [argparse.Namespace]  # DINO's checkpoints carry their flags as one
        if zipfile.is_zipfile(path):  # torch's old format is none, and cannot be searched
            refuse_packed(path)
            known += as_foreign(path)
        with torch.serialization.safe_globals(known), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles, then raises anyway
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise TypeError(f"a {type(state).__name__} instead of a state_dict")
        return state
    except Exception as error:  # damaged files raise nearly anything
        what = f"cannot read weights from {path} ({first_line(error)})"
        if isinstance(error, pickle.UnpicklingError):  # torch's text speaks of its own history
            what = f"{path} is damaged or holds more than tensors"
        raise ValueError(f"{what}: {if_damaged}") from error


class Foreign:
    """Stands for whatever a checkpoint holds beside tensors: nothing of it is built or called."""

    def __init__(self, *args: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def as_foreign(path: str | Path) -> list[tuple[type, str]]:
    """Foreign for each name in a checkpoint that torch does not allow, such as numpy's scalars.

    Not for torch's own names (a pickled module's) and builtins (eval): those stay refused.
    """
    import torch

    names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    return [(Foreign, name) for name in names if not name.startswith(("torch.", "builtins."))]


def refuse_packed(path: str | Path) -> None:
    """Raise ValueError for a zip archive whose index says it unpacks to over twice its size.

    torch.save never compresses, and a small file must not fill the memory.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    packed = Path(path).stat().st_size
    if unpacked > 2 * packed:
        raise ValueError(f"{packed} bytes that unpack to {unpacked}")


def save_tensors(path: str | Path, tensors: Any) -> None:
    """torch.save, whole or not at all.

    To memory first: torch's own writer turns a full disk into an error that does not say so.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(tensors, buffer)
    write_bytes(path, buffer.getvalue())


def weights_digest(module: Any) -> str:
    """A digest of all tensors of a torch module, by name and content: 16 hexadecimal digits."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode())
        digest.update(content.numpy())
    return digest.hexdigest()[:16]


# ---- settings and results -----------------------------------------------------------------------


def plain(value: Any) -> Any:
    """A value as JSON can hold it.

    Paths become text, tuples become lists, and numbers that are not finite become null.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting in which two dicts differ, as "lift_iter 1, not 2"; "" for none."""
    # digests come last: where a model's name differs too, that tells the reader more
    for name in sorted({*old, *new}, key=lambda name: ("digest" in name, name)):
        if old.get(name) != new.get(name):
            return f"{name} {old.get(name)}, not {new.get(name)}"
    return ""


class Results:
    """A folder of results, all made by the same settings.

    The settings are kept in FOLDER/settings.json. A run with the same settings keeps what is there
    and goes on; other settings are refused. Two runs at once do no harm: of each file the last
    whole version stays.

    Args:
        settings: whatever decides the results (command.deciding).
        overwrite: remove the results of an earlier run, whatever its settings were.
        own: patterns of the files that count as results, anywhere below the folder.
        remedy: what to do about other settings, for the end of the message.
    Raises:
        ValueError: the folder was made with other settings, or nobody knows with which.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        overwrite: bool = False,
        own: tuple[str, ...] = ("*.pth",),
        remedy: str = "pass --overwrite, or another folder",
    ):
        self.folder = Path(folder)
        path = self.folder / SETTINGS
        settings = plain(settings)
        first = next(self._own_files(own), None)
        if first and not path.is_file():
            # without settings they may be anybody's, so they are not removed either
            what = f"{first} is there, and no {SETTINGS} says what made it"
            raise ValueError(f"{what}: choose an empty folder")
        if first and not overwrite:
            try:
                changed = difference(json.loads(path.read_text()), settings)
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise ValueError(f"{path} is damaged ({first_line(error)}): {remedy}") from error
            if changed:
                raise ValueError(f"{folder} was made with {changed}: {remedy}")
            return

        # new settings for an empty folder, or one that is emptied
        for file in list(self._own_files(own)):
            file.unlink(missing_ok=True)
        write_text(path, json.dumps(settings, indent=1) + "\n")

    def _own_files(self, patterns: tuple[str, ...]) -> Iterator[Path]:
        """The results in the folder, hidden files left out: other programs keep theirs there."""
        for pattern in patterns:
            for file in self.folder.rglob(pattern):
                if not file.name.startswith("."):
                    yield file

    def path(self, name: str | Path) -> Path:
        """Where the result of this name is, or goes."""
        return inside(self.folder, str(name))

    def has(self, name: str | Path) -> bool:
        """Whether the result of this name is there."""
        return os.path.isfile(self.path(name))  # False, too, for a name that is too long

    def writing(self, name: str | Path) -> AbstractContextManager[Path]:
        """Write the result of this name, whole or not at all (see `replacing`)."""
        return replacing(self.path(name))
