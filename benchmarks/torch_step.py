"""The train step of gpt_jax in PyTorch, through torch.compile, as a rival for train_step.py.

The same model, dropout, soft cap, clipping and AdamW. Attention is PyTorch's fused one where there is neither a soft
cap nor dropout, else written out, as no fused one has both; bfloat16 is autocast's. Forward and backward run as CUDA
graphs (mode reduce-overhead).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        d, bias = model.embed_dim, model.use_bias
        self.heads, self.cap, self.rate = model.num_heads, model.soft_cap, model.dropout_rate
        self.ln_1, self.ln_2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.qkv, self.projection = nn.Linear(d, 3 * d, bias), nn.Linear(d, d, bias)
        self.mlp_in, self.mlp_out = nn.Linear(d, 4 * d, bias), nn.Linear(4 * d, d, bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, T, D)
        b, t, d = x.shape
        q, k, v = (
            y.view(b, t, self.heads, d // self.heads).transpose(1, 2) for y in self.qkv(self.ln_1(x)).split(d, dim=2)
        )
        if self.cap or self.rate:
            mixed = self.attention(q, k, v)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(b, t, d)
        x = x + F.dropout(self.projection(mixed), self.rate, self.training)
        hidden = self.mlp_out(F.gelu(self.mlp_in(self.ln_2(x)), approximate="tanh"))
        return x + F.dropout(hidden, self.rate, self.training)

    def attention(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # (B, H, T, D) each
        t, head_dim = q.shape[2:]
        scores = (q @ k.transpose(2, 3)).float() / math.sqrt(head_dim)  # (B, H, T, T)
        if self.cap:
            scores = self.cap * torch.tanh(scores / self.cap)
        mask = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
        weights = F.dropout(scores.masked_fill(~mask, -1e30).softmax(-1), self.rate, self.training)
        return weights.to(v.dtype) @ v


class GPT(nn.Module):
    def __init__(self, model: Any):
        super().__init__()
        self.tokens = nn.Embedding(model.vocab_size, model.embed_dim)
        self.positions = nn.Embedding(model.block_size, model.embed_dim)
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.num_layers))
        self.ln_f = nn.LayerNorm(model.embed_dim)
        self.head = nn.Linear(model.embed_dim, model.vocab_size, bias=False)
        if model.tie_head:
            self.head.weight = self.tokens.weight

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(inputs) + self.positions.weight[: inputs.shape[1]]
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.ln_f(x)).float()
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def make_side(config: Any) -> tuple[Callable[[Any], Any], Callable[[bool], dict[str, Any]]]:
    """Makes torch.compile's side, as `train_step.vulkan_side` makes ours."""
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    model = GPT(config.model).cuda().train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        model.parameters(),
        options.learning_rate,
        (options.b1, options.b2),
        options.epsilon,
        options.weight_decay,
        fused=True,
    )
    bf16 = config.model.dtype == "bfloat16"

    @torch.compile(mode="reduce-overhead")
    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
            return model(inputs, targets)

    def run(batch: Any) -> Callable[[], float]:
        torch.compiler.cudagraph_mark_step_begin()
        inputs, targets = (
            torch.from_numpy(batch[name]).long().cuda(non_blocking=True) for name in ("inputs", "targets")
        )
        loss = loss_of(inputs, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), options.clip_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        kept = loss.detach().clone()
        return lambda: kept.item()

    def finish(_: bool) -> dict[str, Any]:
        return {"device": torch.cuda.get_device_name(), "memory": torch.cuda.max_memory_allocated()}

    return run, finish
