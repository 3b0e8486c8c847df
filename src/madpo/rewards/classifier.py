"""The oracle that is a sequence classifier."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from madpo.core.errors import ConfigError
from madpo.models.engine.batches import padded_batches
from madpo.models.load import load_classifier, load_tokenizer, placed, resolve_model
from madpo.rewards.oracles import ClassifierOracle, Floats


class Classifier:
    """The probability that a text is positive, by a sequence classifier."""

    def __init__(self, config: ClassifierOracle) -> None:
        source = resolve_model(config.name)
        model = load_classifier(source, revision=config.revision, dtype=torch.float32)
        self.tokenizer = load_tokenizer(source)
        labels = {str(label).lower(): index for index, label in model.config.id2label.items()}
        if config.positive_label.lower() not in labels:
            raise ConfigError(
                f"positive_label is {config.positive_label!r}, but {config.name} has the labels {', '.join(labels)}"
            )
        self.column = int(labels[config.positive_label.lower()])
        self.model = placed(model)
        # RoBERTa counts positions from 2, and some tokenizers do not know their model's limit.
        self.limit = min(self.tokenizer.model_max_length, model.config.max_position_embeddings - 2)

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> Floats:
        sequences = [self.tokenizer(text, truncation=True, max_length=self.limit)["input_ids"] for text in texts]
        found = np.zeros(len(texts))
        for rows, ids, mask in padded_batches(sequences, 32, self.tokenizer.pad_token_id, self.model, "Oracle"):
            logits = self.model(input_ids=ids, attention_mask=mask).logits
            found[rows] = logits.double().softmax(-1)[:, self.column].cpu().numpy()
        return found
