"""Adapters that PEFT itself makes."""

from __future__ import annotations

import peft
import torch


def shaken(base, config: peft.LoraConfig) -> peft.PeftModel:
    """The base with a random adapter."""
    adapted = peft.get_peft_model(base, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return adapted
