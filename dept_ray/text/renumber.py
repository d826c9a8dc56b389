"""A tokenizer whose ids are the rows of a vocabulary: for use of a trimmed model outside this package.

Under a trimmed vocabulary a row is `Vocabulary.to_local` of an id. Here the pieces that are owned have the ids 0 to
V_k - 1, in their order, and what any other text needs to be spelled with has those from V_k on: pieces that stand
nowhere alone in the source's text, but of which its pieces are merged, and the letters, bytes and the unknown piece on
which every text falls back. All else goes. So each id has a row once the table has been given one for those few, every
text that had an encoding has one still, and the source's own is cut as before: in it no merge, no likeliest cut and no
longest match ever came out at what is gone.
"""

import json
import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from dept_ray.errors import VocabularyError
from dept_ray.text.tokenizer import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
"""How models with `byte_fallback` write one."""


def rows_tokenizer(tokenizer: "Tokenizer", vocabulary: Vocabulary) -> "Tokenizer":
    """A tokenizer that says rows: `vocabulary.to_local` of the same ids, where the text holds none but owned ones; any
    other text is cut into smaller pieces, some of which may be rows V_k to `vocabulary_size` of the answer - 1.

    It puts nothing around a text: what a loaded tokenizer would add is not how the shards were made.

    Raises:
        VocabularyError: its kind of model is not known.
    """
    from tokenizers import Tokenizer

    state = json.loads(tokenizer.to_str())
    state["post_processor"] = None
    if vocabulary.ids is not None:
        _renumber(state, tokenizer.get_vocab(with_added_tokens=True), vocabulary)
    renumbered = Tokenizer.from_str(json.dumps(state))
    renumbered.encode_special_tokens = tokenizer.encode_special_tokens
    return renumbered


def _renumber(state: dict[str, Any], pieces: dict[str, int], vocabulary: Vocabulary) -> None:
    assert vocabulary.ids is not None
    assert len(set(pieces.values())) == len(pieces), "two pieces share an id"
    owned, model = set(vocabulary.ids.tolist()), state["model"]
    kept = _with_parts(model, {piece for piece, number in pieces.items() if number in owned} | _letters(model))
    by_row = sorted(kept, key=lambda piece: (pieces[piece] not in owned, pieces[piece]))
    rows = {piece: row for row, piece in enumerate(by_row)}
    assert all(rows[piece] < vocabulary.size for piece in kept if pieces[piece] in owned)
    # Tokens that were added beside the model's own move into it, where alone an id below others' can be had.
    added = ({**token, "id": rows[token["content"]]} for token in state["added_tokens"] if token["content"] in rows)
    state["added_tokens"] = sorted(added, key=lambda token: token["id"])
    if model["type"] == "Unigram":
        scores, unknown = dict(model["vocab"]), model.get("unk_id")
        least = min(scores.values())
        if unknown is not None:
            model["unk_id"] = rows[model["vocab"][unknown][0]]
        model["vocab"] = [[piece, scores.get(piece, least)] for piece in by_row]
    else:
        model["vocab"] = rows
    if "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if _merged(model, merge) in rows]


def _letters(model: dict[str, Any]) -> set[str]:
    """What every text falls back on: the model's letters, its bytes, and the piece for what it does not know.

    Raises:
        VocabularyError: its kind is not known.
    """
    if model["type"] == "Unigram":
        named = [piece for piece, _ in model["vocab"]]
        unknown = None if model.get("unk_id") is None else named[model["unk_id"]]
    elif isinstance(model["vocab"], dict):  # BPE, WordPiece, WordLevel
        named, unknown = model["vocab"], model.get("unk_token")
    else:
        raise VocabularyError(f"a tokenizer of model {model['type']} cannot be given the ids of a trimmed vocabulary")
    before, after = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    return {
        piece
        for piece in named
        if len(piece.removeprefix(before).removesuffix(after)) == 1
        or piece == unknown
        or (model.get("byte_fallback") and _BYTE.fullmatch(piece))
    }


def _with_parts(model: dict[str, Any], kept: Collection[str]) -> set[str]:
    """Pieces with those that they are merged of, and so on."""
    made: dict[str, list[str]] = {}
    for merge in model.get("merges", ()):
        made.setdefault(_merged(model, merge), []).extend(merge)
    found, ahead = set[str](), list(kept)
    while ahead:
        piece = ahead.pop()
        if piece not in found:
            found.add(piece)
            ahead += made.get(piece, ())
    return found


def _merged(model: dict[str, Any], merge: list[str]) -> str:
    """What a merge makes of its two pieces."""
    first, second = merge
    return first + second[len(model.get("continuing_subword_prefix") or "") :]
