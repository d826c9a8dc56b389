"""Text that is already on every machine with this package: four collections to train on without a download.

`docs`, `python` and `cpp` are read from the standard library and from the packages that dept_ray depends on; nothing is
imported, only read, so a collection costs no more than its files. `maths` is generated. What is installed differs
between machines, so the first three are the same text only where the same versions are; this module does not record
which text was read.

The one idea: files come in the order of a hash of their path, not of the alphabet, so that a source which stops at a
cap has read a fair sample of all packages, and has opened no other file.
"""

import ast
import hashlib
import inspect
import os
import re
import sysconfig
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from math import gcd
from pathlib import Path

from dept_ray.draws import generator
from dept_ray.errors import SourceError

# By name and not "all that is installed", so that development tools beside us do not change the text.
PACKAGES = tuple(
    """
    absl attr click datasets dateutil dill fsspec huggingface_hub jinja2 jsonschema markdown mpmath multiprocess
    networkx numpy packaging pandas PIL pyarrow pydantic pygments ray requests rich safetensors sympy tensorboard
    tokenizers torch tqdm typing_extensions urllib3 werkzeug yaml
    """.split()  # noqa: SIM905 - one name a line would fill the screen
)
_NO_TEXT = frozenset(
    """
    __pycache__ site-packages dist-packages test tests idlelib lib2to3 ensurepip thirdparty_files third_party _vendor
    include
    """.split()  # noqa: SIM905 - one name a line would fill the screen
)

LONGEST_FILE = 200_000
"""Bytes; longer files are tables more often than text."""
LONGEST_LINE = 500
"""Characters; longer lines are generated."""
SHORTEST_DOCUMENT = 200
"""Characters of prose in a file of docstrings."""
MATHS_BYTES = 20_000_000
"""Where `maths` ends when no cap ends it earlier."""


def installed_documents(collection: str) -> Iterator[str]:
    """The documents of `docs`, `python`, `cpp` or `maths`, one file (or one page of problems) each.

    `maths` ends after 20 MB; the others end with their files.

    Raises:
        SourceError: no collection has that name.
    """
    collections: dict[str, Callable[[], Iterator[str]]] = {
        "docs": _docs,
        "python": _python,
        "cpp": _cpp,
        "maths": _maths,
    }
    if collection not in collections:
        raise SourceError(f'collection = "{collection}" does not exist: write one of {", ".join(collections)}')
    return collections[collection]()


# Files.


def _docs() -> Iterator[str]:
    """What the packages say of themselves, then the docstrings of each file that consists mostly of them."""
    for package in PACKAGES:
        try:
            metadata = distribution(package).read_text("METADATA") or ""
        except PackageNotFoundError:
            continue  # not installed, or its distribution has another name than its folder
        description = metadata.replace("\r\n", "\n").partition("\n\n")[2].strip()
        if len(description) >= SHORTEST_DOCUMENT:
            yield description
    for text in _texts(_roots(), (".py",)):
        # Parsing is what costs, at 3 MB/s, and most files are code: parse those that are mostly docstrings.
        if sum(map(len, re.findall(r'"""(.*?)"""', text, re.DOTALL))) < 0.4 * len(text):
            continue
        prose = _prose(text)
        if len(prose) >= SHORTEST_DOCUMENT:
            yield prose


def _python() -> Iterator[str]:
    return _texts(_roots(), (".py",))


def _cpp() -> Iterator[str]:
    torch = _folder("torch")
    for text in _texts({"torch": torch / "include"} if torch else {}, (".h", ".hpp", ".cuh")):
        # torchgen writes thousands of headers that differ in one operator's name.
        if "@generated" not in text[:500]:
            yield _without_licence(text)


def _roots() -> dict[str, Path]:
    """Folders of Python text, by the name that their files are ordered under."""
    roots = {package: folder for package in PACKAGES if (folder := _folder(package))}
    return {"stdlib": Path(sysconfig.get_paths()["stdlib"]), **roots}


