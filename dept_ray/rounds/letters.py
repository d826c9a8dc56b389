"""Letters between regions: what a message looks like as a file, and the place where such files lie.

A letter is a message of `dept_ray.messages` (or plain values) as JSON, its arrays as safetensors, and a checksum before
both: it is read whole and unaltered, or not at all, and reading it runs nothing. A `Mailbox` is a folder of letters: on
this machine, or in a bucket. A letter there is whole: a bucket shows a file once all of it is there, a folder once it
is renamed. Who may write to a mailbox is trusted as a node of a cluster is: the checksum tells damage, not forgery.
"""

import dataclasses
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dept_ray import errors, messages
from dept_ray.codec import Coded, Moves
from dept_ray.draws import checksum
from dept_ray.errors import ConfigError, DeptError, SiloError, StoreError
from dept_ray.text.shards import write_atomically

_KINDS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        messages.RoundOrder, messages.SiloUpdate, messages.SiloCard, messages.SiloStatus, messages.Score, Coded, Moves,
    )
}  # fmt: skip
_TAG = "!"
"""In JSON, the key of an object that is no plain table: no name has it."""


# ------------------------------------------------------------------------------------------------ what a letter is
def seal(message: Any) -> bytes:
    """A message as the bytes of a file: checksum, then safetensors whose header has the message as JSON."""
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    known: dict[int, str] = {}
    text = json.dumps(_plain(message, arrays, known))
    blob = save(arrays, {"message": text})
    return checksum(blob).encode() + blob


def unseal(letter: bytes, where: str = "letter") -> Any:
    """The message of `seal`; its arrays are only to be read.

    Raises:
        SiloError: it was altered, or is of another version.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    blob = letter[32:]
    if checksum(blob).encode() != letter[:32]:
        raise SiloError(f"{where} arrived altered: it is not used")
    try:
        header = json.loads(blob[8 : 8 + int.from_bytes(blob[:8], "little")])
        return _message(json.loads(header["__metadata__"]["message"]), load(blob))
    except (SafetensorError, ValueError, KeyError, TypeError) as err:
        raise SiloError(
            f"{where} cannot be read ({type(err).__name__}: {err}): is dept_ray of one version everywhere?"
        ) from None


def _plain(value: Any, arrays: dict[str, np.ndarray], known: dict[int, str]) -> Any:
    """As JSON has it; an array goes among the arrays, once, however many messages hold it."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, np.ndarray):
        name = known.setdefault(id(value), str(len(known)))
        arrays[name] = np.ascontiguousarray(value)
        return {_TAG: "array", "name": name}
    if isinstance(value, DeptError):
        return {_TAG: "error", "kind": type(value).__name__, "text": str(value)}
    if isinstance(value, tuple):
        return {_TAG: "tuple", "of": [_plain(each, arrays, known) for each in value]}
    if isinstance(value, list):
        return [_plain(each, arrays, known) for each in value]
    if isinstance(value, dict):
        return {key: _plain(each, arrays, known) for key, each in value.items()}
    kind = type(value).__name__
    assert _KINDS.get(kind) is type(value), f"{type(value)} is no message"
    fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return {_TAG: kind, **{name: _plain(each, arrays, known) for name, each in fields.items()}}


def _message(value: Any, arrays: dict[str, np.ndarray]) -> Any:
    """The inverse of `_plain`."""
    if isinstance(value, list):
        return [_message(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind == "array":
        return arrays[value["name"]]
    if kind == "error":
        found = getattr(errors, value["kind"], None)
        return (found if isinstance(found, type) and issubclass(found, DeptError) else SiloError)(value["text"])
    if kind == "tuple":
        return tuple(_message(each, arrays) for each in value["of"])
    inner = {key: _message(each, arrays) for key, each in value.items() if key != _TAG}
    return inner if kind is None else _KINDS[kind](**inner)


# ------------------------------------------------------------------------------------------------ where letters lie
class Mailbox:
    """A folder of letters, by path within it.

    Args:
        uri: a local folder, or s3://bucket/prefix or gs://bucket/prefix, with pyarrow's options behind a question mark,
            as in s3://bucket/prefix?region=eu-west-1.

    Raises:
        ConfigError: it is no such place.
    """

    def __init__(self, uri: str) -> None:
        from pyarrow import ArrowException
        from pyarrow.fs import FileSystem, LocalFileSystem

        self.uri = re.sub(r"//[^/@]*@", "//", uri)  # as it may be told: a key may stand before the bucket
        try:
            if "://" in uri:
                self._files, self._root = FileSystem.from_uri(uri)
            else:
                self._files, self._root = LocalFileSystem(), str(Path(uri).expanduser().absolute())
        except (ArrowException, OSError, ValueError) as err:
            raise ConfigError(
                f"mailbox {self.uri!r} is no place for letters ({err}): name a folder, s3://bucket/prefix or "
                "gs://bucket/prefix"
            ) from None
        self._local = isinstance(self._files, LocalFileSystem)

    def write(self, path: str, message: Any) -> None:
        """Put a letter there, whole, in place of one that may be there.

        Raises:
            StoreError: it cannot be written.
        """
        letter, at = seal(message), f"{self._root}/{path}"
        with self._reaching("written", path):
            if self._local:
                Path(at).parent.mkdir(parents=True, exist_ok=True)
                write_atomically(Path(at), letter)
            else:
                with self._files.open_output_stream(at) as stream:
                    stream.write(letter)

    def read(self, path: str) -> Any:
        """The message there; None: there is none.

        Raises:
            StoreError: it cannot be reached.
            SiloError: it was altered.
        """
        for tries_left in (2, 1, 0):
            with self._reaching("read", path):
                try:
                    with self._files.open_input_file(f"{self._root}/{path}") as file:
                        letter = file.read()
                except FileNotFoundError:
                    return None
            try:
                return unseal(letter, f"{self.uri}: {path}")
            except SiloError:  # a bucket tells the size first: of one that was replaced meanwhile a part is read
                if not tries_left:
                    raise
        raise AssertionError

    def names(self, folder: str = "") -> list[str]:
        """What is in a folder: letters, and further folders.

        Raises:
            StoreError: it cannot be reached.
        """
        from pyarrow.fs import FileSelector

        with self._reaching("listed", folder):
            infos = self._files.get_file_info(FileSelector(f"{self._root}/{folder}".rstrip("/"), allow_not_found=True))
        return sorted(info.base_name for info in infos if not info.base_name.endswith(".tmp"))

    def delete(self, path: str) -> None:
        """Take a letter, or a folder with all that is in it, away; nothing, where there is none.

        Raises:
            StoreError: it cannot be reached.
        """
        from pyarrow.fs import FileType

        at = f"{self._root}/{path}"
        with self._reaching("deleted", path):
            try:
                if self._files.get_file_info(at).type == FileType.Directory:
                    self._files.delete_dir(at)
                else:
                    self._files.delete_file(at)
            except FileNotFoundError:
                return

    @contextmanager
    def _reaching(self, done: str, path: str) -> Iterator[None]:
        from pyarrow import ArrowException

        try:
            yield
        except (ArrowException, OSError) as err:
            raise StoreError(
                f"mailbox {self.uri}: {path or 'it'} cannot be {done} ({err}): check address and permissions"
            ) from None
