# The NGC image has torch, Transformer Engine and Apex; the Makefile installs everything else against them.
#   docker build -t megatron-kd .
#   docker run --gpus all --ipc=host -it -v "$PWD/data:/home/megatron/megatron-kd/data" megatron-kd
FROM nvcr.io/nvidia/pytorch:25.09-py3

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
RUN useradd --uid 2000 --create-home --shell /bin/bash megatron \
    && install --directory --owner=2000 --group=2000 /home/megatron/megatron-kd
USER 2000
WORKDIR /home/megatron/megatron-kd
COPY --chown=2000:2000 . .

# torch, and what the image built against it, remain the image's own. Everything else gets the versions that pass the
# tests, which the image's own constraints (PIP_CONSTRAINT) would contradict.
RUN python -c 'import torch; print(f"torch=={torch.__version__}")' > /home/megatron/constraints.txt \
    && grep -v '^torch==' requirements/constraints.txt >> /home/megatron/constraints.txt \
    && PIP_CONSTRAINT='' make install PYTHON=python3 VENV_FLAGS=--system-site-packages \
        CONSTRAINTS=/home/megatron/constraints.txt TORCH= EXTRAS=tracking,eval
ENV PATH="/home/megatron/megatron-kd/.venv/bin:${PATH}"
CMD ["bash"]
