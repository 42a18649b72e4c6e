"""Records, tokens, chat formats, packing: everything before the model."""

from pedgpt.data.chat import ChatFormat, Example, chat_format, encode_conversation, encode_prompt
from pedgpt.data.hybrid import as_completion, mix
from pedgpt.data.packing import (
    Batch,
    collate,
    encode_conversations,
    encode_document,
    fingerprint,
    pack,
    utilization,
)
from pedgpt.data.preference import EncodedPair, PreferenceBatch, collate_pairs, encode_pair, encode_pairs
from pedgpt.data.records import (
    Conversation,
    Document,
    Message,
    PreferencePair,
    ReadSummary,
    Record,
    Triple,
    iter_records,
    read_conversations,
    read_documents,
    read_preferences,
    read_triples,
)
from pedgpt.data.reference import load_reference, reference_key, save_reference
from pedgpt.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "Batch",
    "ChatFormat",
    "Conversation",
    "Document",
    "EncodedPair",
    "Example",
    "Message",
    "PreferenceBatch",
    "PreferencePair",
    "ReadSummary",
    "Record",
    "StreamDecoder",
    "Tokenizer",
    "Triple",
    "as_completion",
    "chat_format",
    "collate",
    "collate_pairs",
    "encode_conversation",
    "encode_conversations",
    "encode_document",
    "encode_pair",
    "encode_pairs",
    "encode_prompt",
    "fingerprint",
    "iter_records",
    "load_reference",
    "load_tokenizer",
    "mix",
    "pack",
    "read_conversations",
    "read_documents",
    "read_preferences",
    "read_triples",
    "reference_key",
    "save_reference",
    "train_tokenizer",
    "utilization",
]
