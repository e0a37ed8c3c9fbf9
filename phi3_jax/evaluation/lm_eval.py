r"""Phi-3 in EleutherAI's lm-evaluation-harness, under the model name `phi3-jax`.

    pip install 'phi3-jax[lm-eval]'
    phi3-jax lm-eval --tasks arc_easy \
        --model_args path=microsoft/Phi-3-mini-4k-instruct,adapter=runs/phi3-mini/adapter

The arguments are the harness's own. Scores are those of its Hugging Face model (`hf`).
"""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from phi3_jax.errors import UserError

try:
    from lm_eval import utils as harness_utils
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM as HarnessLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
except ImportError as error:
    raise UserError("lm-eval is an optional extra: pip install 'phi3-jax[lm-eval]'") from error

import phi3_jax
from phi3_jax.checkpoint.adapters import load_with_adapter, open_with_adapter
from phi3_jax.data.rendering import render
from phi3_jax.data.tokenizer import load_tokenizer, tokenizer_folder
from phi3_jax.generation.answers import generate_batched, stop_ids
from phi3_jax.generation.prompts import encode_text
from phi3_jax.model.config import RopeFactors
from phi3_jax.platform import compute_dtype

# Row lengths are rounded up to a multiple of this to limit recompilation.
BUCKET = 64
# Number of tokens whose logits are held at once.
CHUNK = 256
# Generation limit for tasks that set none: the harness's own default.
MAX_GEN_TOKENS = 256

Request = tuple[tuple[str, str] | None, list[int], list[int]]

if TYPE_CHECKING:

    class TemplateLM:
        """What this module uses of the harness's base class; lm-eval ships no types."""

        cache_hook: Any

else:
    TemplateLM = HarnessLM


@register_model("phi3-jax")
class Phi3LM(TemplateLM):
    """A Phi-3 checkpoint, with or without an adapter.

    Args:
        path: folder or hub id; required.
        adapter: folder or hub id of a PEFT adapter.
        dtype: dtype of the weights, as in a config's `model.dtype`.
        batch_size: rows scored or answered at once.
        max_length: maximum length of context plus continuation; defaults to the model's maximum
            number of positions.
        rope_factors: as a config's `model.rope_factors`.

    Raises:
        UserError: an argument that is missing, unknown or out of range, or a model or adapter that
            cannot be loaded.
    """

    def __init__(
        self,
        path: str | None = None,
        adapter: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 8,
        max_length: int | None = None,
        rope_factors: RopeFactors = "by_text",
        **unknown: Any,
    ):
        super().__init__()
        # The harness passes these to every model.
        names = sorted(unknown.keys() - {"device", "max_batch_size"})
        known = "path, adapter, dtype, batch_size, max_length, rope_factors"
        problems = [f"{name} is not one of --model_args: {known}" for name in names]
        if path is None:
            problems.append("path is missing: the folder or hub id of a Phi-3 checkpoint")
        problems += _range_problems(batch_size, max_length, dtype, rope_factors)
        if problems:
            raise UserError("; ".join(problems))
        checkpoint, where = open_with_adapter(str(path), adapter)
        self.tokenizer: Any = load_tokenizer(tokenizer_folder(checkpoint.directory, where))
        model = load_with_adapter(checkpoint, where, compute_dtype(dtype), rope_factors)
        self.model, self.batch_size = model, int(batch_size)
        self.max_length = int(max_length or model.config.max_position_embeddings)
        self.stops = stop_ids(checkpoint.directory, self.tokenizer)
        self.graphdef, self.state = nnx.split(model)
        self.seed = 0  # of the next answers

    @property
    def eot_token_id(self) -> int:
        eos: int = self.tokenizer.eos_token_id
        return eos

    @property
    def prefix_token_id(self) -> int:
        bos: int | None = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Apply the checkpoint's own chat template."""
        return render(chat_history, self.tokenizer, add_generation_prompt=add_generation_prompt)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; text that already starts with the BOS token does not get a second one."""
        if add_special_tokens is None and string.startswith(
            self.tokenizer.decode(self.prefix_token_id)
        ):
            add_special_tokens = False
        if add_special_tokens is False:
            ids: list[int] = self.tokenizer.encode(string, add_special_tokens=False)
            return ids
        return encode_text(string, self.tokenizer)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of whole texts, in windows of `max_length`."""
        windows: list[Request] = []
        counts = []
        for request in requests:
            rolling = harness_utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = [harness_utils.make_disjoint_window(window) for window in rolling]
            windows += [(None, context, continuation) for context, continuation in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(score for score, _ in itertools.islice(scores, n)) for n in counts]

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would produce it.

        Raises:
            UserError: a continuation of more than `max_length` tokens.
        """
        if (longest := max((len(request[2]) for request in requests), default=0)) > self.max_length:
            raise UserError(
                f"a continuation has {longest} tokens, more than max_length, {self.max_length}"
            )
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i][1:])))
        for first in range(0, len(order), self.batch_size):
            chosen = order[first : first + self.batch_size]
            rows = [
                (
                    (requests[i][1] + requests[i][2])[-(self.max_length + 1) :],
                    len(requests[i][2]),
                )
                for i in chosen
            ]
            logp, greedy = self._score(rows)
            for row, i in enumerate(chosen):
                scores[i] = (float(logp[row]), bool(greedy[row]))
                if (text := requests[i][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", text, scores[i])
        return scores

    def _score(self, rows: list[tuple[list[int], int]]) -> tuple[np.ndarray, np.ndarray]:
        # The last token is only predicted: with it a row could exceed LongRoPE's original length.
        width = -(-max(len(ids) - 1 for ids, _ in rows) // BUCKET) * BUCKET
        tokens = np.zeros((self.batch_size, max(width, BUCKET)), np.int32)
        labels, segment_ids = np.zeros_like(tokens), np.zeros_like(tokens)
        scored = np.zeros(tokens.shape, bool)
        for row, (ids, length) in enumerate(rows):
            count = len(ids) - 1
            tokens[row, :count], labels[row, :count] = ids[:-1], ids[1:]
            segment_ids[row, :count] = 1
            scored[row, count - length : count] = True
        positions = np.arange(tokens.shape[1], dtype=np.int32) * segment_ids
        logp, greedy = _score(
            self.graphdef, self.state, tokens, positions, segment_ids, labels, scored
        )
        return np.asarray(logp), np.asarray(greedy)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, truncated at the first of each request's stop sequences.

        Sampled answers to equal requests differ; calls in the same order give the same answers.

        Raises:
            UserError: a request for as many tokens as `max_length`, or more.
        """
        answers = [""] * len(requests)
        by_settings: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            by_settings.setdefault(repr(request.args[1]), []).append(i)
        for indices in by_settings.values():
            settings = requests[indices[0]].args[1]
            kwargs = dict(normalize_gen_kwargs(settings, MAX_GEN_TOKENS))
            eos = self.tokenizer.decode(self.eot_token_id)
            until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
            ids = [self.tok_encode(requests[i].args[0]) for i in indices]
            for i, text in zip(indices, self._answer(ids, kwargs), strict=True):
                answers[i] = postprocess_generated_text(text, until, None)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def _answer(self, prompts: list[list[int]], kwargs: dict[str, Any]) -> list[str]:
        new = int(kwargs.pop("max_gen_toks"))
        sampling = {
            name: kwargs[name]
            for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
            if kwargs.get(name) is not None
        }
        if new >= self.max_length:
            raise UserError(
                f"max_gen_toks {new} leaves no room for a prompt in max_length {self.max_length}; "
                "set a smaller max_gen_toks (--gen_kwargs) or a larger max_length (--model_args)"
            )
        prompts = [prompt[-(self.max_length - new) :] for prompt in prompts]
        out = generate_batched(
            self.model,
            prompts,
            self.batch_size,
            max_new_tokens=new,
            seed=self.seed,
            eos_ids=self.stops,
            **sampling,
        )
        self.seed += len(prompts)  # at least the number of batches
        # Prompts were cut to leave room, so that each has an answer.
        texts = [self.tokenizer.decode(tokens or [], skip_special_tokens=True) for tokens in out]
        return [str(text) for text in texts]


