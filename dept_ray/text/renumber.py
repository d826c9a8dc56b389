"""A tokenizer whose ids are the rows of a vocabulary: for use of a trimmed model outside this package.

Under a trimmed vocabulary a row is `Vocabulary.to_local` of an id. Here the same pieces are given new ids: those that
are kept 0 .. V_k - 1, in their order, and all others V_k and above. None is left out: a piece is also made of pieces
that stand nowhere alone, and a text that holds what the source never did must still be spelled with *that* piece, an id
that has no row, and not silently with others. What is kept, merged or likely is not touched, so every text is cut as
before.
"""

import json
from typing import TYPE_CHECKING, Any

from dept_ray.errors import VocabularyError
from dept_ray.text.tokenizer import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def rows_tokenizer(tokenizer: "Tokenizer", vocabulary: Vocabulary) -> "Tokenizer":
    """The same tokenizer, saying rows: `vocabulary.to_local` of its ids where they are owned, V_k or more elsewhere.

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
    kept = set(vocabulary.ids.tolist())
    old = sorted(pieces.values(), key=lambda number: (number not in kept, number))
    new = {number: row for row, number in enumerate(old)}
    by_row = dict(sorted(((piece, new[number]) for piece, number in pieces.items()), key=lambda each: each[1]))
    assert len(by_row) == len(new), "two pieces share an id"
    assert all(new[number] < vocabulary.size for number in kept)
    # Tokens that were added beside the model's own move into it, where alone an id below others' can be had.
    state["added_tokens"] = sorted(
        ({**token, "id": new[token["id"]]} for token in state["added_tokens"]), key=lambda token: token["id"]
    )
    model = state["model"]
    if isinstance(model["vocab"], dict):  # BPE, WordPiece, WordLevel
        model["vocab"] = by_row
    elif model["type"] == "Unigram":
        scores = dict(enumerate(score for _, score in model["vocab"]))
        least = min(scores.values())
        model["vocab"] = [[piece, scores.get(pieces[piece], least)] for piece in by_row]
        if model.get("unk_id") is not None:
            model["unk_id"] = new[model["unk_id"]]
    else:
        raise VocabularyError(f"a tokenizer of model {model['type']} cannot be given the ids of a trimmed vocabulary")
