"""Text as the token ids of one network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from effcli.errors import CheckpointError, DataError, first_line, foreign
from effcli.files.checkpoint import read_config
from effcli.files.layout import network_config
from effcli.platform.huggingface import check_causal, load_network_config, quiet_transformers

_TOKENIZER = "copy the tokenizer's files (tokenizer.json, tokenizer_config.json) into it"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
    "tokenizer_config.json",
)


@dataclass(frozen=True)
class Reader:
    """What turns text into the token ids of one network.

    vocabulary: number of token ids the network knows; longest: the longest sequence it takes, None when it names none.
    """

    tokenizer: Any
    vocabulary: int
    longest: int | None

    @staticmethod
    def open(path: Path, trust_remote_code: bool = False) -> Reader:
        """The tokenizer in the checkpoint directory `path`; `DataError` when there is none that can be used."""
        from transformers import AutoTokenizer

        quiet_transformers()
        own = network_config(read_config(path))
        check_causal(path, own)
        config = load_network_config(path, own, trust_remote_code)
        if not any((path / name).is_file() for name in _TOKENIZER_FILES):
            raise DataError(f"{path} holds no tokenizer, so no text can be read for it", _TOKENIZER)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                path, config=config, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:
            # Each tokenizer class fails in its own way; the first line says which file or package it misses.
            raise DataError(f"the tokenizer in {path} cannot be loaded: {first_line(error)}", _TOKENIZER) from error
        return Reader(tokenizer, vocabulary_size(config), longest_sequence(config))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids of `text`, special tokens as the tokenizer adds them by default unless `special` is False."""
        name = getattr(self.tokenizer, "name_or_path", "")
        with foreign(lambda cause: DataError(f"the tokenizer in {name} reads no text: {cause}", _TOKENIZER)):
            # verbose: the text is longer than the model's context on purpose.
            return list(self.tokenizer(text, add_special_tokens=special, verbose=False).input_ids)

    def spans(self, text: str, special: bool = True) -> list[tuple[int, int]]:
        """Where each of the tokens that `encode` returns lies in `text`, as characters [begin, end).

        Empty where a token stands for no character. Raises `DataError` for a tokenizer that does not know.
        """
        name = getattr(self.tokenizer, "name_or_path", "")
        if not getattr(self.tokenizer, "is_fast", False):
            raise DataError(
                f"the tokenizer in {name} does not say which characters a token stands for",
                "copy the model's tokenizer.json beside it, or learn all tokens",
            )
        with foreign(lambda cause: DataError(f"the tokenizer in {name} reads no text: {cause}", _TOKENIZER)):
            found = self.tokenizer(text, add_special_tokens=special, verbose=False, return_offsets_mapping=True)
            return [(begin, end) for begin, end in found["offset_mapping"]]

    def decode(self, ids: list[int]) -> str:
        """The text of token ids, without special tokens; ids that the tokenizer does not know are left out."""
        name = getattr(self.tokenizer, "name_or_path", "")
        known = [token for token in ids if token < len(self.tokenizer)]
        with foreign(lambda cause: DataError(f"the tokenizer in {name} writes no text: {cause}", _TOKENIZER)):
            return str(self.tokenizer.decode(known, skip_special_tokens=True))

    def check_length(self, length: int, key: str) -> None:
        """Raise `DataError` when windows of `length` tokens, asked for under `key`, do not fit the network."""
        if self.longest is not None and length > self.longest:
            raise DataError(
                f"{key}: windows of {length} tokens are longer than the {self.longest} that the model takes",
                f"at most {self.longest}: --set {key}={self.longest}, or --length of `effcli eval`",
            )

    def check_ids(self, ids: list[int]) -> None:
        """Raise `DataError` when the tokenizer gives ids that the network does not know."""
        if ids and max(ids) >= self.vocabulary:
            raise DataError(
                f"the tokenizer gives token {max(ids)}, the network knows only {self.vocabulary}",
                "the tokenizer belongs to another model; copy the files of the right one",
            )


def vocabulary_size(config: Any) -> int:
    """How many token ids a network with this transformers config knows; `CheckpointError` when it is no number."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    if type(size) is not int or size < 1:
        raise CheckpointError(
            f"config.json is damaged: vocab_size is {size!r}", "restore it from the original checkpoint"
        )
    return size


def longest_sequence(config: Any) -> int | None:
    """The longest sequence, in tokens, that a network with this transformers config takes; None when it has no say."""
    text_config = config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"):
        value = getattr(text_config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
