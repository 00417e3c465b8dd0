"""Megatron-KD: knowledge distillation for language-model pre-training on Megatron-Core."""

__version__ = "0.1.0"
