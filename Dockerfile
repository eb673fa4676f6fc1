# syntax=docker/dockerfile:1
# The server with one engine. Another one: docker build --build-arg EXTRAS=serve,torch .
# gcc makes the native backend's libraries, one for each set of instructions, in the first stage; the second has none.
FROM python:3.11-slim-bookworm AS build
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
ARG EXTRAS=serve,onnx
WORKDIR /src
RUN python -m venv /venv
ENV PATH=/venv/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# hadolint ignore=DL3008
RUN apt-get update && apt-get install -y --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml hatch_build.py constraints.txt README.md LICENSE ./
COPY gpt2core gpt2core
RUN pip install --only-binary=:all: -c constraints.txt ".[$EXTRAS]"

FROM python:3.11-slim-bookworm
RUN useradd --system --uid 10001 --create-home --home-dir /var/lib/gpt2core gpt2core
COPY --from=build /venv /venv
ENV PATH=/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    HF_HOME=/var/lib/gpt2core/huggingface \
    GPT2CORE_CACHE=/var/lib/gpt2core/cache \
    GPT2CORE_HOST=0.0.0.0 \
    GPT2CORE_PORT=8000
WORKDIR /var/lib/gpt2core
USER 10001:10001
VOLUME /var/lib/gpt2core
EXPOSE 8000
# Python itself asks: the image has no curl. /livez needs no key and no model.
HEALTHCHECK --interval=10s --timeout=3s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['GPT2CORE_PORT'] + '/livez', timeout=2)"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["gpt2core", "serve"]
