"""What every script shares: flags, errors of one line, settings, and files written whole.

Nothing here needs torch at import, so that a script answers `--help` and wrong flags at once:

    if __name__ == "__main__":
        parser().parse_args()  # before the imports that take seconds
"""

import argparse
import hashlib
import io
import json
import math
import os
import pickle
import platform
import secrets
import textwrap
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

FACETS = ("key", "query", "value", "token", "attn")
PRECISIONS = ("float32", "bfloat16", "float16")
UPSAMPLE = ("none", "bilinear", "lift")

RECORD = "record.json"  # what made the results of a folder


# ---- command lines ------------------------------------------------------------------------------


def first_line(error: BaseException | str) -> str:
    """The first line of an exception's text; over 150 characters it is cut between two words."""
    text = str(error).strip().split("\n")[0]
    if not text:
        return type(error).__name__
    if len(text) <= 150:
        return text
    return textwrap.shorten(text, 150, placeholder=" ...")


class Command(argparse.ArgumentParser):
    """An argument parser for one script: whatever is wrong is one line on stderr, and status 2."""

    def __init__(self, doc: str | None):
        super().__init__(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: object) -> None:  # type: ignore[override]
        one_line = " ".join(str(message).split())
        self.exit(2, f"{self.prog}: {one_line}\n")

    def run(self, main: Callable[[argparse.Namespace], Any], argv: list[str] | None = None) -> None:
        """Parse the flags, call main(args), and turn the user's errors into one line.

        ValueError and OSError are bad input; LIFT_TRACEBACK=1 raises them with their traceback.
        Running out of memory is told in one line too. Other errors are bugs, and are raised.
        """
        args = self.parse_args(argv)
        try:
            check_json(args)
            main(args)
        except KeyboardInterrupt:
            self.exit(130, f"{self.prog}: interrupted\n")
        except (ValueError, OSError) as error:
            if os.environ.get("LIFT_TRACEBACK"):
                raise
            self.error(error)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.error(f"out of memory ({first_line(error)}): pass smaller images or batches")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch raises a RuntimeError, whose words depend on the device."""
    text = str(error)
    return isinstance(error, MemoryError) or "out of memory" in text or "allocate memory" in text


def main_memory() -> float:
    """The bytes of main memory that this machine has, infinite where the system tells no sizes."""
    if not hasattr(os, "sysconf"):  # Windows
        return math.inf
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(needed: int, what: str, remedy: str, device: Any = "cpu") -> None:
    """Raise ValueError if this machine has less memory than `needed` bytes, which `what` take.

    This is about main memory: a GPU that is too small raises an error by itself, but where main
    memory runs out the system ends the process without a word.

    Args:
        device: where the bytes are needed. CUDA's are not main memory, and not checked.
    """
    there = main_memory()
    if not str(device).startswith("cuda") and needed > there:
        sizes = f"{needed / 2**30:.0f} GB, and this machine has {there / 2**30:.0f}"
        raise ValueError(f"{what} take {sizes}: {remedy}")


def truth(text: str) -> bool:
    """The bool of a word on the command line: true, yes, t, y, 1, or false, no, f, n, 0."""
    word = text.lower()
    if word in ("true", "yes", "t", "y", "1"):
        return True
    if word in ("false", "no", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text} is neither: pass True or False")


def check_json(args: argparse.Namespace) -> None:
    """Raise ValueError if --json, where a script has it, is a folder: told before the work."""
    path = getattr(args, "json", None)
    if path and Path(path).is_dir():
        raise ValueError(f"--json {path} is a folder: pass a file")


def add_backbone_args(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the flags that extractor.build_extractor reads; `defaults` overrides theirs by name."""
    stride = defaults.get("stride", "patch")
    device = defaults.get("device", "auto")
    group = parser.add_argument_group("backbone")
    add = group.add_argument
    add("--model_type", "--model", default="dino_vits8", help="of the README, or a ViT of timm")
    add("--backbone_path", help="weight file (.pth, .safetensors) instead of a download")
    add(
        "--my_extractor", nargs="?", const="extractor:my_extractor", metavar="MODULE:FUNCTION",
        help="a backbone of one's own: a function that returns it",
    )  # fmt: skip
    add("--facet", default="key", choices=FACETS, help="facet of the descriptors (default: key)")
    add("--layer", type=int, help="layer, counted from 0 (default: the last)")
    add(
        "--stride", type=int,
        help=f"pixels between descriptors, divides the patch (default: {stride})",
    )  # fmt: skip
    add("--channel", type=int, help="channels of the descriptors; only checked")
    add("--patch", type=int, help="patch of the backbone; only checked")
    add("--device", default="auto", help=f"auto, cpu, cuda, cuda:N or mps (default: {device})")
    add("--dtype", default="float32", choices=PRECISIONS, help="precision (default: float32)")
    parser.set_defaults(**defaults)


