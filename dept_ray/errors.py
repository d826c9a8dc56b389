"""Every way this package fails on purpose, as one tree.

    DeptError
    ├── ConfigError            a job file (or a command's option) says something that cannot be done
    ├── DataError
    │   ├── SourceError        raw text is missing, empty, or not text
    │   ├── VocabularyError    a tokenizer or an id does not fit
    │   └── ShardError         prepared tokens are missing, half-written, or altered
    ├── RunError
    │   ├── StoreError         the run folder, or a silo's snapshot, cannot be read or written
    │   ├── WrongRunError      the folder belongs to another job
    │   ├── SiloError          a silo failed, or answered what it was not asked
    │   └── QuorumLost         too few silos answered for the round to count
    └── ClusterError           Ray cannot be reached, or can never hold what the job asks for

Each message names the key or file, the value found, and the remedy. All errors pickle: they cross processes.
"""

import difflib


class DeptError(Exception):
    """Something the user can mend; the command line prints the message alone, without a traceback."""


class ConfigError(DeptError):
    """A job file or an option is wrong."""


class DataError(DeptError):
    """Text, tokenizer or shards are wrong."""


class SourceError(DataError):
    """Raw text is missing, empty, or not text."""


class VocabularyError(DataError):
    """A tokenizer, a vocabulary or a token id does not fit."""


class ShardError(DataError):
    """Prepared tokens are missing, half-written or altered."""


class RunError(DeptError):
    """A run cannot go on."""


class StoreError(RunError):
    """A run folder or a snapshot cannot be read or written."""


class WrongRunError(RunError):
    """A run folder belongs to another job."""


class SiloError(RunError):
    """A silo failed, or answered what it was not asked."""


class QuorumLost(RunError):
    """Too few silos answered for the round to count."""


class ClusterError(DeptError):
    """Ray cannot be reached, or can never hold what the job asks for."""


def discreet(err: Exception, log: str = "its own log") -> DeptError:
    """What may leave a silo of an exception under SPEC, where no id, no shape and no piece of text may.

    Args:
        err: whatever happened; what is not told is for the caller to print.
        log: where the rest is.

    >>> discreet(StoreError("disk full")), discreet(KeyError("a word of the text"))
    (StoreError('disk full'), SiloError('KeyError; its own log says more'))
    """
    told = isinstance(err, RunError | ShardError | ClusterError)  # they name files and settings
    return err if told else SiloError(f"{type(err).__name__}; {log} says more")


def nearest(word: str, known: list[str]) -> str:
    """The end of a message about an unknown word: what may have been meant, or else all that is known.

    >>> nearest("laers", ["width", "layers"])
    '; did you mean layers?'
    >>> nearest("zzzz", ["width", "layers"])
    '; known: layers, width'
    >>> nearest("zzzz", [])
    ''
    """
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; known: {', '.join(sorted(known))}" if known else ""
