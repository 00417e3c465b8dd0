# The NGC image brings torch, Transformer Engine and Apex; everything else is installed by the Makefile, against them.
#   docker build -t megatron-kd . && docker run --gpus all -it megatron-kd
FROM nvcr.io/nvidia/pytorch:25.09-py3

RUN useradd --create-home --shell /bin/bash megatron
USER megatron
WORKDIR /home/megatron/megatron-kd
COPY --chown=megatron:megatron . .

# torch stays the image's own: it is the only constraint, and the environment sees the image's packages.
RUN python -c 'import torch; print(f"torch=={torch.__version__}")' > /home/megatron/constraints.txt \
    && make install PYTHON=python3 VENV_FLAGS=--system-site-packages CONSTRAINTS=/home/megatron/constraints.txt TORCH=
ENV PATH="/home/megatron/megatron-kd/.venv/bin:${PATH}"
CMD ["bash"]