def _range_problems(
    batch_size: int | str, max_length: int | str | None, dtype: str, rope_factors: str
) -> list[str]:
    """What is wrong with the values of `model_args`, one line per argument."""
    problems = []
    for name, number in (("batch_size", batch_size), ("max_length", max_length or 1)):
        if not (str(number).isdecimal() and int(number)):
            problems.append(f"{name} must be a number of at least 1, not {number}")
    for name, choice, choices in (
        ("dtype", dtype, ("auto", "float32", "bfloat16", "float16")),
        ("rope_factors", rope_factors, get_args(RopeFactors)),
    ):
        if choice not in choices:
            problems.append(f"{name} must be one of {', '.join(choices)}, not {choice}")
    return problems


@functools.partial(jax.jit, static_argnums=0)
def _score(
    graphdef: nnx.GraphDef[Any],
    state: nnx.State[Any, Any],
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    labels: jax.Array,
    scored: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Score the labels of each row, where `scored`.

    Args:
        graphdef: the model's, static.
        state: the model's arrays.
        tokens: int32 `[B, S]`.
        positions: int32 `[B, S]`.
        segment_ids: int32 `[B, S]`, 0 for padding.
        labels: int32 `[B, S]`, the token after each.
        scored: bool `[B, S]`.

    Returns:
        Summed log-probabilities, float32 `[B]`, and whether all labels are greedy choices,
        bool `[B]`.
    """
    model: phi3_jax.Phi3 = nnx.merge(graphdef, state)
    hidden = model.hidden_states(tokens, positions, segment_ids)

    def of(xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        logits = model.head(xs[0])
        logp = logits[xs[1]] - jax.nn.logsumexp(logits)
        return logp, jnp.argmax(logits) == xs[1]

    flat = hidden.reshape(-1, hidden.shape[-1])
    logp, greedy = jax.lax.map(of, (flat, labels.reshape(-1)), batch_size=min(CHUNK, flat.shape[0]))
    logp, greedy = logp.reshape(scored.shape), greedy.reshape(scored.shape)
    return jnp.where(scored, logp, 0.0).sum(axis=1), (greedy | ~scored).all(axis=1)


def main(arguments: list[str]) -> None:
    """Run the harness's own command line with this model."""
    sys.argv = ["lm_eval", "run", "--model", "phi3-jax", *arguments]
    cli_evaluate()
