"""llama.cpp itself, from the wheel `xllamacpp`, on the CPU."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp


class LlamaCpp:
    """A server with one model, and adapters beside it."""

    def __init__(self, model: Path, adapter: Path | None = None, n_ctx: int = 256):
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = n_ctx, 1, 0
        params.n_batch = params.n_ubatch = n_ctx
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 2
        params.warmup, params.verbosity = False, -1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.fit_params = False
        if adapter is not None:
            info = xllamacpp.CommonAdapterLoraInfo()
            info.path, info.scale = str(adapter), 1.0
            params.lora_adapters = [info]
        self.server = xllamacpp.Server(params)

    def greedy(
        self, prompt: list[int] | str, count: int, probs: int = 10
    ) -> list[dict[int, float]]:
        """For each new token, it and its rivals with their log-probabilities, the best first."""
        answer = self.server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": count,
                "temperature": 0.0,
                "n_probs": probs,
                "cache_prompt": False,
            }
        )
        steps = answer["choices"][0]["logprobs"]["content"]
        return [{rival["id"]: rival["logprob"] for rival in s["top_logprobs"]} for s in steps]

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """What the server's HTTP interface answers."""
        request = urllib.request.Request(
            f"{self.server.listening_address}{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=600) as response:
            return json.load(response)

    def tokenize(self, text: str, add_special: bool = False) -> list[int]:
        """Token ids of a text in which special tokens are recognized."""
        body = {"content": text, "add_special": add_special, "parse_special": True}
        tokens: list[int] = self.post("/tokenize", body)["tokens"]
        return tokens
