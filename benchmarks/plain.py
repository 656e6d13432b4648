"""GPT-2 as most people write it: one `nn.Module` that owns its weights, trained in place.

The architecture of nanoGPT: `nn.Linear`, fused attention, all logits at once, and the vocabulary padded to a
multiple of 128, since a padded head is faster.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nanogpt.model import GPT2Config, Params


class PlainBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        C = config.n_embd
        self.n_head = config.n_head
        self.ln_1 = nn.LayerNorm(C)
        self.attn = nn.ModuleDict({"c_attn": nn.Linear(C, 3 * C), "c_proj": nn.Linear(C, C)})
        self.ln_2 = nn.LayerNorm(C)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(C, 4 * C), "c_proj": nn.Linear(4 * C, C)})

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).split(C, dim=2)
        q, k, v = (part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for part in qkv)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["c_proj"](attended.transpose(1, 2).contiguous().view(B, T, C))
        return x + self.mlp["c_proj"](F.gelu(self.mlp["c_fc"](self.ln_2(x)), approximate="tanh"))


class PlainGPT2(nn.Module):
    """Embeddings, blocks, final norm and the tied head; called with targets, as a trainer does."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd)
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of the next token, in nats. Padded columns take part in the softmax, as in nanoGPT."""
        x = self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1], device=inputs.device))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))


def plain_gpt2(config: GPT2Config, params: Params) -> PlainGPT2:
    """A PlainGPT2 with a copy of `params`, whose matrices it stores transposed; padded rows are zero."""
    device = params["wte.weight"].device
    with torch.device(device), torch.no_grad():
        model = PlainGPT2(config)
        for name, leaf in model.named_parameters():
            is_linear = name.startswith("h.") and name.endswith("weight") and leaf.ndim == 2
            source = params[name].t() if is_linear else params[name]
            leaf.zero_()[: len(source)].copy_(source)
    return model
