"""80 % of the weights of a BERT to zero: python examples/sparse_transformers.py."""

import tempfile

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from tikhon.integrations.transformers import Sparsify

torch.manual_seed(0)
tokens = torch.randint(1, 50, (512, 12))
labels = (tokens[:, 1:6] == 7).any(1) | (tokens[:, 1:6] < 12).sum(1).ge(2)
data = [{"input_ids": row, "labels": int(label)} for row, label in zip(tokens, labels)]

config = BertConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=16,
)
model = BertForSequenceClassification(config)
sparse = Sparsify("80%", within="bert.encoder")
with tempfile.TemporaryDirectory() as folder:
    options = TrainingArguments(
        folder,
        num_train_epochs=12,
        per_device_train_batch_size=32,
        learning_rate=3e-3,
        logging_steps=64,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, options, train_dataset=data, callbacks=[sparse])
    trainer.train()

print(sparse.sparsifier.audit())
model.eval()
accuracy = (model(tokens).logits.argmax(1) == labels).float().mean()
print(f"accuracy {accuracy:.3f}")
