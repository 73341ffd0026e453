"""Small worlds for experiments: corpora, tokenizers, tiny Hugging Face models and synthetic tasks."""

from labkit._lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        "cl_benchmark": [],
        "cue": ["CueWorld", "RoutedMaps", "train_maps"],
        "corpus": ["split", "stdlib_text"],
        "data": [],
        "delayed": ["DelayedTask"],
        "editing": ["EditingWorld", "editing_world"],
        "digits": ["DigitTask", "digits_model", "token_accuracy"],
        "facts": ["FactsWorld", "facts_model"],
        "language": ["language_model"],
        "models": ["tiny", "tiny_config"],
        "prose": ["ProseWorld", "prose_model"],
        "recall": ["RecallWorld"],
        "retrieval": ["RetrievalBatch", "RetrievalTask", "train_retrieval"],
        "routed_lm": ["RoutedLM", "train_lms"],
        "shipped": [],
        "stacked": ["Stack"],
        "signatures": ["Signature", "signature_edits", "signature_facts"],
        "specimens": ["load_pair", "specimen"],
        "string_tasks": ["StringTasks", "exact_match"],
        "synonyms": ["SynonymTask"],
        "tokenizers": ["byte_tokenizer", "train_bpe"],
        "tara": [],
        "tara_planner": [],
        "tara_record": [],
        "tara_rewards": [],
        "tool_questions": [],
        "stdlib_tasks": ["ClassificationTask", "StdlibTasks"],
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
