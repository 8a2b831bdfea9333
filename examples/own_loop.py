"""rankflow in an own training loop: grow, anneal, save. Run: python examples/own_loop.py"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from tqdm import tqdm

import rankflow
from data import LINEARS, minilm_classifier, reviews

STEPS = 200
torch.set_num_threads(1)  # two threads stall each other on small machines
torch.manual_seed(0)

train, held_out = reviews()
config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=LINEARS, modules_to_save=["classifier"])
model = get_peft_model(minilm_classifier(), config)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
loader = DataLoader(train, batch_size=16, shuffle=True, drop_last=True)

with rankflow.attach(model, optimizer, "grow_then_squeeze", total_steps=STEPS, ledger="runs/own_loop.jsonl") as flow:
    bar = tqdm(zip(range(STEPS), loader, strict=False), total=STEPS)
    for _, batch in bar:
        loss = model(**batch).loss
        loss.backward()
        flow.before_step()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        flow.after_step()
        scheduler.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}", total_rank=flow.layout.total_rank)

model.eval()
with torch.inference_mode():
    hits = [model(**b).logits.argmax(-1) == b["labels"] for b in DataLoader(held_out, batch_size=64)]
print(f"accuracy {torch.cat(hits).float().mean():.3f}; ranks {flow.layout.ranks}")
model.save_pretrained("runs/own_loop")
