"""rankflow in an own loop over several processes, on GPUs or, to see that it works, on CPUs.

torchrun --nproc-per-node 2 examples/multi_gpu/own_loop.py            # DistributedDataParallel
torchrun --nproc-per-node 2 examples/multi_gpu/own_loop.py --shard    # FSDP2: base model in shards, adapter whole
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))

import rankflow
from data import LINEARS, minilm_classifier, reviews

parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
parser.add_argument("--policy", default="grow_then_squeeze", help="a shipped policy, or the path of a YAML file")
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--shard", action="store_true", help="spread the base model over processes")
parser.add_argument("--out", type=Path, default=Path("runs/multi_gpu"))
options = parser.parse_args()

on_gpu = torch.cuda.is_available()
dist.init_process_group("nccl" if on_gpu else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
if on_gpu:
    torch.cuda.set_device(device)
else:
    torch.set_num_threads(1)

config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=8, target_modules=LINEARS, modules_to_save=["classifier"])
model = get_peft_model(minilm_classifier(), config).to(device)


def trained() -> list[torch.nn.Parameter]:
    """As they are now: a resize makes new ones."""
    return [p for p in model.parameters() if p.requires_grad]


if options.shard:
    mesh = init_device_mesh(device.type, (size,))
    for layer in model.base_model.model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh, ignored_params=set(trained()))
    fully_shard(model, mesh=mesh, ignored_params=set(trained()))
wrapped = model if options.shard else DistributedDataParallel(model)

optimizer = torch.optim.AdamW(trained(), lr=2e-3)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, options.steps)
train, held_out = reviews()
sampler = DistributedSampler(train, size, rank, seed=0)
loader = DataLoader(train, batch_size=16, sampler=sampler, drop_last=True)

flow = rankflow.attach(
    wrapped, optimizer, options.policy, total_steps=options.steps, ledger=options.out / "rankflow.jsonl"
)
with flow:
    bar = tqdm(total=options.steps, disable=rank > 0)
    for epoch in range(1 + options.steps // len(loader)):
        sampler.set_epoch(epoch)
        for batch in loader:
            if flow.step == options.steps:
                break
            loss = wrapped(**{k: v.to(device) for k, v in batch.items()}).loss
            loss.backward()
            flow.before_step()  # before clipping: beside shards it reduces the adapter's gradients
            torch.nn.utils.clip_grad_norm_(trained(), 1.0)
            optimizer.step()
            flow.after_step()
            scheduler.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}", total_rank=flow.layout.total_rank)
    bar.close()

model.eval()
hits = torch.zeros(2, device=device)
with torch.inference_mode():
    for batch in DataLoader(held_out, batch_size=64, sampler=DistributedSampler(held_out, size, rank, shuffle=False)):
        right = model(**{k: v.to(device) for k, v in batch.items()}).logits.argmax(-1).cpu() == batch["labels"]
        hits += torch.tensor([right.sum(), len(right)], device=device)
dist.all_reduce(hits)
adapter = {name: p.detach().cpu() for name, p in model.state_dict().items() if "lora_" in name or "classifier" in name}
if rank == 0:
    model.save_pretrained(options.out / "adapter", state_dict=adapter)
    mean_rank = flow.metrics()["rankflow/mean_rank"]
    print(f"accuracy {float(hits[0] / hits[1]):.3f} over {size} processes; mean rank {mean_rank:.1f}")
dist.destroy_process_group()
