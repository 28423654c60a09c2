"""What does a trial train on, and how does it become rows of tokens?

A file is read into conversations (`reading`), which are split into those to train on and those held out (`split`). The
child makes rows of tokens of them (`rows`), with the tokenizer's own chat template (`template`). The formats of files
are in `formats`.
"""

from lightweight.corpus.conversation import (
    THERAPIST,
    Conversation,
    Corpus,
    CorpusError,
    Example,
    Kind,
    Message,
    Origin,
    Task,
    Text,
    pair,
)
from lightweight.corpus.formats import NAMES as FORMATS
from lightweight.corpus.lengths import histogram
from lightweight.corpus.reading import How, load
from lightweight.corpus.rows import (
    IGNORED,
    Encoded,
    Long,
    Row,
    RowForm,
    Rows,
    encode,
    encode_all,
    encode_prompt,
    encode_text,
    encode_whole,
    ends_of_answers,
    watched,
)
from lightweight.corpus.split import in_latin_letters, share_of, without_heldout
from lightweight.corpus.task import load_task
from lightweight.corpus.template import LossOn

__all__ = [
    "FORMATS",
    "IGNORED",
    "THERAPIST",
    "Conversation",
    "Corpus",
    "CorpusError",
    "Encoded",
    "Example",
    "How",
    "Kind",
    "Long",
    "LossOn",
    "Message",
    "Origin",
    "Row",
    "RowForm",
    "Rows",
    "Task",
    "Text",
    "encode",
    "encode_all",
    "encode_prompt",
    "encode_text",
    "encode_whole",
    "ends_of_answers",
    "histogram",
    "in_latin_letters",
    "load",
    "load_task",
    "pair",
    "share_of",
    "watched",
    "without_heldout",
]
