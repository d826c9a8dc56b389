"""Truths about the text that every machine has."""

import re
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest

from dept_ray.errors import SourceError
from dept_ray.text import installed
from dept_ray.text.installed import installed_documents


def first_bytes(collection: str, size: int) -> list[str]:
    found, read = [], 0
    for text in installed_documents(collection):
        found.append(text)
        read += len(text.encode())
        if read >= size:
            break
    return found


@pytest.mark.parametrize("collection", ["docs", "python", "cpp", "maths"])
def test_a_collection_holds_a_megabyte_in_one_order_and_gives_it_soon(collection: str) -> None:
    start = time.perf_counter()
    texts = first_bytes(collection, 1_000_000)
    assert time.perf_counter() - start < 20  # a second on an idle machine; a walk that reads all takes far longer
    assert sum(len(text.encode()) for text in texts) >= 1_000_000
    assert first_bytes(collection, 1_000_000) == texts
    assert all(text.strip() for text in texts)


def test_a_cap_opens_few_files(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: opened.append(path) or read_bytes(path))
    for collection in ("python", "cpp"):
        opened.clear()
        texts = list(islice(installed_documents(collection), 20))
        assert len(texts) <= len(opened) < 200


def test_nothing_is_imported_to_be_read() -> None:
    read = (
        "from dept_ray.text.installed import installed_documents as d; sum(len(next(d(c))) for c in ('docs', 'python'))"
    )
    check = "import sys; sys.exit(bool({'torch', 'pandas', 'sympy', 'ray', 'pyarrow'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", f"{read}; {check}"], check=False).returncode == 0


def test_the_first_files_come_from_many_packages(tmp_path: Path) -> None:
    for package in ("a", "b"):
        (tmp_path / package).mkdir()
        for i in range(50):
            (tmp_path / package / f"{i}.py").write_text(f"{package} = {i}")
    texts = list(installed._texts({"a": tmp_path / "a", "b": tmp_path / "b"}, (".py",)))
    assert len(set(texts)) == 100
    assert 10 <= sum(text.startswith("a") for text in texts[:50]) <= 40


def test_files_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "case.py").write_text("case = 1")
    (tmp_path / "table.py").write_text("x = " + "1" * 600)
    (tmp_path / "long.py").write_text("x = 1\n" * 40_000)
    (tmp_path / "latin.py").write_bytes(b"x = '\xe4'")
    (tmp_path / "empty.py").write_text("")
    (tmp_path / "message_pb2.py").write_text("x = 1")
    (tmp_path / "data.json").write_text("{}")
    (tmp_path / "code.py").write_bytes(b"x = 1\r\ny = 2")
    assert list(installed._texts({"a": tmp_path}, (".py",))) == ["x = 1\ny = 2\n"]


def test_docs_are_docstrings_without_their_examples() -> None:
    code = '''"""What the file is for."""

import os


class A:
    """What A is.

    >>> A()
    A()

    After the example.
    """

    async def run(self):
        """What it does: \\d."""
        return "not this"
'''
    assert installed._prose(code) == "What the file is for.\n\nWhat A is.\n\nAfter the example.\n\nWhat it does: \\d."
    assert installed._prose("def broken(:") == ""


def test_a_licence_at_the_top_of_a_header_goes_and_other_comments_stay() -> None:
    assert installed._without_licence("/* Copyright X */\n#pragma once\n") == "#pragma once\n"
    assert installed._without_licence("// Licensed to all.\n// Really.\n\nint a;\n") == "int a;\n"
    assert installed._without_licence("// What it does.\nint a;\n") == "// What it does.\nint a;\n"


def test_every_line_of_maths_is_true() -> None:
    pages = list(islice(installed_documents("maths"), 200))
    assert len(set(pages)) == 200
    lines = [line for page in pages for line in page.splitlines()]
    kinds = {
        line.split()[0] for line in lines if line and line[0].isalpha() and line.split()[0] not in ("answer", "down")
    }
    assert kinds == {"add", "subtract", "multiply", "divide", "gcd", "simplify", "solve", "expand", "x"}
    steps = [step for line in lines for step in re.split(r", |; |: | write", line)]
    equations = [step.split(" = ") for step in steps if re.fullmatch(r"[\d */+-]+ = [\d */+-]+", step)]
    assert len(equations) > 10_000
    for left, right in equations:
        assert eval(left) == eval(right), f"{left} = {right}"


def test_the_answers_of_maths_are_right() -> None:
    import math

    for page in islice(installed_documents("maths"), 100):
        for problem in page.strip().split("\n\n"):
            kind, _, question = problem.splitlines()[0].partition(" ")
            answer = problem.splitlines()[-1].removeprefix("answer ")
            if kind in ("add", "subtract", "multiply"):
                assert eval(question) == int(answer)
            elif kind == "divide":
                a, b = map(int, question.split(" / "))
                assert answer == f"{a // b} rest {a % b}"
            elif kind == "gcd":
                assert math.gcd(*map(int, question.split())) == int(answer)
            elif kind == "simplify":
                (a, b), (c, d) = (map(int, text.split("/")) for text in (question, answer))
                assert a * d == b * c
                assert math.gcd(c, d) == 1
            elif kind == "solve":
                left, right = (re.sub(r"x", "*x", side) for side in question.split(" = "))
                scope = {"x": int(answer.removeprefix("x = "))}
                assert eval(left, scope) == eval(right, scope)
            else:
                assert kind == "expand"
                for x in (-3, 2, 5):
                    texts = [
                        re.sub(r"x", "*x", text).replace("^", "**").replace(")(", ")*(") for text in (question, answer)
                    ]
                    assert eval(texts[0], {"x": x}) == eval(texts[1], {"x": x})


def test_maths_ends_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(installed, "MATHS_BYTES", 50_000)
    pages = list(installed_documents("maths"))
    assert 50_000 <= sum(map(len, pages)) < 70_000
    assert all(page.isascii() for page in pages)


def test_an_unknown_collection_is_refused_with_those_that_exist() -> None:
    with pytest.raises(SourceError, match=r'collection = "news".*docs, python, cpp, maths'):
        installed_documents("news")