def _folder(package: str) -> Path | None:
    """Where a package is installed, found without importing it."""
    spec = find_spec(package)
    # Without an origin it would be some folder of that name which happens to be on the path.
    return Path(spec.origin).parent if spec and spec.origin and spec.submodule_search_locations else None


def _texts(roots: dict[str, Path], suffixes: tuple[str, ...]) -> Iterator[str]:
    """The readable files under `roots`, in the order of a hash of their path."""
    found: list[tuple[bytes, str, Path]] = []
    for name, root in roots.items():
        for folder, inner, files in os.walk(root):
            inner[:] = [each for each in inner if each not in _NO_TEXT]
            for file in files:
                if file.endswith(suffixes) and not file.endswith("_pb2.py"):
                    path = Path(folder, file)
                    label = f"{name}/{path.relative_to(root).as_posix()}"
                    found.append(
                        (hashlib.blake2b(label.encode("utf-8", "replace"), digest_size=8).digest(), label, path)
                    )
    for _, _, path in sorted(found):
        data = path.read_bytes() if path.stat().st_size <= LONGEST_FILE else b""
        try:
            text = data.decode("utf-8").replace("\r\n", "\n").strip()
        except UnicodeDecodeError:
            continue
        if text and max(map(len, text.splitlines())) <= LONGEST_LINE:
            yield text + "\n"


