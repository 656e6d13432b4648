"""The same network as others write it: Hugging Face's GPT-2 around our parameters."""

import torch
from torch import Tensor

from nanogpt.model import GPT2Config, Params


def hugging_face(config: GPT2Config, params: Params) -> torch.nn.Module:
    """A GPT2LMHeadModel with a copy of `params`, made from its config: nothing is downloaded."""
    import transformers

    with torch.device("meta"):  # no random weights are drawn to be thrown away
        model = transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=config.vocab_size,
                n_positions=config.block_size,
                n_embd=config.n_embd,
                n_layer=config.n_layer,
                n_head=config.n_head,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                attn_implementation="sdpa",
                bos_token_id=0,
                eos_token_id=0,
            )
        )
    copies = {f"transformer.{name}": leaf.clone() for name, leaf in params.items()}
    copies["lm_head.weight"] = copies["transformer.wte.weight"]
    model.load_state_dict(copies, assign=True)
    model.tie_weights()
    return model.train()


def hugging_face_loss(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    logits = model(inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def hugging_face_grads(model: torch.nn.Module) -> Params:
    """The gradients that a backward pass left, under our names."""
    return {name.removeprefix("transformer."): leaf.grad for name, leaf in model.named_parameters()}
