"""What the backward pass keeps, by the memory of the device (`gradient_checkpointing: auto`)."""

from __future__ import annotations

import jax

from phi3_jax.evaluation.loss import LOGITS
from phi3_jax.model.config import Phi3Config
from phi3_jax.model.remat import SAVED, Remat, Saved, describe, saved_bytes
from phi3_jax.model.sequence import heads_divide
from phi3_jax.platform import compute_dtype, free_memory
from phi3_jax.sharding.mesh import MEMBER, row_devices
from phi3_jax.sharding.processes import on_first
from phi3_jax.training.setup import Setup
from phi3_jax.training.sweep.groups import members_per_device

# Cheapest to compute first. A product's FLOPs per byte of its result are twice its input size,
# which is the same for all; attention's are more on long rows.
LADDER: tuple[Remat, ...] = (
    ("attention", "residual", "qkv", "gate_up"),
    ("attention", "residual", "gate_up"),
    ("attention", "residual", "qkv"),
    ("attention", "residual"),
    "full",
)


def choose_remat(setup: Setup, kept: str | None, members: int = 1) -> Remat:
    """The policy of a run: the configured one, or with `auto` the cheapest that fits.

    Call it once everything that stays on the device is there. What `auto` chose is added to the
    setup's choices and notes.

    Args:
        setup: the loaded run.
        kept: the choice of the run that is resumed, taken again if it fits here.
        members: adapters trained at once.
    """
    training, network = setup.config.training, setup.checkpoint.config
    if training.remat != "auto":
        return training.remat
    shape, rows = setup.mesh.shape, training.per_device_train_batch_size
    tokens = rows * setup.config.data.max_length
    of_all = tokens * row_devices(setup.mesh)
    tokens *= members_per_device(members, shape.get(MEMBER, 1), of_all, jax.default_backend())
    itemsize = compute_dtype(setup.config.model.dtype).itemsize
    free = on_first(free_memory)
    cut = shape["sequence"], shape["tensor"]
    remat, note = choose(network, tokens, itemsize, free, kept, *cut)
    setup.choices["remat"] = to_text(remat)
    setup.notes.append(note)
    return remat


def choose(
    network: Phi3Config,
    tokens: int,
    itemsize: int,
    free: int | None,
    kept: str | None = None,
    devices: int = 1,
    tensor: int = 1,
) -> tuple[Remat, str]:
    """The cheapest policy whose activations fit, and a line that says so.

    Args:
        network: the architecture.
        tokens: of a micro-batch, on one device or on those that share its rows.
        itemsize: bytes of an activation.
        free: bytes that activations may take; None if unknown, which keeps nothing.
        kept: an earlier choice (`to_text`), preferred if it fits.
        devices: that each row is cut over along its tokens.
        tensor: devices that each matmul is split over.
    """

    def size_of(remat: Remat) -> int:
        return activation_bytes(network, tokens, itemsize, remat, devices, tensor)

    def fits(remat: Remat) -> bool:
        return free is not None and size_of(remat) <= free

    before = "" if kept is None else f"rematerialization: {kept}, as before, does not fit; now "
    remat: Remat = next(filter(fits, LADDER), "full")
    if kept is not None and (earlier := from_text(kept)) is not None and fits(earlier):
        remat, before = earlier, ""
    size = size_of(remat) / 2**30
    room = "unknown free memory" if free is None else f"{free / 2**30:.1f} GiB"
    what = f"{before or 'rematerialization: '}{describe(remat)}"
    return remat, f"{what} (about {size:.1f} GiB of activations in {room})"


def activation_bytes(
    network: Phi3Config,
    tokens: int,
    itemsize: int,
    remat: Remat,
    devices: int = 1,
    tensor: int = 1,
) -> int:
    """Bytes that a step's activations take on one device, at most, for one of `LADDER`.

    Each layer keeps its input and what the policy names. On top come the largest layer's own
    values, forward and backward, and the logits of one chunk of the loss with their gradient. Where
    several devices share the rows, each also has one layer's queries, keys, and values of its part
    of the heads, or keys and values of all, with their gradients.
    """
    names: tuple[Saved, ...] = () if isinstance(remat, str) else remat
    each = network.hidden_size * itemsize + sum(
        saved_bytes(network, name, itemsize) for name in names
    )
    layer = 2 * sum(saved_bytes(network, name, itemsize) for name in SAVED)
    logits = 3 * 4 * max(LOGITS, 16 * network.vocab_size)
    whole = 0
    if devices > 1:
        shared = heads_divide(network.num_key_value_heads, tensor, devices)
        own = (network.q_size + network.kv_size) // devices if shared else network.kv_size
        whole = 4 * own * itemsize * tokens
    return tokens // devices * (network.num_hidden_layers * each + layer) + whole + logits


def to_text(remat: Remat) -> str:
    """A policy as a checkpoint records it."""
    return remat if isinstance(remat, str) else "+".join(remat)


def from_text(text: str) -> Remat | None:
    """The policy of `LADDER` that has this text; None if none has."""
    return {to_text(remat): remat for remat in LADDER}.get(text)
