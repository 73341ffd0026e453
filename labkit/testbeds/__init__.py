"""Small worlds for experiments: corpora, tokenizers, tiny Hugging Face models and synthetic tasks."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "corpus": ["split", "stdlib_text"],
        "data": [],
        "language": ["language_model"],
        "models": ["tiny", "tiny_config"],
        "recall": ["RecallWorld"],
        "retrieval": ["RetrievalBatch", "RetrievalTask", "train_retrieval"],
        "shipped": [],
        "specimens": ["load_pair", "specimen"],
        "tokenizers": ["byte_tokenizer", "train_bpe"],
        "training": [
            "TrainingLog",
            "bits_per_byte",
            "lm_loss",
            "loss_by_position",
            "train_lm",
            "train_steps",
        ],
    },
)
