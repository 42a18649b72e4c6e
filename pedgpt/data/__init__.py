"""Records, tokens, chat formats, packing: everything before the model."""

from pedgpt.data.chat import ChatFormat, ChatSettings, FormatSettings, chat_format
from pedgpt.data.examples import Example, encode_conversation, encode_conversations, encode_document, encode_prompt
from pedgpt.data.hybrid import mix, part_shares
from pedgpt.data.manifest import TextSource, heldout_files, stage_sources
from pedgpt.data.packing import collate, full_rows, pack
from pedgpt.data.preference import EncodedPair, StoredPairs, collate_pairs, encode_pairs, full_pairs
from pedgpt.data.readers import iter_records, parse_columns, read_conversations, read_documents, read_preferences
from pedgpt.data.records import Conversation, Document, Message, PreferencePair, ReadSummary, Triple
from pedgpt.data.reference import load_reference, reference_key, save_reference
from pedgpt.data.store import PackedRows, TokenStore, discards_tokens, packed_chats, write_chats, write_tokens
from pedgpt.data.tokenizer import StreamDecoder, Tokenizer, load_tokenizer, taught_folder, train_tokenizer

__all__ = [
    "ChatFormat", "ChatSettings", "Conversation", "Document", "EncodedPair", "Example", "FormatSettings", "Message",
    "PackedRows", "PreferencePair", "ReadSummary", "StoredPairs", "StreamDecoder", "TextSource", "TokenStore",
    "Tokenizer", "Triple", "chat_format", "collate", "collate_pairs", "discards_tokens", "encode_conversation",
    "encode_conversations", "encode_document", "encode_pairs", "encode_prompt", "full_pairs", "full_rows",
    "heldout_files", "iter_records", "load_reference", "load_tokenizer", "mix", "pack", "packed_chats", "parse_columns",
    "part_shares", "read_conversations", "read_documents", "read_preferences", "reference_key", "save_reference",
    "stage_sources", "taught_folder", "train_tokenizer", "write_chats", "write_tokens",
]  # fmt: skip