def add_lift_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags that lift.upsampler reads."""
    group = parser.add_argument_group("LiFT")
    add = group.add_argument
    add("--lift_path", help="LiFT checkpoint (.pth); without it the backbone's own features")
    add("--lift_iter", type=int, default=1, help="how often resolution is doubled (default: 1)")
    add("--upsample", choices=UPSAMPLE, help="how (default: lift with --lift_path, else none)")


def check_range(args: argparse.Namespace, **lowest: float) -> None:
    """Raise ValueError for the first flag that is given and below its lowest value."""
    for flag, least in lowest.items():
        value = getattr(args, flag)
        # "not >=" is true for NaN, as "<" is not
        if value is not None and not value >= least:
            raise ValueError(f"--{flag} {value} is too small: pass {least} or more")


def rank() -> int:
    """Which process of a torchrun this is; 0 without one."""
    return int(os.environ.get("RANK", 0))


def world_size() -> int:
    """How many processes a torchrun has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def check_torchrun() -> None:
    """Raise ValueError where torchrun's RANK and WORLD_SIZE are set, but not by torchrun."""
    if world_size() > 1 and "MASTER_ADDR" not in os.environ:
        what = "RANK and WORLD_SIZE are set, but this is no torchrun"
        raise ValueError(f"{what}: start it by torchrun, or unset them")


def check_one_process() -> None:
    """Raise ValueError under a torchrun of several processes: each would do the same work."""
    if world_size() > 1:
        raise ValueError("this is the work of one process: start it with python, not torchrun")


# ---- what made a result -------------------------------------------------------------------------


def settings(args: argparse.Namespace, **resolved: Any) -> dict[str, Any]:
    """Every flag of a run and the versions behind its numbers, as a dict that JSON can hold.

    Args:
        resolved: what was left out on the command line, as it was resolved (layer, device, ...).
    """
    import numpy
    import timm
    import torch
    import torchvision

    versions = {"python": platform.python_version()}
    for library in (torch, torchvision, timm, numpy):
        versions[library.__name__] = library.__version__
    return {**plain(vars(args)), **plain(resolved), "versions": versions}


def record(
    args: argparse.Namespace,
    *,
    leave_out: Iterable[str] = (),
    paths: Iterable[str] = (),
    **resolved: Any,
) -> dict[str, Any]:
    """What decides a result: two runs with equal records make the same one.

    Weight files count by the digests in `resolved`, not by their names or dates. The device does
    not count.

    Args:
        leave_out: flags that change how the work is done, or where it goes, but not what comes out.
        paths: flags whose values are paths; they are recorded as absolute ones.
        resolved: extractor.facts(), up.facts(), and whatever else was left out on the command line.
    """
    unimportant = {*leave_out, "backbone_path", "lift_path", "device"}
    kept = {}
    for name, value in vars(args).items():
        if name in unimportant:
            continue
        if name in paths and value is not None:
            value = absolute(value)
        kept[name] = value
    return plain({**kept, **resolved})


