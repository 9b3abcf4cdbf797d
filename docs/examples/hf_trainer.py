"""Hugging Face's Trainer that sends survivors' gradients alone.

torchrun --nproc-per-node 2 docs/examples/hf_trainer.py
MASTER_ADDR=$(hostname) MASTER_PORT=29500 mpirun -n 2 -x MASTER_ADDR -x MASTER_PORT python docs/examples/hf_trainer.py
"""

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments

import hpcprune


class SendSurvivors(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        ddp = trainer.model_wrapped  # the Trainer has wrapped the model in DistributedDataParallel by now
        ddp.register_comm_hook(None, hpcprune.ddp_hook(masks, ddp))


torch.manual_seed(0)  # every rank prunes the same weights
config = BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
model = BertForSequenceClassification(config)
words = torch.randint(64, (256, 8))
data = [{"input_ids": row, "labels": int(row[0] < 32)} for row in words]

masks = hpcprune.prune(model, sparsity=0.9, scope="layer")  # a trained model is better pruned globally
options = {"use_cpu": True, "ddp_backend": "gloo", "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
args = TrainingArguments("runs/hf", num_train_epochs=4, learning_rate=3e-3, ddp_find_unused_parameters=False, **options)
trainer = Trainer(model, args, train_dataset=data, callbacks=[SendSurvivors()])
trainer.train()

if trainer.is_world_process_zero():
    predicted = model.eval()(words).logits.argmax(1)
    accuracy = (predicted == (words[:, 0] < 32)).float().mean()
    weights = torch.cat([model.get_parameter(name).flatten() for name in masks])
    zero = (weights == 0).float().mean()
    print(f"{args.world_size} ranks: accuracy {accuracy:.2f}, {zero:.1%} of the weights are zero")
