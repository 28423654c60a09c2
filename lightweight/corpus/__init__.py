"""What does a trial train on, and how does it become rows of tokens?

A file is read into conversations (`reading`), which are split into those to train on and those held out (`split`).
A child makes rows of tokens of them (`rows`), marked up by the tokenizer's own chat template (`template`).
"""

from lightweight.corpus.conversation import Conversation, Corpus, CorpusError, Example, Message, Origin, Text, pair
from lightweight.corpus.reading import How, load
from lightweight.corpus.rows import IGNORED, MIN_LENGTH, Row, encode, encode_prompt, encode_text
from lightweight.corpus.split import in_latin_letters

__all__ = [
    "IGNORED",
    "MIN_LENGTH",
    "Conversation",
    "Corpus",
    "CorpusError",
    "Example",
    "How",
    "Message",
    "Origin",
    "Row",
    "Text",
    "encode",
    "encode_prompt",
    "encode_text",
    "in_latin_letters",
    "load",
    "pair",
]
