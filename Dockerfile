# Training and preparation in a container.
#   CUDA, the default (the driver must support CUDA 13; the NVIDIA Container Toolkit must be installed):
#     docker build -t remix .
#     mkdir -p data runs
#     docker run --rm --init --ipc=host --gpus all --user "$(id -u):$(id -g)" \
#         -v "$PWD/data:/app/data" -v "$PWD/runs:/app/runs" remix --train
#   CPU, about 5 GB smaller; URL is the index of PyTorch's CPU builds that pytorch.org's installation page names:
#     docker build -t remix:cpu --build-arg TORCH_INDEX=URL .
# The index of another CUDA version serves older drivers in the same way. Another command needs another entry point:
#     docker run --rm -v "$PWD/runs:/app/runs" --entrypoint python remix -m report runs/compare
ARG PYTHON=3.13
FROM python:${PYTHON}-slim

# --compile needs a C++ compiler.
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /app

# Packages first: they are downloaded again only when these files change.
ARG TORCH_INDEX=""
COPY requirements.txt requirements-lock.txt ./
RUN PIP_EXTRA_INDEX_URL="$TORCH_INDEX" pip install --no-cache-dir -r requirements.txt -c requirements-lock.txt

COPY . .
RUN mkdir -p data runs && chmod 777 data runs
# Any user may run it: caches go to /tmp, runs to the mounted folder. PyTorch asks for the user's name, and an id
# without an entry in /etc/passwd has none.
ENV HOME=/tmp USER=remix PYTHONUNBUFFERED=1
USER 1000:1000
# `docker stop` sends SIGTERM: train.py stops after the current step, and --resume continues the run.
ENTRYPOINT ["python", "train.py"]
CMD ["--help"]
