"""A byte-level BPE tokenizer trained on given texts: what the Qwen family uses, small."""

import tokenizers
import transformers

SPECIALS = ("<pad>", "<eos>", "<SLATE>", "</SLATE>", "<RANK>", "</RANK>")


def train_bpe(texts, vocab_size):
    """Every byte is known, so there is no unknown token; the tags are one token each."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        additional_special_tokens=list(SPECIALS[2:]),
        clean_up_tokenization_spaces=False,
    )


def marked_bpe(texts, vocab_size):
    """As SentencePiece's: a mark before every word, letters of another form first, bytes for what is not known."""
    made = tokenizers.models.BPE(unk_token="<unk>", byte_fallback=True)
    backend = tokenizers.Tokenizer(made)
    backend.normalizer = tokenizers.normalizers.NFKC()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    bytes_ = [f"<0x{n:02X}>" for n in range(256)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=["<unk>", "<eos>", *bytes_], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
