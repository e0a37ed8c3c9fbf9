"""The vision transformer of examples/: its adapter in PEFT, on the same network in PyTorch."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import peft
import torch
from flax import nnx

from examples import vit_digits
from examples.vit_digits import DEPTH, HEADS, PATCH, WIDTH


class TorchAttention(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        shape = (*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        q, k, v = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class TorchBlock(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (torch.nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn = TorchAttention()
        self.fc1, self.fc2 = torch.nn.Linear(WIDTH, 4 * WIDTH), torch.nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(torch.nn.functional.gelu(self.fc1(self.norm2(x))))


class TorchViT(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Linear(PATCH * PATCH, WIDTH)
        self.place = torch.nn.Parameter(torch.zeros(16, WIDTH))
        self.blocks = torch.nn.ModuleList(TorchBlock() for _ in range(DEPTH))
        self.norm = torch.nn.LayerNorm(WIDTH, eps=1e-6)
        self.head = torch.nn.Linear(WIDTH, 10)

    def forward(self, images):
        x = images.reshape(-1, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(-1, 16, 4)
        x = self.embed(x) + self.place
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x).mean(1))


def in_torch(model: nnx.Module) -> TorchViT:
    weights = {}
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        *names, last = map(str, path)
        array = np.asarray(variable.get_value())
        last = {"kernel": "weight", "scale": "weight"}.get(last, last)
        weights[".".join([*names, last])] = torch.tensor(array.T if array.ndim == 2 else array)
    weights["place"] = weights["place"].T
    theirs = TorchViT()
    theirs.load_state_dict(weights)
    return theirs.eval()


def test_the_adapter_in_peft(tmp_path, monkeypatch, capsys):
    trained = []
    train = vit_digits.train

    def recorded(model, *args):
        train(model, *args)
        trained.append(model)
        if len(trained) == 1:
            trained.append(nnx.clone(model))  # before it is wrapped

    monkeypatch.setattr(vit_digits, "train", recorded)
    monkeypatch.setattr(sys, "argv", ["x", "--steps", "40", "--output", str(tmp_path / "adapter")])
    vit_digits.main()
    lines = capsys.readouterr().out.splitlines()
    before = float(lines[0].split()[-4].rstrip("%"))
    after, again = float(lines[-2].split()[3].rstrip("%")), float(lines[-1].split()[-1].rstrip("%"))
    assert after == again > before + 10
    _, base, ours = trained
    images = vit_digits.digits(turned=True)[1][0][:32]
    theirs = peft.PeftModel.from_pretrained(in_torch(base), tmp_path / "adapter")
    with torch.no_grad():
        logits = theirs(torch.tensor(np.asarray(images))).numpy()
    np.testing.assert_allclose(jax.jit(ours)(jnp.asarray(images)), logits, rtol=0, atol=2e-4)