def _prose(code: str) -> str:
    """The docstrings of a file, without the examples that a prompt introduces."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes in other people's strings
            tree = ast.parse(code)
    except (SyntaxError, ValueError):
        return ""
    docstrings = (inspect.cleandoc(ast.get_docstring(node, clean=False) or "") for node in _documented(tree))
    prose = (re.sub(r"^ *>>>.*?(\n *(?=\n)|\Z)", "", each, flags=re.DOTALL | re.MULTILINE) for each in docstrings)
    return "\n\n".join(filter(None, (re.sub(r"\n{3,}", "\n\n", each).strip() for each in prose)))


def _documented(
    node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef,
) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    yield node
    for child in node.body:
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _documented(child)


def _without_licence(code: str) -> str:
    """A header without the comment at its top, if that is a licence."""
    top = re.match(r"(?:\s*/\*.*?\*/|(?:\s*//[^\n]*\n)+)\s*", code, re.DOTALL)
    if top and re.search(r"copyright|licen[cs]e", top.group(), re.IGNORECASE):
        return code[top.end() :]
    return code


# Problems.


def _maths() -> Iterator[str]:
    """Pages of worked problems: few kinds, one format, every step follows from the line before it."""
    written = page = 0
    while written < MATHS_BYTES:
        draws = iter(generator("maths", 0, page).integers(0, 2**31, 400).tolist())
        kinds = [_KINDS[next(draws) % len(_KINDS)] for _ in range(20 + next(draws) % 21)]
        text = "\n".join(kind(draws) for kind in kinds)
        yield text
        written += len(text)  # all of it is ASCII
        page += 1


def _number(draws: Iterator[int], digits: int) -> int:
    """A number from 1 on of at most so many digits; short numbers are as frequent as long ones."""
    return 1 + next(draws) % (10 ** (1 + next(draws) % digits) - 1)


def _add(draws: Iterator[int]) -> str:
    a, b = _number(draws, 5), _number(draws, 5)
    lines, carry, x, y = [f"add {a} + {b}"], 0, a, b
    while x or y:
        total = x % 10 + y % 10 + carry
        lines.append(f"{x % 10} + {y % 10} + {carry} = {total} write {total % 10} carry {total // 10}")
        x, y, carry = x // 10, y // 10, total // 10
    return "\n".join([*lines, f"answer {a + b}\n"])


def _subtract(draws: Iterator[int]) -> str:
    b, a = sorted((_number(draws, 5), _number(draws, 5)))
    lines, borrow, x, y = [f"subtract {a} - {b}"], 0, a, b
    while x:
        rest = x % 10 - y % 10 - borrow
        lines.append(f"{x % 10} - {y % 10} - {borrow} = {rest} write {rest % 10} borrow {int(rest < 0)}")
        x, y, borrow = x // 10, y // 10, int(rest < 0)
    return "\n".join([*lines, f"answer {a - b}\n"])


def _multiply(draws: Iterator[int]) -> str:
    a, b = _number(draws, 4), _number(draws, 3)
    lines, total, place, y = [f"multiply {a} * {b}"], 0, 1, b
    while y:
        digit, carry, x, steps = y % 10, 0, a, []
        while x:
            product = x % 10 * digit + carry
            steps.append(f"{x % 10} * {digit} + {carry} = {product}")
            x, carry = x // 10, product // 10
        lines.append(f"{', '.join(steps)}; {a} * {digit * place} = {a * digit * place}")
        lines.append(f"{total} + {a * digit * place} = {total + a * digit * place}")
        total, place, y = total + a * digit * place, place * 10, y // 10
    return "\n".join([*lines, f"answer {total}\n"])


def _divide(draws: Iterator[int]) -> str:
    a, b = _number(draws, 6), _number(draws, 2)
    lines, rest = [f"divide {a} / {b}"], 0
    for digit in str(a):
        current = rest * 10 + int(digit)
        times, rest = divmod(current, b)
        lines.append(f"down {digit}: {current} = {times} * {b} + {rest}")
    return "\n".join([*lines, f"answer {a // b} rest {rest}\n"])


def _gcd(draws: Iterator[int]) -> str:
    a, b = _number(draws, 4), _number(draws, 4)
    return "\n".join([f"gcd {a} {b}", *_euclid(a, b), f"answer {gcd(a, b)}\n"])


def _simplify(draws: Iterator[int]) -> str:
    factor, a, b = _number(draws, 2), _number(draws, 2), _number(draws, 2)
    a, b = a * factor, b * factor
    common = gcd(a, b)
    parts = [f"{a} / {common} = {a // common}", f"{b} / {common} = {b // common}"]
    return "\n".join([f"simplify {a}/{b}", *_euclid(a, b), *parts, f"answer {a // common}/{b // common}\n"])


def _euclid(a: int, b: int) -> Iterator[str]:
    while b:
        yield f"{a} = {a // b} * {b} + {a % b}"
        a, b = b, a % b


def _solve(draws: Iterator[int]) -> str:
    x, c, b = next(draws) % 41 - 20, 1 + next(draws) % 9, next(draws) % 99 - 49
    a = c + 1 + next(draws) % 9  # more than c, so that what is left of x stays positive
    d = a * x + b - c * x
    steps = [f"{a}x - {c}x = {d} {_signed(-b)}", f"{a - c}x = {d - b}", f"x = {d - b} / {a - c}"]
    return "\n".join([f"solve {a}x {_signed(b)} = {c}x {_signed(d)}", *steps, f"answer x = {x}\n"])


def _expand(draws: Iterator[int]) -> str:
    a, c = 1 + next(draws) % 9, 1 + next(draws) % 9
    b, d = next(draws) % 19 - 9, next(draws) % 19 - 9
    first, second, last = a * c, a * d + b * c, b * d
    steps = [f"{a}x * {c}x = {first}x^2", f"{a}x * {d} = {a * d}x", f"{b} * {c}x = {b * c}x", f"{b} * {d} = {last}"]
    steps.append(f"{a * d}x {_signed(b * c)}x = {second}x")
    answer = f"answer {first}x^2 {_signed(second)}x {_signed(last)}\n"
    return "\n".join([f"expand ({a}x {_signed(b)})({c}x {_signed(d)})", *steps, answer])


def _signed(number: int) -> str:
    return f"+ {number}" if number >= 0 else f"- {-number}"


_KINDS = (_add, _subtract, _multiply, _divide, _gcd, _simplify, _solve, _expand)
