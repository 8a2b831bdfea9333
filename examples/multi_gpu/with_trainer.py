"""rankflow in the Trainer over several processes; the callback is all there is to it.

accelerate launch --config-file examples/multi_gpu/gpus.yaml examples/multi_gpu/with_trainer.py
torchrun --nproc-per-node 2 examples/multi_gpu/with_trainer.py    # also without a GPU, where accelerate wants MPI
"""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments, set_seed

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import LINEARS, minilm_classifier, reviews
from rankflow import RankFlowCallback

parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
parser.add_argument("--policy", default="grow_then_squeeze", help="a shipped policy, or the path of a YAML file")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", type=Path, default=Path("runs/multi_gpu"))
options = parser.parse_args()

on_gpu = torch.cuda.is_available()
if not on_gpu:
    torch.set_num_threads(1)
warnings.filterwarnings("ignore", message=".*pin_memory.*")
set_seed(0)
train, held_out = reviews()
config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=LINEARS)
model = get_peft_model(minilm_classifier(), config)
args = TrainingArguments(
    output_dir=str(options.out / "trainer"),
    max_steps=options.steps,
    per_device_train_batch_size=16,
    learning_rate=1e-3,
    warmup_steps=options.steps // 20,
    logging_steps=max(1, options.steps // 20),
    save_strategy="no",
    report_to="none",
    use_cpu=not on_gpu,
    ddp_backend="nccl" if on_gpu else "gloo",
    ddp_find_unused_parameters=False,
    average_tokens_across_devices=False,  # labels are one a text: the Trainer would count them twice
)
callback = RankFlowCallback(options.policy)
trainer = Trainer(model=model, args=args, train_dataset=train, eval_dataset=held_out, callbacks=[callback])
trainer.train()
metrics = trainer.evaluate()
trainer.save_model(str(options.out / "adapter"))
if trainer.is_world_process_zero():
    print(f"held-out loss {metrics['eval_loss']:.4f}; ranks by module: {options.out / 'trainer' / 'rankflow.jsonl'}")