def absolute(value: Any) -> Any:
    """A path, or a list of paths, made absolute."""
    if isinstance(value, (list, tuple)):
        return [absolute(path) for path in value]
    return str(Path(value).resolve())


def difference(old: dict[str, Any], new: dict[str, Any]) -> str:
    """The first setting in which two records differ, as "lift_iter 1, not 2"; "" for none."""
    names = sorted({*old, *new})
    # digests come last: where a model's name differs too, that tells the reader more
    digests = [name for name in names if "digest" in name]
    others = [name for name in names if "digest" not in name]
    for name in others + digests:
        if old.get(name) != new.get(name):
            return f"{name} {old.get(name)}, not {new.get(name)}"
    return ""


def claim_folder(
    folder: str | Path, made_by: dict[str, Any], remedy: str, renew: bool = False
) -> None:
    """Write a record into FOLDER/record.json, or compare it with the one that is there.

    Args:
        made_by: a record (see `record`).
        remedy: the end of the message where another record is there, e.g. "pass --overwrite".
        renew: replace another record instead of refusing it.
    Raises:
        ValueError: the folder holds results of other settings, or a record that cannot be read.
    """
    path = Path(folder) / RECORD
    if path.is_file() and not renew:
        try:
            before = json.loads(path.read_text())
            changed = difference(before, plain(made_by))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is damaged ({first_line(error)}): {remedy}") from error
        if changed:
            raise ValueError(f"{folder} was made with {changed}: {remedy}")
        return
    write_text(path, json.dumps(plain(made_by), indent=1) + "\n")


def weights_digest(module: Any) -> str:
    """A digest of all tensors of a torch module, by name and content: 16 hexadecimal digits."""
    import torch

    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        digest.update(name.encode())
        digest.update(content.numpy())
    return digest.hexdigest()[:16]


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


def report(line: dict[str, Any], path: str | Path | None = None) -> None:
    """Print a dict as one line of JSON, and write it to `path`, where there is one, too."""
    text = json.dumps(plain(line), allow_nan=False)
    print(text)
    if path:
        write_text(path, text + "\n")


# ---- files --------------------------------------------------------------------------------------


def inside(root: str | Path, name: str) -> Path:
    """ROOT/NAME for a name from somebody's list. Raises ValueError where it leaves the folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"the name {name!r} leaves the folder {root}: correct the list it is in")
    return Path(root) / path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file whole or not at all.

    Gives a temporary path in the same folder, which is made if need be. At the end that file is
    renamed to `path`; on failure it is removed. Links are followed. What is no regular file
    (/dev/null, a pipe) cannot be replaced and is given as it is.

    Raises:
        OSError: in one line that names the file, for whatever keeps it from being written.
    """
    target = Path(path).resolve()
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
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
        remedy = "free some space or pass another path"
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


def load_tensors(path: str | Path, if_missing: str, if_damaged: str) -> dict[str, Any]:
    """The dict of a .pth or .safetensors file, on the CPU; nothing in the file is executed.

    Args:
        if_missing, if_damaged: what to do, for the end of each message.
    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, unsafe or compressed, or holds no dict with text keys.
    """
    import torch
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}: {if_missing}")
    try:
        if Path(path).suffix == ".safetensors":
            return load_file(path)
        refuse_packed(path)
        # DINO's checkpoints carry their flags as a Namespace
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of foreign pickles, then raises anyway
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
            raise TypeError(f"a {type(state).__name__}, no state_dict")
        return state
    except pickle.UnpicklingError as error:  # torch's text speaks of its own history
        raise ValueError(f"{path} is damaged or holds more than tensors: {if_damaged}") from error
    except Exception as error:  # damaged files raise nearly anything
        raise ValueError(f"{path} holds no weights ({first_line(error)}): {if_damaged}") from error


def refuse_packed(path: str | Path) -> None:
    """Raise ValueError for a zip archive whose index says it unpacks to over twice its size.

    torch.save never compresses, and a small file must not fill the memory.
    """
    if not zipfile.is_zipfile(path):
        return
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
